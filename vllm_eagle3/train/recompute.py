"""Gradient checkpointing (arXiv 1604.06174) of the part that holds most of the activations.

Every TTT step keeps three tensors of the intermediate size per token, more than all the rest
of the layer. They are computed again in the backward pass.
"""

from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_eagle3.train.layers import MLP


def recompute_mlps(module: nn.Module) -> None:
    """Let every MLP of ``module`` keep its input only; results stay the same bit by bit."""
    for part in module.modules():
        if isinstance(part, MLP):
            part.forward = _recomputed(part.forward)


def _recomputed(forward):
    def run(x):
        # Nothing in an MLP is random.
        return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)

    return run
