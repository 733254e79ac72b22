"""The training-time test against a naive implementation, slot by slot."""

import torch
import torch.nn.functional as F

from tests.train import small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.ttt import TTTBatch, ttt_loss

STEPS = 4
DECAY = 0.8


def batch_and_head() -> tuple[TTTBatch, Eagle3Head]:
    target, head = small.pair(torch.float64)
    tokens = next(epoch_batches(small.documents(6, longest=14), 6 * 64, 64, seed=0))
    return target.read(tokens, head.draft_token_ids, head.t2d), head


def naive_losses(head: Eagle3Head, batch: TTTBatch) -> torch.Tensor:
    """The definition: every document alone, every slot alone, every key by itself."""
    layer, attention = head.midlayer, head.midlayer.self_attn
    ids = head.draft_token_ids.tolist()
    sums, counts = [0.0] * STEPS, [0] * STEPS

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        half = x.shape[-1] // 2
        inverse = head.config.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        turn = torch.polar(torch.ones(half, dtype=x.dtype), position * inverse)
        rotated = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((rotated.real, rotated.imag), -1)

    for row, tokens in enumerate(batch.tokens_BT.tolist()):
        assistant = batch.assistant_BT[row].tolist()
        length = max(i for i, a in enumerate(assistant) if a) + 1
        scaled = batch.features_BTF[row] * head.feature_scale_F
        hidden = [head.fc(scaled[slot]) for slot in range(length - 1)]
        seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for step in range(STEPS):
            queries = {}
            for slot in range(length - 1 - step):
                embed = head.embedding[tokens[slot + 1 + step]]
                x = torch.cat((layer.input_layernorm(embed), layer.hidden_norm(hidden[slot])))
                heads = (-1, head.config.head_dim)
                key = rotate(attention.k_proj(x).view(heads), slot + step)
                seen[step, slot] = key, attention.v_proj(x).view(heads)
                queries[slot] = rotate(attention.q_proj(x).view(heads), slot + step)
            for slot, query in queries.items():
                visible = [seen[0, earlier] for earlier in range(slot + 1)]
                visible += [seen[later, slot] for later in range(1, step + 1)]
                keys = torch.stack([key for key, _ in visible], 1)
                values = torch.stack([value for _, value in visible], 1)
                group = len(query) // len(keys)
                scores = torch.einsum("nd,njd->nj", query, keys.repeat_interleave(group, 0))
                weights = (scores / query.shape[-1] ** 0.5).softmax(-1)
                mixed = torch.einsum("nj,njd->nd", weights, values.repeat_interleave(group, 0))
                middle = hidden[slot] + attention.o_proj(mixed.flatten())
                hidden[slot] = middle + layer.mlp(layer.post_attention_layernorm(middle))
                predicted = slot + 2 + step
                if predicted >= length or not (assistant[slot + 1] and assistant[predicted]):
                    continue
                if not batch.covered_BT[row, predicted - 1]:
                    continue
                log_q = head.lm_head(head.norm(hidden[slot])).log_softmax(-1)
                p = batch.target_logits_BTV[row, predicted - 1].softmax(-1)
                assert len(p) == len(ids)
                sums[step] = sums[step] - (p * log_q).sum()
                counts[step] += 1
    return torch.stack([total / count for total, count in zip(sums, counts, strict=True)])


def test_losses_and_gradients_equal_the_naive_implementation() -> None:
    batch, head = batch_and_head()
    expected = naive_losses(head, batch)
    weights = DECAY ** torch.arange(STEPS, dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(head.parameters()))
    result = ttt_loss(head, batch, STEPS, DECAY)
    torch.testing.assert_close(result.losses_K, expected.detach().float())
    gradients = torch.autograd.grad(result.loss, list(head.parameters()))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing() -> None:
    batch, head = batch_and_head()
    wider = TTTBatch(
        tokens_BT=F.pad(batch.tokens_BT, (0, 9), value=5),
        assistant_BT=F.pad(batch.assistant_BT, (0, 9)),
        features_BTF=F.pad(batch.features_BTF, (0, 0, 0, 9), value=7.0),
        target_logits_BTV=F.pad(batch.target_logits_BTV, (0, 0, 0, 9)),
        covered_BT=F.pad(batch.covered_BT, (0, 9), value=True),
    )
    first, second = ttt_loss(head, batch, STEPS, DECAY), ttt_loss(head, wider, STEPS, DECAY)
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
    result = ttt_loss(head, batch, STEPS, DECAY)
    # What agrees with such a target at step 0 equals the document, up to uncovered tokens.
    assistant = batch.assistant_BT
    counted = assistant[:, 1:-1] & assistant[:, 2:]
    covered = counted & batch.covered_BT[:, 1:-1]
    agreeing = result.accuracy_K[0] * covered.sum()
    torch.testing.assert_close(agreeing, result.accepted_K[0] * counted.sum())


def test_accepted_share_never_rises_with_the_step() -> None:
    batch, head = batch_and_head()
    accepted = ttt_loss(head, batch, STEPS, DECAY).accepted_K
    assert (accepted[1:] <= accepted[:-1]).all()
