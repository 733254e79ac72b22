"""The analysis of a corpus: its figures are right, and it tells alike from unlike traffic."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.tokenizers import byte_tokenizer
from vllm_eagle3 import cli
from vllm_eagle3.corpus import Document, write_shard
from vllm_eagle3.data.analyse import analyse
from vllm_eagle3.data.formats import Chat
from vllm_eagle3.data.masks import ChatTemplate
from vllm_eagle3.data.statistics import NgramIndex, coverage, quantiles, scripts, turns_of

WORDS = {
    "farm": ["cow", "barn", "hay", "milk", "goat", "plough", "field", "wheat"],
    "code": ["def", "return", "import", "lambda", "class", "yield", "assert", "self"],
    "море": ["море", "волна", "прилив", "лодка", "парус", "ветер", "якорь", "рыба"],
}


def sentence(topic: str, seed: int, length: int = 12) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS[topic], length))


def chats(topics: Sequence[str], count: int, seed: int = 0) -> list[Chat]:
    return [
        Chat(
            None,
            (sentence(topic, seed + 2 * i),),
            (sentence(topic, seed + 2 * i + 1),),
        )
        for topic in topics
        for i in range(count)
    ]


def write_corpus(path: Path, given: Sequence[Chat]) -> Path:
    template = ChatTemplate(byte_tokenizer())
    path.mkdir()
    order = np.random.default_rng(0).permutation(len(given))
    documents = [template.document(given[i]) for i in order]
    write_shard(path / "shard-00-00000.safetensors", documents)
    return path


def write_log(path: Path, given: Sequence[Chat], more: str = "") -> Path:
    lines = [json.dumps({"messages": chat.messages(chat.answers)}) for chat in given]
    path.write_text("\n".join(lines) + "\n" + more)
    return path


def test_turns_are_the_runs_of_the_mask() -> None:
    document = Document(np.arange(9), np.array([0, 0, 1, 1, 1, 0, 1, 1, 0], bool))
    assert [t.tolist() for t in turns_of(document, assistant=True)] == [[2, 3, 4], [6, 7]]
    assert [t.tolist() for t in turns_of(document, assistant=False)] == [[0, 1], [5], [8]]
    mine = Document(np.arange(3), np.array([1, 1, 0], bool))
    assert [t.tolist() for t in turns_of(mine, assistant=True)] == [[0, 1]]
    assert [t.tolist() for t in turns_of(mine, assistant=False)] == [[2]]


def test_a_vocabulary_covers_what_its_most_frequent_tokens_do() -> None:
    counted = [np.array([7, 7, 7, 5, 5, 3])]
    assert coverage(counted, counted, [1, 2, 3, 9]) == pytest.approx([3 / 6, 5 / 6, 1, 1])
    # Tokens that were never counted are in no vocabulary, however large.
    assert coverage(counted, [np.array([7, 4, 900])], [1, 9]) == pytest.approx([1 / 3, 1 / 3])


def test_ngrams_stay_within_a_sequence_and_count_as_often_as_they_occur() -> None:
    index = NgramIndex([np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8])])
    assert index.share_of([np.array([1, 2, 3, 4])]) == 1
    assert index.share_of([np.array([4, 5, 6, 7])]) == 0
    assert index.share_of([np.array([2, 3, 4, 5, 2, 3, 4, 5])]) == pytest.approx(2 / 5)
    assert index.share_of([np.array([1, 2, 3])]) == 0
    assert index.share_of([np.array([4, 3, 2, 1])]) == 0


def test_what_every_document_holds_is_not_counted() -> None:
    rng = np.random.default_rng(0)
    header = np.arange(100, 110)
    documents = [np.concatenate([header, rng.integers(0, 90, 20)]) for _ in range(40)]
    assert NgramIndex(documents).share_of([header]) == 0
    assert NgramIndex(documents[:5]).share_of([header]) == 1  # too few to tell


def test_quantiles_and_scripts() -> None:
    assert quantiles([1, 2, 3, 4, 10]) | {"90%": 0, "99%": 0, "10%": 0} == {
        "mean": 4.0, "10%": 0, "median": 3.0, "90%": 0, "99%": 0, "largest": 10.0,
    }  # fmt: skip
    assert quantiles([])["largest"] == 0
    assert scripts(["ab, 12", "да"]) == {"Latin": 0.5, "Cyrillic": 0.5}


def test_clusters_part_topics_and_place_the_log_among_them(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data", [*chats(["farm", "code"], 30), *chats(["море"], 40)])
    log = write_log(tmp_path / "log.jsonl", chats(["море"], 10, seed=999))
    found = analyse(data, tokenizer=byte_tokenizer(), log=[log], clusters=3)["clusters"]
    assert sorted(cluster["documents"] for cluster in found) == [30, 30, 40]
    assert [cluster["log_share"] for cluster in found] == [1, 0, 0]


@pytest.mark.parametrize(("topic", "alike"), [("farm", True), ("code", False)])
def test_traffic_is_told_from_other_traffic(
    tmp_path: Path, capsys: pytest.CaptureFixture, topic: str, alike: bool
) -> None:
    data = write_corpus(tmp_path / "data", chats(["farm"], 60))
    log = write_log(tmp_path / "log.jsonl", chats([topic], 20, seed=999), "{\n")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    arguments = [str(data), "--target", str(tmp_path / "target"), "--log", str(log)]
    assert cli.main(["data", "analyse", *arguments]) == 0
    shown = capsys.readouterr().out
    assert ("about as much as itself" in shown) is alike
    assert "1 unreadable lines" in shown
    written = json.loads((data / "analysis.json").read_text())
    assert written["documents"] == 60
    assert written["turns"] == {"1": 60}
    assert written["log"]["conversations"] == 20
    assert (written["log"]["4grams_in_data"] > 0.8) is alike
    assert written["scripts"] == {"Latin": 1.0}


def test_a_few_documents_are_no_yardstick(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_corpus(tmp_path / "data", chats(["farm"], 9))
    log = write_log(tmp_path / "log.jsonl", chats(["море"], 20))
    byte_tokenizer().save_pretrained(tmp_path / "target")
    arguments = [str(data), "--target", str(tmp_path / "target"), "--log", str(log)]
    assert cli.main(["data", "analyse", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "too few documents to tell" in shown
    assert "resembles this log little" not in shown
    assert "as much as itself" not in shown


def test_without_a_tokenizer_and_with_few_documents(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data", chats(["farm"], 2))
    result = analyse(data)
    assert sum(cluster["documents"] for cluster in result["clusters"]) == 2
    assert result["vocabulary"][0]["data"] == 1
    assert result["vocabulary"][0]["held_out"] is None
    assert "log" not in result


def test_mistakes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="holds no training data"):
        analyse(tmp_path)
    with pytest.raises(ValueError, match="clusters=0"):
        analyse(tmp_path, clusters=0)
    assert cli.main(["data", "analyse", str(tmp_path), "--log", "log.jsonl"]) == 2
    assert "--log needs --target" in capsys.readouterr().err
    data = write_corpus(tmp_path / "data", chats(["farm"], 2))
    shard = next(data.iterdir())
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=shard.name):
        analyse(data)


def test_several_folders_are_analysed_as_one_and_their_place_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        write_corpus(tmp_path / name, chats(["farm"], 4, seed=seed))
    assert cli.main(["data", "analyse", "a", "b"]) == 2
    assert cli.main(["data", "analyse", "a", "--out", "nowhere/x.json"]) == 2
    assert cli.main(["data", "analyse", "a", "--out", "b"]) == 2
    shown = capsys.readouterr()
    assert "documents" not in shown.out  # before the work
    for message in ("give --out", "no such folder as nowhere", "--out b is a folder"):
        assert message in shown.err
    assert cli.main(["data", "analyse", "a", "b", "--out", "both.json"]) == 0
    assert json.loads(Path("both.json").read_text())["documents"] == 8


def test_a_draft_vocabulary_is_at_most_the_targets(tmp_path: Path) -> None:
    tokens = np.array([0, 5, 4999, 5, 7])
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "shard-0.safetensors", [Document(tokens, tokens > 0)] * 2)

    def sizes(tokenizer: object = None) -> list[int]:
        return [
            row["size"] for row in analyse(tmp_path / "data", tokenizer=tokenizer)["vocabulary"]
        ]

    assert sizes() == [2048, 4096]
    assert sizes(byte_tokenizer(vocab_size=9000)) == [2048, 4096, 8192]
