"""Packed documents give the losses and gradients that the same documents give by themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train import small
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.objectives import OBJECTIVES
from vllm_eagle3.train.packing import packed_batches


def documents() -> list[Document]:
    """Some begin with the assistant's words, one is longer than a row."""
    made = small.documents(14, longest=30)
    made += [Document(d.tokens, np.ones(len(d.tokens), bool)) for d in made[:4]]
    long = (np.arange(90) * 7) % small.VOCABULARY
    return [*made, Document(long, np.arange(90) > 20)]


@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_padded_documents(name: str, attention: str) -> None:
    objective = OBJECTIVES[name]
    steps = min(3, objective.settings.num_steps)
    settings = replace(objective.settings, feature_noise=0.0, num_steps=steps, attention=attention)
    model = small.llama().double()
    config = objective.head_config(model.config, 64)
    target = Target(model, config.aux_layer_ids)
    torch.manual_seed(0)
    ids = torch.arange(0, small.VOCABULARY)[: config.draft_vocab_size]
    head = objective.make_head(config, target, ids).double()
    (padded,) = epoch_batches(documents(), 64 * 64, 64, seed=0)
    (packed,) = packed_batches(documents(), 64 * 64, 64, steps, seed=0)
    assert packed.tokens_BT.numel() < 0.6 * padded.tokens_BT.numel()

    def measure(batch):
        result = objective.loss(head, objective.read(target, batch, head), settings)
        used = [w for w in head.parameters() if w.requires_grad]
        return result, torch.autograd.grad(result.loss, used)

    (one, gradients), (other, expected) = measure(packed), measure(padded)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.losses_K, other.losses_K)
    assert torch.equal(one.accepted_K, other.accepted_K)
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-10)


def test_an_epoch_holds_every_document_once_apart_from_the_others() -> None:
    given = small.documents(150)
    found = []
    for batch in packed_batches(given, 512, 128, num_steps=7, seed=3):
        assert batch.tokens_BT.shape[1] == 128
        assert batch.tokens_BT.numel() <= 512
        for tokens, assistant, positions in zip(
            batch.tokens_BT, batch.assistant_BT, batch.positions_BT, strict=True
        ):
            starts = (positions == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                assert positions[start:end].tolist() == list(range(end - start))
                if not assistant[start:end].any():
                    continue  # what is left at the end
                last = int(assistant[start:end].nonzero().max()) + 1 + start
                found.append(tuple(tokens[start:last].tolist()))
                assert not assistant[last : last + 8].any()
    assert sorted(found) == sorted(tuple(d.tokens.tolist()) for d in given)


def test_the_seed_fixes_the_order_and_rows_are_full() -> None:
    given = small.documents(400)

    def order(seed: int) -> list[list[int]]:
        return [b.tokens_BT.flatten().tolist() for b in packed_batches(given, 1024, 256, 3, seed)]

    assert order(1) == order(1) != order(2)
    slots = sum(map(len, order(1)))
    assert sum(len(d.tokens) for d in given) > 0.85 * slots


def test_all_batches_are_full_but_one_of_each_class_of_lengths() -> None:
    """Documents of more than 64, more than 256 and the shorter ones, over several windows."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(1024, rng.lognormal(4.4, 1, 4000).astype(int) + 4)
    given = [Document(np.ones(n, np.int32), np.arange(n) > 2) for n in lengths]
    sizes = [b.tokens_BT.numel() for b in packed_batches(given, 4096, 1024, 7, seed=0)]
    assert len(sizes) > 3 * 32
    assert sum(size < 4096 for size in sizes) <= 3
    padded = [b.tokens_BT.numel() for b in epoch_batches(given, 4096, 1024, seed=0)]
    assert sum(size < 2048 for size in padded) <= 1
