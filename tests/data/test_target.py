"""A target that Transformers cannot read is told in one line that names the option."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.data.tokenizers import byte_tokenizer
from tests.train import small
from vllm_eagle3.bench.llm import kv_bytes_per_token
from vllm_eagle3.data.target import load_tokenizer, tokenizer_for_data
from vllm_eagle3.train.export import export
from vllm_eagle3.train.features import load_target


@pytest.mark.parametrize(
    "read",
    [
        load_tokenizer,
        lambda target: load_target(target, torch.float32),
        lambda target: kv_bytes_per_token({"model": target, "dtype": "auto"}),
    ],
    ids=["tokenizer", "weights", "sizes"],
)
def test_a_target_that_is_not_there(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--target \./nope: no such folder$"):
        read("./nope")


def test_a_target_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"^--target [^\n]+no file named[^\n]+$"):
        load_target(tmp_path, torch.float32)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("content", [LFS_POINTER, b""], ids=["pointer", "nothing"])
def test_a_target_whose_weights_were_not_downloaded(tmp_path, content):
    small.llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"^--target [^\n]+not whole[^\n]+download them again$"):
        load_target(tmp_path, torch.float32)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "gptq"])
def test_a_quantised_target(tmp_path, method):
    small.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^--target [^\n]+ is quantised[^\n]+was made of$"):
        load_target(tmp_path, torch.float32)


@pytest.mark.parametrize(("kind", "warned"), [("qwen3", True), ("llama", False), (None, False)])
def test_a_target_that_no_head_can_be_trained_for_is_warned_of(tmp_path, capsys, kind, warned):
    byte_tokenizer().save_pretrained(tmp_path)
    if kind:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert tokenizer_for_data(tmp_path).eos_token_id is not None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned
    assert all("is of type 'qwen3': `vllm-eagle3 train` trains heads for" in line for line in lines)


def test_a_head_is_no_target(tmp_path):
    export(small.pair(torch.float32)[1], tmp_path)
    with pytest.raises(ValueError, match=r"is a head \(LlamaForCausalLMEagle3\)"):
        load_target(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]  # as the EAGLE repository names it
    save_file(
        {"model.norm.weight": torch.ones(config["hidden_size"])},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a Llama, such as .*not its head"):
        load_target(tmp_path, torch.float32)
