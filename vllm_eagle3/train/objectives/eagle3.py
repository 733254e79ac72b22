"""Training-time test: the draft is trained on its own outputs (EAGLE-3, section 3.2).

With T slots and steps k = 0..K-1 (EAGLE-3, arXiv 2503.01840), slot t of step k

    takes      token t+1+k and, as hidden state, the fused target features of t (k = 0) or its
               own output of step k-1 at slot t, gradient included,
    at         rotary position t+k,
    attends to the step-0 keys of slots 0..t and its own keys of steps 1..k,
    predicts   token t+2+k: the target's distribution at position t+1+k, restricted to the
               draft vocabulary and renormalised.

    loss_k = - mean over counted slots of sum_v p(v) log q(v),   loss = sum_k decay^k loss_k.

A slot counts where the tokens t+1 (the root a server would draft from) and t+2+k are the
assistant's and the target's most likely token is in the draft vocabulary.

There is no loss on the states: leaving it out is what lets the features be fused of several
layers (section 1). EAGLE-3.1 has the same loss; its head feeds back the normed state.

Shape suffixes: B sequences, T slots, K steps, M counted slots, H hidden, P = B T rows,
V draft vocabulary.
"""

import torch

from vllm_eagle3.train.attention import DiagonalAttention
from vllm_eagle3.train.features import TTTBatch
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.objectives.cross_entropy import LinearSoftCrossEntropy
from vllm_eagle3.train.objectives.result import LossResult, LossSettings, weighted
from vllm_eagle3.train.objectives.slots import ChainAcceptance, counted_slots, shift_left


def ttt_loss(head: Eagle3Head, batch: TTTBatch, settings: LossSettings) -> LossResult:
    """The loss of this module's docstring on one batch."""
    num_slots = batch.tokens_BT.shape[1]
    positions_BT = torch.arange(num_slots, device=batch.tokens_BT.device).unsqueeze(0)
    slots = [counted_slots(batch.assistant_BT, step) for step in range(settings.num_steps)]
    target_logits_PV = batch.target_logits_BTV.flatten(0, 1)
    covered_P = batch.covered_BT.flatten()
    chain = ChainAcceptance(batch.tokens_BT, len(slots[0]))
    attend = DiagonalAttention(settings.attention)
    hidden_BTH = head.fuse(batch.features_BTF)
    losses, accuracies, accepted = [], [], []
    for step, slots_M in enumerate(slots):
        tokens_BT = shift_left(batch.tokens_BT, 1 + step)
        out_BTH = head.step(tokens_BT, hidden_BTH, positions_BT + step, attend)
        hidden_BTH = head.feedback(out_BTH)
        rows_M = slots_M + 1 + step  # the target's rows, in the same flat order
        covered_M = covered_P[rows_M]
        loss, drafted_M, agree_M = LinearSoftCrossEntropy.apply(
            # index_select: its backward adds rows, that of [] sorts them first.
            head.norm(out_BTH.flatten(0, 1).index_select(0, slots_M)),
            head.lm_head.weight,
            target_logits_PV,
            rows_M,
            covered_M.to(head.lm_head.weight.dtype) / covered_M.sum().clamp(min=1),
        )
        losses.append(loss)
        accuracies.append((agree_M & covered_M).sum() / covered_M.sum().clamp(min=1))
        accepted.append(chain.share(step, slots_M, head.draft_token_ids[drafted_M]))
    return LossResult(
        loss=weighted(losses, settings.decay),
        losses_K=torch.stack(losses).detach().float(),
        accuracy_K=torch.stack(accuracies).float(),
        accepted_K=torch.stack(accepted).float(),
    )
