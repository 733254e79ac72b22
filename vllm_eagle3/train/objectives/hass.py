"""Harmonized context alignment and top-K distillation (HASS, arXiv 2408.15766).

An EAGLE-1 head drafts from its own features from the second draft on. HASS trains it on them
(section 3.2): in step k = 0..K-1, slot t

    takes      token t+1+k and the target's feature f_t (k = 0), or its own output of step k-1,
               *without* its gradient,
    attends to keys made of target features at slots 0..t and, one each, of its own features
               of steps 1..k: the context that the (k+1)-th draft after slot t will see,
    predicts   the feature f_(t+1+k), and with it token t+2+k.

    L_top_k = - sum over the K' likeliest v of p of p(v) log q(v)    (section 3.1, K' = 10)
    loss_k  = mean over counted slots of L_reg + 0.1 L_cls + w L_top_k,   L_reg, L_cls as EAGLE's
    loss    = sum_k decay^k (n_k / n_0) loss_k                        (decay 1 in the paper)

with n_k counted slots in step k: a slot has the same weight whatever batch it is in.
Slots are named by where the draft starts, as in EAGLE-3's training-time test; the paper names
them by where the k-th draft stands, t + k, which is the same but at the start of a text, where
a draft would begin before it.

The two stages, w = 0 and then w = 1, are one run here: ``TrainConfig.top_k_from`` is the share of
it where the second begins.

The same function is EAGLE-1's loss (``decay`` 0 or one step, no top-K term).

Shape suffixes: B sequences, T slots, K steps, P = B T rows, M counted slots of all steps,
H hidden.
"""

import torch

from vllm_eagle3.train.eagle1 import Eagle1Head
from vllm_eagle3.train.features import FeatureBatch
from vllm_eagle3.train.objectives.eagle1 import feature_terms, noisy
from vllm_eagle3.train.objectives.result import LossResult, LossSettings, weighted
from vllm_eagle3.train.objectives.slots import accepted_share, slots_of_steps, sums_of_steps
from vllm_eagle3.train.objectives.steps import DraftSteps


def aligned_loss(head: Eagle1Head, batch: FeatureBatch, settings: LossSettings) -> LossResult:
    """The loss of this module's docstring on one batch.

    Noise is added where a gradient is wanted of a head in training mode, and nowhere else.
    """
    slots = slots_of_steps(batch.assistant_BT, settings.num_steps, batch.slots)
    tokens_P, features_PH = batch.tokens_BT.flatten(), batch.features_BTF.flatten(0, 1)
    step_M, slot_M = slots.at_M // len(tokens_P), slots.at_M % len(tokens_P)
    rows_M = slot_M + step_M + 1
    run_step = DraftSteps(head, batch, settings)
    training = head.training and torch.is_grad_enabled()
    taken_PH = noisy(features_PH, settings.feature_noise if training else 0.0)
    losses, parts, drafted, agree = [], [], [], []
    of_steps = zip(slot_M.split(slots.sizes), rows_M.split(slots.sizes), strict=True)
    for slots_of_step_M, rows_of_step_M in of_steps:
        out_PH = run_step(taken_PH)
        taken_PH = out_PH.detach()
        loss, terms, drafted_M, agree_M = feature_terms(
            head,
            out_PH.index_select(0, slots_of_step_M),
            features_PH.index_select(0, rows_of_step_M),
            settings,
        )
        losses.append(loss)
        parts.append(terms)
        drafted.append(drafted_M)
        agree.append(agree_M)
    agree_M = torch.cat(agree)
    sums = agree_M.float(), torch.ones_like(agree_M)
    agreeing_K, counted_K = sums_of_steps(slots, len(tokens_P), sums)
    right_M = torch.cat(drafted) == tokens_P[rows_M + 1]
    return LossResult(
        loss=weighted(losses, slots.sizes, settings.decay),
        losses_K=torch.stack(losses).detach().float(),
        accuracy_K=agreeing_K / counted_K.clamp(min=1),
        accepted_K=accepted_share(slots, len(tokens_P), right_M),
        parts={name: torch.stack([terms[name] for terms in parts]).float() for name in parts[0]},
    )
