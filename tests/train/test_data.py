"""Documents to batches, shards and the draft vocabulary."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.train import small
from vllm_eagle3.corpus import Document, read_corpus, read_shard, write_shard
from vllm_eagle3.train.data import check_documents, epoch_batches, split_held_out
from vllm_eagle3.train.packing import packed_batches
from vllm_eagle3.train.vocabulary import count_tokens, covering_size, frequent_tokens


def contents(documents: list[Document]) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return sorted((tuple(d.tokens.tolist()), tuple(d.assistant.tolist())) for d in documents)


def test_an_epoch_holds_every_document_once_within_the_budget() -> None:
    documents = small.documents(150)
    seen = []
    for batch in epoch_batches(documents, batch_tokens=512, max_length=64, seed=3):
        assert batch.tokens_BT.numel() <= 512
        for tokens, assistant in zip(batch.tokens_BT, batch.assistant_BT, strict=True):
            length = int(assistant.nonzero().max()) + 1
            seen.append(Document(tokens[:length].numpy(), assistant[:length].numpy()))
    assert contents(seen) == contents(documents)


def test_long_documents_are_cut_and_padding_is_nobodys() -> None:
    documents = [Document(np.arange(200), np.ones(200, bool)), *small.documents(3)]
    batch = next(epoch_batches(documents, batch_tokens=1024, max_length=100, seed=0))
    assert batch.tokens_BT.shape == (4, 100)
    long = int(batch.assistant_BT.sum(1).argmax())
    assert torch.equal(batch.tokens_BT[long], torch.arange(100))
    assert not batch.assistant_BT[torch.arange(4) != long, 60:].any()


@pytest.mark.parametrize("packing", [False, True])
def test_a_document_longer_than_a_batch_is_not_cut_to_it(packing: bool) -> None:
    documents = [Document(np.arange(200), np.ones(200, bool)), *small.documents(9)]
    sizes = {"batch_tokens": 100, "max_length": 1000, "seed": 0}
    if packing:
        batches = packed_batches(documents, num_steps=3, **sizes)
    else:
        batches = epoch_batches(documents, **sizes)
    rows = [row for batch in batches for row in batch.tokens_BT]
    assert any(torch.equal(row[:200], torch.arange(200)) for row in rows)


def test_the_seed_fixes_the_order() -> None:
    documents = small.documents(80)

    def order(seed: int) -> list[list[int]]:
        return [b.tokens_BT.flatten().tolist() for b in epoch_batches(documents, 512, 64, seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_held_out_documents_are_not_trained_on() -> None:
    documents = small.documents(50)
    training, held_out = split_held_out(documents, 0.2, seed=0)
    assert (len(training), len(held_out)) == (40, 10)
    assert contents(training + held_out) == contents(documents)


def test_documents_longer_than_the_targets_context_are_refused_unless_cut() -> None:
    documents = [Document(np.arange(300), np.ones(300, bool)), *small.documents(2)]
    with pytest.raises(ValueError, match=r"300 tokens.*--max-length 256"):
        check_documents(documents, 1000, max_length=2048, max_positions=256)
    check_documents(documents, 1000, max_length=256, max_positions=256)
    with pytest.raises(ValueError, match="written for another target"):
        check_documents(documents, 299, max_length=256, max_positions=256)


def test_shards_read_back_and_a_truncated_one_is_refused(tmp_path: Path) -> None:
    documents = small.documents(12)
    write_shard(tmp_path / "shard-00-00000.safetensors", documents[:7])
    write_shard(tmp_path / "shard-00-00001.safetensors", documents[7:])
    assert contents(read_corpus(tmp_path)) == contents(documents)
    path = tmp_path / "shard-00-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a shard"):
        read_shard(path)


@pytest.mark.parametrize("offsets", [[0, 9, 5, 12], [1, 12], [0, 13], []])
def test_a_shard_whose_arrays_do_not_match_is_named(tmp_path: Path, offsets: list[int]) -> None:
    path = tmp_path / "shard-00-00007.safetensors"
    arrays = {"tokens": np.arange(12, dtype=np.int32), "assistant": np.ones(12, np.uint8)}
    save_file(arrays | {"offsets": np.array(offsets, dtype=np.int64)}, path)
    with pytest.raises(ValueError, match=r"shard-00-00007\.safetensors do not match"):
        read_corpus(tmp_path)


def test_no_shards_names_the_command_that_makes_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vllm-eagle3 data synth"):
        read_corpus(tmp_path)


def test_the_draft_vocabulary_is_what_the_assistant_writes_most() -> None:
    tokens = np.array([5, 5, 5, 9, 9, 7, 7, 7, 7, 3])
    assistant = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1], dtype=bool)
    counts = count_tokens([Document(tokens, assistant)], 12)
    ids, coverage = frequent_tokens(counts, 3, always=[2])
    assert ids.tolist() == [2, 5, 9]
    assert coverage == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="draft_vocab_size=13"):
        frequent_tokens(counts, 13, always=[2])


def test_a_draft_vocabulary_that_covers_nearly_all_of_the_text() -> None:
    counts = np.ones(5000, np.int64)
    counts[1000:2024] = 100_000
    assert covering_size(counts) == 1024
    counts[:512] = 100_000
    assert covering_size(counts) == 2048
    counts[:] = 1
    assert covering_size(counts) == 5000  # 4950 of them would do, in steps of 1024 it takes all


def test_folders_are_read_one_after_another_and_mistakes_are_named(tmp_path: Path) -> None:
    documents = small.documents(12)
    for name, part in (("b", documents[:7]), ("a", documents[7:])):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "shard-00-00000.safetensors", part)
    assert contents(read_corpus(tmp_path / "b", tmp_path / "a")) == contents(documents)
    (tmp_path / "chats.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name, message in (
        ("chats.jsonl", "is a file: .*`vllm-eagle3 data convert`"),
        ("nowhere", "nowhere: no such folder"),
        ("link", "link is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read_corpus(tmp_path / "a", tmp_path / name)
