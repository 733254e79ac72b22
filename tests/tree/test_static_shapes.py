"""The reference also runs in the engine: no step may wait for the device for a value.

Tensors of the meta device have shapes and no values, so that reading one, or a shape that
depends on one, raises.
"""

import pytest
import torch

from tests.tree.naive import expand, random_levels
from vllm_eagle3.tree.compact import compact_rows, compact_slots
from vllm_eagle3.tree.mask import bits_to_mask
from vllm_eagle3.tree.rerank import rerank
from vllm_eagle3.tree.verify import verify


def test_no_step_reads_a_value():
    B, N, K, D = 3, 12, 4, 3
    levels = random_levels(seed=0, batch=B, depth=D, top_k=K)
    levels = [(log_probs.to("meta"), tokens.to("meta")) for log_probs, tokens in levels]
    int_B = torch.empty(B, dtype=torch.int32, device="meta")
    int_BN = torch.empty(B, N, dtype=torch.int64, device="meta")

    tree = rerank(expand(levels), N, int_B)
    mask_BNN = bits_to_mask(tree.ancestor_bits_BN, N)
    acceptance = verify(int_BN, tree.tokens_BN, tree.parents_BN, int_B)
    rows_BNH = compact_rows(
        torch.empty(B, N, 5, device="meta"), acceptance.path_BN, acceptance.path_len_B
    )
    cache = torch.empty(100, 2, 4, device="meta")
    compact_slots(cache, int_BN, acceptance.path_BN, acceptance.path_len_B)
    for result in (mask_BNN, rows_BNH, *vars(tree).values(), *vars(acceptance).values()):
        assert result.is_meta

    # The instrument itself.
    with pytest.raises((RuntimeError, NotImplementedError)):
        int_B.max().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        int_BN[int_BN > 0]
