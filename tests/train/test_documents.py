"""Packed documents in a Transformers model: each as if it were alone, and no mask is made."""

import pytest
import torch

from tests.train import small
from vllm_eagle3.train.documents import DocumentLayout, attend_within_documents

LENGTHS = ((5, 9, 2), (11, 1, 4))  # of the documents of two rows


def model() -> torch.nn.Module:
    made = small.llama().double()
    attend_within_documents(made)
    return made.model


def layout() -> DocumentLayout:
    rows = [torch.cat([torch.arange(length) for length in row]) for row in LENGTHS]
    return DocumentLayout(torch.stack(rows))


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, small.VOCABULARY, (2, 16), generator=generator)


def test_splitting_puts_each_document_into_a_row_and_joining_undoes_it() -> None:
    x_BNTD = torch.randn(2, 3, 16, 4)
    rows = layout().split(x_BNTD)
    assert rows.shape == (6, 3, 11, 4)
    assert torch.equal(rows[1, :, :9], x_BNTD[0, :, 5:14])
    assert torch.equal(rows[4, :, :1], x_BNTD[1, :, 11:12])
    assert torch.equal(layout().join(rows), x_BNTD)


def test_a_document_in_a_row_of_several_reads_as_it_does_alone() -> None:
    body, tokens_BT, documents = model(), tokens(), layout()
    packed = body(
        tokens_BT, position_ids=documents.positions_BT, documents=documents, use_cache=False
    ).last_hidden_state
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = body(tokens_BT[row : row + 1, part], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[row, part], alone)
            start += length


def test_without_documents_the_model_is_what_it_was() -> None:
    plain = small.llama().double().model
    seen_TT = torch.ones(16, 16, dtype=torch.bool).tril()
    seen_TT[9:, 3] = False
    for settings in ({}, {"attention_mask": seen_TT[None, None].expand(2, 1, -1, -1)}):
        torch.testing.assert_close(
            model()(tokens(), use_cache=False, **settings).last_hidden_state,
            plain(tokens(), use_cache=False, **settings).last_hidden_state,
        )


def test_a_mask_of_padding_is_refused_and_not_passed_over() -> None:
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model()(tokens(), attention_mask=torch.ones(2, 16, dtype=torch.int64), use_cache=False)
