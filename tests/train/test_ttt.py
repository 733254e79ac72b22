"""What the training-time test counts, and what it is aligned with."""

import torch
import torch.nn.functional as F

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.features import TTTBatch
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.objectives import LossSettings
from vllm_eagle3.train.objectives.eagle3 import ttt_loss

SETTINGS = LossSettings(num_steps=4)


def batch_and_head() -> tuple[TTTBatch, Eagle3Head]:
    target, head = small.pair(torch.float64)
    tokens = next(epoch_batches(small.documents(6, longest=14), 6 * 64, 64, seed=0))
    return target.read(tokens, head.draft_token_ids, head.t2d), head


def test_padding_changes_nothing() -> None:
    batch, head = batch_and_head()
    wider = TTTBatch(
        tokens_BT=F.pad(batch.tokens_BT, (0, 9), value=5),
        assistant_BT=F.pad(batch.assistant_BT, (0, 9)),
        features_BTF=F.pad(batch.features_BTF, (0, 0, 0, 9), value=7.0),
        target_logits_BTV=F.pad(batch.target_logits_BTV, (0, 0, 0, 9)),
        covered_BT=F.pad(batch.covered_BT, (0, 9), value=True),
    )
    first, second = ttt_loss(head, batch, SETTINGS), ttt_loss(head, wider, SETTINGS)
    torch.testing.assert_close(first.loss, second.loss)
    assert torch.equal(first.accepted_K, second.accepted_K)


def test_target_rows_and_tokens_are_aligned() -> None:
    """A target that is certain of the document's next token: p is one-hot at that token."""
    batch, head = batch_and_head()
    next_BT = batch.tokens_BT.roll(-1, 1)
    columns = torch.full((small.VOCABULARY,), -1)
    columns[head.draft_token_ids] = torch.arange(len(head.draft_token_ids))
    batch.covered_BT = columns[next_BT] >= 0
    batch.target_logits_BTV = (
        1e3 * F.one_hot(columns[next_BT].clamp(min=0), len(head.draft_token_ids)).double()
    )
    result = ttt_loss(head, batch, SETTINGS)
    # What agrees with such a target at step 0 equals the document, up to uncovered tokens.
    assistant = batch.assistant_BT
    counted = assistant[:, 1:-1] & assistant[:, 2:]
    covered = counted & batch.covered_BT[:, 1:-1]
    agreeing = result.accuracy_K[0] * covered.sum()
    torch.testing.assert_close(agreeing, result.accepted_K[0] * counted.sum())


def test_accepted_share_never_rises_with_the_step() -> None:
    batch, head = batch_and_head()
    accepted = ttt_loss(head, batch, SETTINGS).accepted_K
    assert (accepted[1:] <= accepted[:-1]).all()
