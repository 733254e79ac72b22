"""The draft steps of one batch, with their activations kept or computed again.

Without recomputation a step keeps every activation of the layer, among them three of the MLP's
size. With it (gradient checkpointing, arXiv 1604.06174) a step keeps its input, and the keys and
values that later steps attend to; the backward pass runs the step once more, attention
included. Results are the same bit by bit on the CPU; on a GPU gradients are the same up to the
order of sums, which the flash kernel's backward does not fix.

All of it grows with the first power of the length: what is kept of K steps is, for each token,
K (3 H + 2 N D) elements (with the two copies of the rows before the output matrix) and the
target's F features and V logits. A head for Llama-3.1-8B (H = N D = 4096, F = 3 H, V = 32000,
K = 7) keeps about 0.37 MiB for a token in bfloat16, 6 GiB for 16384; one step's own activations,
which are there once, take another 3.

Shape suffixes: B rows, T slots, N query heads, D head dimension, H hidden size, F captured
features, V draft vocabulary.
"""

import torch
from torch.utils.checkpoint import checkpoint

from vllm_eagle3.train.attention import DiagonalAttention
from vllm_eagle3.train.features import FeatureBatch
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.objectives.result import LossSettings
from vllm_eagle3.train.objectives.slots import shift_left


class DraftSteps:
    """Runs a head's steps k = 0, 1, ... over a batch; slot t of step k takes token t+1+k."""

    def __init__(self, head: DraftHead, batch: FeatureBatch, settings: LossSettings) -> None:
        self._head, self._batch, self._settings = head, batch, settings
        self._positions_BT = batch.positions_BT
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """The next step's output, [B, T, H], of the state that it takes."""
        if self._settings.recompute and torch.is_grad_enabled():
            # Nothing in a step is random.
            out_BTH, *newest = checkpoint(
                self._run,
                state_BTH,
                tuple(self._seen),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            out_BTH, *newest = self._run(state_BTH, self._seen)
        self._seen.append(tuple(newest))
        return out_BTH

    def _run(self, state_BTH, earlier) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        step = len(earlier)
        attend = DiagonalAttention(self._settings.attention, self._batch.layout, earlier)
        tokens_BT = shift_left(self._batch.tokens_BT, 1 + step)
        out_BTH = self._head.step(tokens_BT, state_BTH, self._positions_BT + step, attend)
        return out_BTH, *attend.newest
