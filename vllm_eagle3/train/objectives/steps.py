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

Shape suffixes: B rows, T slots, P = B T, K steps, L slots of the longest document, E = P + K or
L + K, N query heads, D head dimension, H hidden size, F captured features, V draft vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vllm_eagle3.train.documents import RowLayout
from vllm_eagle3.train.draft_attention import DraftAttention, Geometry
from vllm_eagle3.train.features import FeatureBatch
from vllm_eagle3.train.layers import rotary_angles
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.objectives.result import LossSettings


class DraftSteps:
    """Runs a head's steps k = 0, 1, ..., K-1 over a batch; slot t of step k takes token t+1+k.

    What does not change between the steps is made once: weights in the type of the states, the
    tokens' embeddings, the angles of all positions. Behind a row's end lies the next row; the
    slots that would take its tokens count in no step, and no other slot sees them.
    """

    def __init__(self, head: DraftHead, batch: FeatureBatch, settings: LossSettings) -> None:
        self._head, self._settings = head, settings
        self._layout = batch.layout or RowLayout(*batch.tokens_BT.shape)
        dtype, K = batch.features_BTF.dtype, settings.num_steps
        self._prepared = head.prepared(dtype)
        self._embeds_EH = head.embed(F.pad(batch.tokens_BT.flatten(), (0, K)), dtype)
        last = self._layout.longest + K
        positions_1E = torch.arange(last, device=batch.tokens_BT.device).unsqueeze(0)
        self._angles = rotary_angles(positions_1E, head.config, head.fc.weight.dtype)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, state_PH: torch.Tensor) -> torch.Tensor:
        """The next step's output, [P, H], of the state that it takes."""
        if self._settings.recompute and torch.is_grad_enabled():
            # Nothing in a step is random.
            out_PH, *newest = checkpoint(
                self._run,
                state_PH,
                tuple(self._seen),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            out_PH, *newest = self._run(state_PH, self._seen)
        self._seen.append(tuple(newest))
        return out_PH

    def _run(self, state_PH, earlier) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        step, L = len(earlier), self._layout.longest
        cos, sin = (x_1ED[:, step : step + L] for x_1ED in self._angles)
        geometry = Geometry(self._head.config, self._layout, (cos, sin))
        attend = DraftAttention(geometry, earlier, self._settings.attention)
        embeds_PH = self._embeds_EH[1 + step : 1 + step + len(state_PH)]
        out_PH = self._head.run(embeds_PH, state_PH, self._prepared, attend)
        return out_PH, *attend.newest
