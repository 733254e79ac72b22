"""Conversations answered anew: what is kept, what is left out, and how a rerun goes on."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.tokenizers import FORGETFUL, byte_tokenizer
from tests.engine import tiny
from tests.engine.scripted import END, ScriptedEngine
from tests.full_disk import no_room
from vllm_eagle3.corpus import read_corpus, shard_paths
from vllm_eagle3.engine import shard_writer
from vllm_eagle3.engine.regenerate import RegenerateConfig, regenerate
from vllm_eagle3.engine.replica import Replica


@pytest.fixture
def target(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Put a scripted engine in place of vLLM's; returns it."""

    def install(crash_after: int | None = None) -> ScriptedEngine:
        engine = ScriptedEngine(crash_after)
        monkeypatch.setattr(Replica, "_start_engine", lambda self: setattr(self, "engine", engine))
        return engine

    return install


def write_prompts(path: Path, questions: list[list[str]], more: str = "") -> Path:
    lines = [json.dumps({"turns": turns}) for turns in questions]
    path.write_text("\n".join(lines) + "\n" + more)
    return path


def texts(out: Path) -> list[tuple[str, str]]:
    """Of every document, the whole and what the assistant wrote."""
    decode = byte_tokenizer().decode
    return [(decode(d.tokens), decode(d.tokens[d.assistant])) for d in read_corpus(out)]


def test_every_answer_sees_the_regenerated_history(tmp_path: Path, target: Path, script) -> None:
    prompts = tmp_path / "prompts.jsonl"
    entry = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "an answer that goes"},
            {"from": "human", "value": "Why?"},
        ]
    }
    prompts.write_text(json.dumps(entry))
    engine = script()
    metadata = regenerate([prompts], str(target), tmp_path / "out")
    second = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n1!<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.prompts[1] == second
    assert texts(tmp_path / "out") == [(second + "2!<|im_end|>", "1!<|im_end|>2!<|im_end|>")]
    assert metadata["documents_by_kind"] == {"2 turns": 1}
    assert metadata["assistant_tokens"] == 6


def test_whatever_is_left_out_is_counted_and_named(tmp_path: Path, target: Path, script) -> None:
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"question": "Who wrote the Song of the Moths?"}))
    questions = [["Hi"], ["Hi"], ["So: who wrote the Song of the Moths?"], ["x" * 900], ["Ho"]]
    prompts = write_prompts(tmp_path / "prompts.jsonl", questions, "{}\n")
    script()
    config = RegenerateConfig(max_model_len=512, exclude=(evaluation,))
    metadata = regenerate([prompts], str(target), tmp_path / "out", config)
    assert metadata["documents"] == 2
    assert metadata["dropped"] == {
        "repeated prompt": 1,
        "nearly an evaluation prompt": 1,
        "no room for an answer within max_model_len": 1,
    }
    assert [line.split(": ")[0] for line in metadata["dropped_lines"]] == [
        f"{prompts}, line {number}" for number in (2, 3, 4)
    ]
    assert metadata["unreadable"] == 1
    assert metadata["unreadable_lines"][0].startswith(f"{prompts}, line 6: needs a key")
    assert metadata["unanswered"] == 0


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, target: Path, script) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [[f"Q{i}"] for i in range(9)])
    config = RegenerateConfig(shard_documents=2)
    arguments = [prompts], str(target), tmp_path / "out", config
    script(crash_after=5)
    with pytest.raises(KeyboardInterrupt):
        regenerate(*arguments)
    assert len(texts(tmp_path / "out")) == 5
    engine = script()
    metadata = regenerate(*arguments)
    assert len(engine.prompts) == 4
    assert (metadata["documents"], metadata["unanswered"]) == (9, 0)
    assert len(set(texts(tmp_path / "out"))) == 9
    assert regenerate(*arguments)["documents"] == 9
    assert len(engine.prompts) == 4


def test_a_damaged_shard_is_named_and_only_its_prompts_are_asked_again(
    tmp_path: Path, target: Path, script
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [[f"Q{i}"] for i in range(6)])
    arguments = [prompts], str(target), tmp_path / "out", RegenerateConfig(shard_documents=2)
    script()
    regenerate(*arguments)
    before = set(texts(tmp_path / "out"))
    damaged = next(shard_paths(tmp_path / "out"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{damaged.name}.*delete it"):
        regenerate(*arguments)
    damaged.unlink()
    engine = script()
    assert regenerate(*arguments)["documents"] == 6
    assert len(engine.prompts) == 2
    assert set(texts(tmp_path / "out")) == before


def test_a_full_disk_is_said_clearly_and_keeps_what_is_there(
    tmp_path: Path, target: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [[f"Q{i}"] for i in range(6)])
    arguments = [prompts], str(target), tmp_path / "out", RegenerateConfig(shard_documents=2)
    write, room = shard_writer.write_shard, [1, 1]

    def write_while_there_is_room(path: Path, *arguments: Any) -> None:
        with nullcontext() if room else no_room():
            write(path, *arguments)
        room.pop()

    monkeypatch.setattr(shard_writer, "write_shard", write_while_there_is_room)
    script()
    with pytest.raises(
        ValueError, match=r"shard-\S+ could not be written .*too large.*goes on from them"
    ):
        regenerate(*arguments)
    assert len(texts(tmp_path / "out")) == 4
    assert not list((tmp_path / "out").glob(".shard*"))
    monkeypatch.setattr(shard_writer, "write_shard", write)
    assert regenerate(*arguments)["documents"] == 6


def test_answers_that_are_cut_end_their_conversation(tmp_path: Path, target: Path, script) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [["Hi", "Why?"]])
    script()
    config = RegenerateConfig(max_answer_tokens=2)
    metadata = regenerate([prompts], str(target), tmp_path / "out", config)
    assert metadata["ends"] == {"answer cut at its longest": 1}
    assert texts(tmp_path / "out")[0][1] == "1!"


def test_a_folder_of_other_data_is_refused(tmp_path: Path, target: Path, script) -> None:
    script()
    one = write_prompts(tmp_path / "one.jsonl", [["Hi"]])
    regenerate([one], str(target), tmp_path / "out")
    other = write_prompts(tmp_path / "other.jsonl", [["Ho"]])
    with pytest.raises(ValueError, match="another setting of prompts"):
        regenerate([other], str(target), tmp_path / "out")
    (tmp_path / "out" / "regenerate.json").unlink()
    with pytest.raises(ValueError, match="holds other training data"):
        regenerate([one], str(target), tmp_path / "out")


def test_a_template_that_forgets_serves_single_turns_only(tmp_path: Path, script) -> None:
    byte_tokenizer(FORGETFUL).save_pretrained(tmp_path / "target")
    prompts = write_prompts(tmp_path / "prompts.jsonl", [["Hi", "Why?"]])
    script()
    with pytest.raises(ValueError, match="--max-turns 1"):
        regenerate([prompts], str(tmp_path / "target"), tmp_path / "out")
    config = RegenerateConfig(max_turns=1)
    metadata = regenerate([prompts], str(tmp_path / "target"), tmp_path / "single", config)
    assert metadata["documents_by_kind"] == {"1 turn": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_turns": 0}, "max_turns=0"), ({"top_p": 0.0}, "top_p=0"), ({"replicas": 0}, "replicas")],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegenerateConfig(**settings)


def often_ending(target: Path) -> None:
    """Make the end of a turn likely, which random weights leave to chance."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"][END] *= 4
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.ends_engines
def test_through_vllm_the_answers_are_the_targets_own(tmp_path: Path) -> None:
    target = tiny.write_target(tmp_path / "target")
    byte_tokenizer(vocab_size=tiny.VOCABULARY).save_pretrained(target)
    often_ending(target)
    prompts = write_prompts(tmp_path / "prompts.jsonl", [[f"Q{i}", "And?"] for i in range(8)])
    engine_args = {"enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 1 << 27}
    config = RegenerateConfig(
        max_model_len=256,
        max_answer_tokens=48,
        max_num_seqs=8,
        answer_temperatures={0.0: 1.0},
        engine_args=engine_args,
    )
    metadata = regenerate([prompts], str(target), tmp_path / "out", config)
    assert (metadata["documents"], metadata["unanswered"]) == (8, 0)
    assert metadata["documents_by_kind"].get("2 turns")
    assert greedy_share(target, tmp_path / "out") > 0.99


def greedy_share(target: Path, out: Path) -> float:
    """How many of the assistant's tokens transformers' own greedy choice agrees with."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target).eval()
    agree = []
    for document in read_corpus(out):
        with torch.no_grad():
            logits = model(torch.from_numpy(document.tokens.astype(np.int64))[None]).logits[0]
        chosen = logits[:-1].argmax(-1).numpy()
        mine = document.assistant[1:]
        agree.append(chosen[mine] == document.tokens[1:][mine])
    return float(np.concatenate(agree).mean())
