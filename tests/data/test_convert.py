"""Answered conversations become shards whose mask is the answers; the rest is counted."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.tokenizers import FORGETFUL, NO_END, byte_tokenizer
from tests.full_disk import no_room
from vllm_eagle3 import cli
from vllm_eagle3.corpus import Document, read_corpus, write_shard
from vllm_eagle3.data.convert import ConvertConfig, convert
from vllm_eagle3.data.formats import Message

TWO_TURNS = [("user", "Hi"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So.")]


def messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in turns]


def write(path: Path, *chats: list[tuple[str, str]], more: str = "") -> Path:
    lines = [json.dumps({"messages": messages(chat)}) for chat in chats]
    path.write_text("\n".join(lines) + "\n" + more)
    return path


def answers(document: Document) -> str:
    return byte_tokenizer().decode(document.tokens[document.assistant])


def test_the_answers_are_kept_and_the_command_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "target")
    evaluation = tmp_path / "mine.jsonl"
    evaluation.write_text(json.dumps({"question": "Who wrote the Song of the Moths?"}))
    asked = [("user", "Who wrote the Song of the Moths?"), ("assistant", "Nobody.")]
    given = write(
        tmp_path / "log.jsonl", TWO_TURNS, TWO_TURNS, asked, [("user", "And?")], more="{\n"
    )
    arguments = ["--target", str(tmp_path / "target"), "--exclude", str(evaluation)]
    assert (
        cli.main(["data", "convert", str(given), "--out", str(tmp_path / "out"), *arguments]) == 0
    )
    (document,) = read_corpus(tmp_path / "out")
    assert answers(document) == "Hello.<|im_end|>So.<|im_end|>"
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["dropped"] == {
        "repeated conversation": 1,
        "equal to an evaluation prompt": 1,
        "no answer": 1,
    }
    assert metadata["dropped_lines"][0] == f"{given}, line 2: repeated conversation"
    assert (metadata["documents"], metadata["unreadable"]) == (1, 1)
    assert metadata["assistant_tokens"] == document.assistant.sum()
    shown = capsys.readouterr().err
    assert "1 conversations" in shown
    assert f"left out: {given}, line 5: " in shown


def test_shards_hold_as_many_as_they_are_to_and_later_turns_are_cut(tmp_path: Path) -> None:
    given = write(tmp_path / "log.jsonl", *([("user", f"Q{i}"), *TWO_TURNS[1:]] for i in range(5)))
    config = ConvertConfig(max_turns=1, shard_documents=2)
    # One turn asks nothing of how a template renders a history.
    metadata = convert([given], byte_tokenizer(FORGETFUL), tmp_path / "out", config)
    assert metadata["documents"] == 5
    names = sorted(path.name for path in (tmp_path / "out").glob("shard-*"))
    assert names == [f"shard-00-{number:05d}.safetensors" for number in range(3)]
    assert {answers(d) for d in read_corpus(tmp_path / "out")} == {"Hello.<|im_end|>"}
    with pytest.raises(ValueError, match=r"removes reasoning.*--max-turns 1"):
        convert([given], byte_tokenizer(FORGETFUL), tmp_path / "other")


def test_a_target_without_a_chat_template_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer(None).save_pretrained(tmp_path / "target")
    given = write(tmp_path / "log.jsonl", TWO_TURNS)
    arguments = ["--target", str(tmp_path / "target"), "--out", str(tmp_path / "out")]
    assert cli.main(["data", "convert", str(given), *arguments]) == 2
    assert "has no chat template: use an instruction-tuned target" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_is_not_overwritten_and_a_full_disk_leaves_no_half(tmp_path: Path) -> None:
    given = write(tmp_path / "log.jsonl", TWO_TURNS)
    out = tmp_path / "out"
    with no_room(), pytest.raises(ValueError, match=r"shard-00-00000\.safetensors could not be"):
        convert([given], byte_tokenizer(), out)
    assert list(out.iterdir()) == []
    write_shard(out / "shard-00-00000.safetensors", [Document(np.arange(3), np.arange(3) > 1)])
    with pytest.raises(ValueError, match="holds training data"):
        convert([given], byte_tokenizer(), out)


def test_nothing_to_use_says_why(tmp_path: Path) -> None:
    given = write(tmp_path / "log.jsonl", [("user", "And?")])
    with pytest.raises(ValueError, match=r"no conversation can be used \(.*line 1: no answer\)"):
        convert([given], byte_tokenizer(), tmp_path / "out")


def test_an_empty_answer_that_nothing_ends_is_left_out(tmp_path: Path) -> None:
    """It would be a document of no tokens, which no training reads."""
    empty, whole = [("user", "Hi"), ("assistant", "")], TWO_TURNS[:2]
    given = write(tmp_path / "log.jsonl", empty, whole)
    metadata = convert([given], byte_tokenizer(NO_END), tmp_path / "out")
    assert metadata["dropped"] == {"all answers are empty": 1}
    assert [answers(document) for document in read_corpus(tmp_path / "out")] == ["Hello."]


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "target")
    given = write(tmp_path / "log.jsonl", TWO_TURNS)
    for conversations, out, message in (
        (tmp_path, tmp_path / "out", f"{tmp_path} is a folder: give files of JSON lines"),
        (given, given, f"--out {given} is a file: give a folder"),
    ):
        command = ["data", "convert", str(conversations), "--out", str(out)]
        assert cli.main([*command, "--target", str(tmp_path / "target")]) == 2
        assert message in capsys.readouterr().err
    assert given.is_file()
