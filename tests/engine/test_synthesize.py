"""Conversations that a target writes itself: what is kept, dropped, and kept over restarts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.tokenizers import byte_tokenizer
from tests.engine.scripted import ScriptedEngine
from vllm_eagle3 import cli
from vllm_eagle3.corpus import Document, read_corpus
from vllm_eagle3.engine import replica
from vllm_eagle3.engine.conversation import Kind
from vllm_eagle3.engine.replica import Replica
from vllm_eagle3.engine.synthesize import SynthConfig, synthesize

SETTINGS = {
    "max_num_seqs": 1,
    "second_turns": 0.0,
    "kinds": (Kind("chat"),),
    "max_user_tokens": 256,
    "max_model_len": 2048,
}
HUMAN_EVAL = Path(__file__).parents[2] / "vllm_eagle3" / "bench" / "data" / "humaneval.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> str:
    byte_tokenizer().save_pretrained(tmp_path / "target")
    return str(tmp_path / "target")


def install(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
    monkeypatch.setattr(Replica, "_start_engine", lambda self: setattr(self, "engine", engine))


def questions(count: int) -> tuple[str, ...]:
    return tuple(f"Tell me about {number}." for number in range(count))


def test_repetitions_are_dropped_and_counted(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = tmp_path / "mine.jsonl"
    evaluation.write_text(json.dumps({"question": "Who are you?"}))
    written = ("Hi there.", "who are you", "Hi there.", "Hello you.")
    install(monkeypatch, ScriptedEngine(questions=written))
    given = tmp_path / "given.jsonl"
    given.write_text(HUMAN_EVAL.read_text().splitlines()[0] + '\n{"prompt": "How tall is it?"}\n')
    config = SynthConfig(
        tokens=95,  # three documents
        prompts=(given,),
        prompts_share=1.0,
        exclude=(evaluation,),
        **SETTINGS | {"max_user_tokens": 16},
    )
    metadata = synthesize(target, tmp_path / "out", config)
    texts = [byte_tokenizer().decode(d.tokens) for d in read_corpus(tmp_path / "out")]
    assert "How tall is it?" in texts[0]
    assert not any("def " in text or "who are you" in text for text in texts)
    assert metadata["dropped"]["equal to an evaluation prompt"] == 2
    assert metadata["dropped"]["duplicate"] == 1
    assert metadata["documents_by_kind"] == {"given questions": 1, "chat": 2}


def test_an_interrupted_synthesis_goes_on(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SynthConfig(tokens=400, **SETTINGS)
    install(monkeypatch, ScriptedEngine(crash_after=7, questions=questions(50)))
    with pytest.raises(KeyboardInterrupt):
        synthesize(target, tmp_path / "out", config)
    kept = [d.tokens.tolist() for d in read_corpus(tmp_path / "out")]
    assert len(kept) == 3
    install(monkeypatch, ScriptedEngine(questions=questions(50)[3:]))
    metadata = synthesize(target, tmp_path / "out", config)
    assert [d.tokens.tolist() for d in read_corpus(tmp_path / "out")][:3] == kept
    assert metadata["tokens"] >= 400
    assert metadata["documents"] == metadata["documents_by_kind"]["chat"]


def test_an_interruption_while_a_shard_is_written_keeps_its_documents_once(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, interruptions = replica.add_shard, [KeyboardInterrupt]

    def write_and_be_interrupted(path: Path, documents: list[Document]) -> None:
        write(path, documents)
        if interruptions:
            raise interruptions.pop()

    monkeypatch.setattr(replica, "add_shard", write_and_be_interrupted)
    install(monkeypatch, ScriptedEngine(questions=questions(50)))
    with pytest.raises(KeyboardInterrupt):
        synthesize(target, tmp_path / "out", SynthConfig(tokens=400, shard_documents=3, **SETTINGS))
    documents = [d.tokens.tobytes() for d in read_corpus(tmp_path / "out")]
    assert len(set(documents)) == len(documents) == 3
    status = json.loads((tmp_path / "out" / "replica-00.json").read_text())
    assert status["documents_by_kind"] == {"chat": 3}


def test_a_damaged_shard_is_named_and_its_name_is_not_taken_again(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SynthConfig(tokens=200, shard_documents=2, **SETTINGS)
    install(monkeypatch, ScriptedEngine(questions=questions(50)))
    synthesize(target, tmp_path / "out", config)
    first, second, *_ = sorted((tmp_path / "out").glob("shard-*"))
    whole = second.read_bytes()
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(ValueError, match=first.name):
        synthesize(target, tmp_path / "out", config)
    first.unlink()
    install(monkeypatch, ScriptedEngine(questions=questions(90)[40:]))
    assert synthesize(target, tmp_path / "out", config)["tokens"] >= 200
    assert second.read_bytes() == whole


def test_a_folder_takes_shards_of_one_target_and_one_set_of_settings(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "out", SynthConfig(tokens=100, **SETTINGS)
    install(monkeypatch, ScriptedEngine(questions=questions(50)))
    synthesize(target, out, config)
    kept = {path.name: path.read_bytes() for path in out.glob("shard-*")}
    given = tmp_path / "given.jsonl"
    given.write_text('{"prompt": "How tall is it?"}\n')
    changes = {
        "replicas": {"replicas": 2},
        "kinds": {"kinds": (Kind("chat", "You are brief."),)},
        "prompts": {"prompts": (given,)},
    }
    for name, change in changes.items():
        with pytest.raises(ValueError, match=f"another setting of {name} .*another folder"):
            synthesize(target, out, replace(config, **change))
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another setting of target"):
        synthesize(str(tmp_path / "other"), out, config)
    assert {path.name: path.read_bytes() for path in out.glob("shard-*")} == kept
    (out / "synthesis.json").unlink()
    with pytest.raises(ValueError, match="holds other training data"):
        synthesize(target, out, config)


def test_a_run_that_wrote_nothing_leaves_the_folder_to_another(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(replica: Replica) -> None:
        raise RuntimeError("no engine")

    out, config = tmp_path / "out", SynthConfig(tokens=100, **SETTINGS)
    monkeypatch.setattr(Replica, "_start_engine", fail)
    with pytest.raises(RuntimeError, match="no engine"):
        synthesize(target, out, config)
    install(monkeypatch, ScriptedEngine(questions=questions(50)))
    (out / "replica-07.json").write_text('{"tokens": 1000000}')  # it had more replicas
    other = replace(config, kinds=(Kind("chat", "You are brief."),))
    assert 100 <= synthesize(target, out, other)["tokens"] < 1000
    with pytest.raises(ValueError, match="another setting of kinds"):
        synthesize(target, out, config)


def test_long_turns_are_written_whole(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = " ".join(f"Then {number}." for number in range(20))  # pieces of 128 tokens
    install(monkeypatch, ScriptedEngine(questions=(question, *questions(50))))
    synthesize(target, tmp_path / "out", SynthConfig(tokens=400, **SETTINGS))
    texts = [byte_tokenizer().decode(d.tokens) for d in read_corpus(tmp_path / "out")]
    assert any(question in text for text in texts)


@pytest.mark.parametrize("command", [["synth"], ["regenerate", "prompts.jsonl"]])
def test_a_target_that_is_not_there_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "How tall is it?"}\n')
    assert cli.main(["data", *command, "--target", "./nope", "--out", "out"]) == 2
    assert capsys.readouterr().err == "vllm-eagle3: --target ./nope: no such folder\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--kinds", "nope.json"), "nope.json is no list of kinds"),
        (("--kinds", "bad.json"), "unexpected keyword argument 'colour'"),
        (("--engine-args", "{bad"), "{bad is no JSON object: write it as in"),
        (("--engine-args", "[1]"), "[1] is no JSON object: write it as in"),
        (("--answer-temperatures", "0.7"), "0.7: give temperatures with their weights, as in 0="),
    ],
)
def test_options_of_another_form_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('[{"name": "chat", "colour": "red"}]')
    with pytest.raises(SystemExit):
        cli.main(["data", "synth", "--target", "target", "--out", "out", *option])
    assert f"argument {option[0]}: " in (shown := capsys.readouterr().err)
    assert message in shown


def test_a_file_is_no_folder_for_shards(tmp_path: Path, target: str) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        synthesize(target, tmp_path / "out")
