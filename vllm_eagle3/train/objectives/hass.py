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

Shape suffixes: B sequences, T slots, K steps, P = B T rows, M counted slots, H hidden.
"""

import torch

from vllm_eagle3.train.eagle1 import Eagle1Head
from vllm_eagle3.train.features import FeatureBatch
from vllm_eagle3.train.objectives.eagle1 import feature_terms, noisy
from vllm_eagle3.train.objectives.result import LossResult, LossSettings, weighted
from vllm_eagle3.train.objectives.slots import ChainAcceptance, slots_of_steps
from vllm_eagle3.train.objectives.steps import DraftSteps


def aligned_loss(head: Eagle1Head, batch: FeatureBatch, settings: LossSettings) -> LossResult:
    """The loss of this module's docstring on one batch.

    Noise is added where a gradient is wanted of a head in training mode, and nowhere else.
    """
    slots = slots_of_steps(batch.assistant_BT, settings.num_steps, batch.slots)
    features_PH = batch.features_BTF.flatten(0, 1)
    chain = ChainAcceptance(batch.tokens_BT, len(slots[0]))
    run_step = DraftSteps(head, batch, settings)
    training = head.training and torch.is_grad_enabled()
    taken_BTH = noisy(batch.features_BTF, settings.feature_noise if training else 0.0)
    losses, parts, accuracies, accepted = [], [], [], []
    for step, slots_M in enumerate(slots):
        out_BTH = run_step(taken_BTH)
        taken_BTH = out_BTH.detach()
        loss, terms, drafted_M, agree_M = feature_terms(
            head,
            out_BTH.flatten(0, 1).index_select(0, slots_M),
            features_PH.index_select(0, slots_M + 1 + step),
            settings,
        )
        losses.append(loss)
        parts.append(terms)
        accuracies.append(agree_M.sum() / max(1, len(slots_M)))
        accepted.append(chain.share(step, slots_M, drafted_M))
    return LossResult(
        loss=weighted(losses, [len(slots_M) for slots_M in slots], settings.decay),
        losses_K=torch.stack(losses).detach().float(),
        accuracy_K=torch.stack(accuracies).float(),
        accepted_K=torch.stack(accepted).float(),
        parts={name: torch.stack([terms[name] for terms in parts]).float() for name in parts[0]},
    )
