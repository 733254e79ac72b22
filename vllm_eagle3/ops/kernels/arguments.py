"""Kernel arguments out of the optional parts of a call of tree attention."""

from typing import Any

import torch

from vllm_eagle3.ops.reference import Scales, Scratch


def scratch_arguments(scratch: Scratch | None) -> tuple[tuple[Any, Any], tuple[int, int]]:
    """The tensors, and their strides of row and head."""
    if scratch is None:
        return (None, None), (0, 0)
    return scratch, scratch[0].stride()[:2]


def scale_arguments(scales: Scales | None) -> tuple[tuple[Any, Any, Any], dict[str, bool]]:
    """The scales as the kernels take them, and the constants that say what they are."""
    on_device = scales is not None and torch.is_tensor(scales[1])
    constants = {"QUANTISED": scales is not None, "SCALES_ON_DEVICE": on_device}
    # Not None for those of keys and values: the compiler cannot hand it on.
    return scales or (None, 1.0, 1.0), constants
