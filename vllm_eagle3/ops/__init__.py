"""Fast versions of :mod:`vllm_eagle3.tree`, the attention kernels, and what training needs.

Each operation checks its arguments and then runs the implementation that ``impl`` names:
``torch``, ``triton``, ``extension`` (compiled, from ``csrc/``), or ``auto``, which on a GPU is the
first of extension, Triton and torch that the operation has and the installation holds, and
torch elsewhere.
"""

from vllm_eagle3.ops.accepted_row_index import accepted_row_index
from vllm_eagle3.ops.build_tree import build_tree
from vllm_eagle3.ops.compact_kv import KVCacheTable, compact_kv
from vllm_eagle3.ops.diagonal_attention import add_diagonal, diagonal_gradients
from vllm_eagle3.ops.dispatch import Impl
from vllm_eagle3.ops.draft_topk import draft_topk
from vllm_eagle3.ops.expand_logits import expand_logits
from vllm_eagle3.ops.expand_tree import expand_tree
from vllm_eagle3.ops.fuse_features import fuse_features
from vllm_eagle3.ops.gather_tree_rows import gather_tree_rows
from vllm_eagle3.ops.rotary import rotate_halves
from vllm_eagle3.ops.soft_cross_entropy import fuses_cross_entropy, soft_cross_entropy
from vllm_eagle3.ops.tree_attention import finish_tree_attention, tree_attention
from vllm_eagle3.ops.verify_tree import verify_tree

__all__ = [
    "Impl",
    "KVCacheTable",
    "accepted_row_index",
    "add_diagonal",
    "build_tree",
    "compact_kv",
    "diagonal_gradients",
    "draft_topk",
    "expand_logits",
    "expand_tree",
    "finish_tree_attention",
    "fuse_features",
    "fuses_cross_entropy",
    "gather_tree_rows",
    "rotate_halves",
    "soft_cross_entropy",
    "tree_attention",
    "verify_tree",
]
