"""Training-time test: the draft is trained on its own outputs (EAGLE-3, section 3.2).

With T slots and steps k = 0..K-1 (EAGLE-3, arXiv 2503.01840), slot t of step k

    takes      token t+1+k and, as hidden state, the fused target features of t (k = 0) or its
               own output of step k-1 at slot t, gradient included,
    at         rotary position t+k,
    attends to the step-0 keys of slots 0..t and its own keys of steps 1..k,
    predicts   token t+2+k: the target's distribution at position t+1+k, restricted to the
               draft vocabulary and renormalised.

    loss_k = - mean over the n_k counted slots of sum_v p(v) log q(v)
    loss   = sum_k decay^k (n_k / n) loss_k

A slot counts where the tokens t+1 (the root a server would draft from) and t+2+k are the
assistant's and the target's most likely token is in the draft vocabulary. Of n slots, or roots,
the tokens t+1 and t+2 are the assistant's: as n is known of the tokens alone, batches weighted by
their n add up to the loss of all of them as one, on however many processes.

There is no loss on the states: leaving it out is what lets the features be fused of several
layers (section 1). EAGLE-3.1 has the same loss; its head feeds back the normed state.

Shape suffixes: B sequences, T slots, K steps, M counted slots of all steps, H hidden, P = B T
rows, V draft vocabulary.
"""

import torch

from vllm_eagle3.train.features import TTTBatch
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.objectives.cross_entropy import LinearSoftCrossEntropy
from vllm_eagle3.train.objectives.result import LossResult, LossSettings
from vllm_eagle3.train.objectives.slots import accepted_share, slots_of_steps, sums_of_steps
from vllm_eagle3.train.objectives.steps import DraftSteps


def ttt_loss(head: Eagle3Head, batch: TTTBatch, settings: LossSettings) -> LossResult:
    """The loss of this module's docstring on one batch."""
    slots = slots_of_steps(batch.assistant_BT, settings.num_steps, batch.slots)
    tokens_P = batch.tokens_BT.flatten()
    step_M, slot_M = slots.at_M // len(tokens_P), slots.at_M % len(tokens_P)
    rows_M = slot_M + step_M + 1  # the target's rows, in the same flat order
    run_step = DraftSteps(head, batch, settings)
    state_PH = head.fuse(batch.features_BTF.flatten(0, 1))
    outs = []
    for slots_of_step_M in slot_M.split(slots.sizes):
        out_PH = run_step(state_PH)
        state_PH = head.feedback(out_PH)
        # index_select: its backward adds rows, that of [] sorts them first.
        outs.append(out_PH.index_select(0, slots_of_step_M))
    out_MH, matrix_VH = torch.cat(outs), head.lm_head.weight
    del outs  # the copy is what is kept
    covered_M = batch.covered_BT.flatten()[rows_M]
    decayed_M = torch.pow(settings.decay, step_M.to(matrix_VH.dtype))
    # All steps at once, so that there is one gradient of the output matrix and not K.
    loss, losses_M, drafted_M, agree_M = LinearSoftCrossEntropy.apply(
        head.norm(out_MH),
        matrix_VH if torch.is_grad_enabled() else matrix_VH.detach(),
        batch.target_logits_BTV.flatten(0, 1),
        rows_M,
        decayed_M * covered_M / max(1, slots.sizes[0]),
    )
    sums = losses_M * covered_M, agree_M & covered_M, covered_M
    losses_K, agreeing_K, counted_K = sums_of_steps(slots, len(tokens_P), sums)
    right_M = head.draft_token_ids[drafted_M] == tokens_P[rows_M + 1]
    counted_K = counted_K.clamp(min=1)
    return LossResult(
        loss=loss,
        losses_K=(losses_K / counted_K).float(),
        accuracy_K=(agreeing_K / counted_K).float(),
        accepted_K=accepted_share(slots, len(tokens_P), right_M),
    )
