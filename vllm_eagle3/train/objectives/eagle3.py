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

Shape suffixes: B sequences, T slots, K steps, M counted slots, H hidden, P = B T rows,
V draft vocabulary.
"""

import torch

from vllm_eagle3.train.features import TTTBatch
from vllm_eagle3.train.model import Eagle3Head
from vllm_eagle3.train.objectives.cross_entropy import LinearSoftCrossEntropy
from vllm_eagle3.train.objectives.result import LossResult, LossSettings
from vllm_eagle3.train.objectives.slots import ChainAcceptance, slots_of_steps
from vllm_eagle3.train.objectives.steps import DraftSteps


def ttt_loss(head: Eagle3Head, batch: TTTBatch, settings: LossSettings) -> LossResult:
    """The loss of this module's docstring on one batch."""
    slots = slots_of_steps(batch.assistant_BT, settings.num_steps, batch.slots)
    covered_P = batch.covered_BT.flatten()
    run_step = DraftSteps(head, batch, settings)
    state_BTH = head.fuse(batch.features_BTF)
    outs, rows, covered, weights = [], [], [], []
    num_roots = max(1, len(slots[0]))
    for step, slots_M in enumerate(slots):
        out_BTH = run_step(state_BTH)
        state_BTH = head.feedback(out_BTH)
        # index_select: its backward adds rows, that of [] sorts them first.
        outs.append(out_BTH.flatten(0, 1).index_select(0, slots_M))
        rows.append(slots_M + 1 + step)  # the target's rows, in the same flat order
        covered.append(covered_P[rows[-1]])
        counted_M = covered[-1].to(head.lm_head.weight.dtype)
        weights.append(settings.decay**step / num_roots * counted_M)
    matrix_VH = head.lm_head.weight
    # All steps at once, so that there is one gradient of the output matrix and not K.
    loss, losses_M, drafted_M, agree_M = LinearSoftCrossEntropy.apply(
        head.norm(torch.cat(outs)),
        matrix_VH if torch.is_grad_enabled() else matrix_VH.detach(),
        batch.target_logits_BTV.flatten(0, 1),
        torch.cat(rows),
        torch.cat(weights),
    )
    sizes = [len(slots_M) for slots_M in slots]
    chain = ChainAcceptance(batch.tokens_BT, sizes[0])
    losses, accuracies, accepted = [], [], []
    parts = zip(losses_M.split(sizes), drafted_M.split(sizes), agree_M.split(sizes), strict=True)
    for step, (of_step_M, drafted, agree) in enumerate(parts):
        num_counted = covered[step].sum().clamp(min=1)
        losses.append((of_step_M * covered[step]).sum() / num_counted)
        accuracies.append((agree & covered[step]).sum() / num_counted)
        accepted.append(chain.share(step, slots[step], head.draft_token_ids[drafted]))
    return LossResult(
        loss=loss,
        losses_K=torch.stack(losses).float(),
        accuracy_K=torch.stack(accuracies).float(),
        accepted_K=torch.stack(accepted).float(),
    )
