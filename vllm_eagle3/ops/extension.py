"""The compiled operations ``torch.ops.vllm_eagle3``, built from ``csrc/`` where nvcc is present.

One library serves torch 2.11 and later (stable ABI) and every Python (it uses none of its
symbols). Each operation has a CPU and a CUDA kernel, and writes into tensors of the caller, so
that its fake kernel has nothing to do.
"""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
REMEDY = (
    "build it in an environment with torch >= 2.11, setuptools >= 77 and nvcc: from a checkout "
    "`python setup.py build_ext --inplace`, else `pip install --force-reinstall --no-deps "
    "--no-build-isolation --no-binary vllm-eagle3 vllm-eagle3`"
)
OPS = (
    "accepted_row_index",
    "build_tree",
    "compact_kv",
    "draft_topk",
    "expand_logits",
    "expand_tree",
    "fuse_features",
    "gather_tree_rows",
    "verify_tree",
)


@cache
def load() -> bool:
    """Whether the compiled operations can be called; loads them at the first call.

    Raises:
        RuntimeError: the library is there and does not load, or lacks an operation. Serving
            on without it would be slower, and nobody would know.
    """
    if not LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise RuntimeError(
            f"{LIBRARY} was built for another torch or machine ({error}): {REMEDY}"
        ) from error
    if missing := [name for name in OPS if not hasattr(torch.ops.vllm_eagle3, name)]:
        raise RuntimeError(f"{LIBRARY} was built from other sources (no {missing}): {REMEDY}")
    for name in OPS:
        torch.library.register_fake(f"vllm_eagle3::{name}", _writes_in_place)
    return True


def _writes_in_place(*_args: object) -> None:
    """The shapes and types of outputs that the caller allocated are known."""
