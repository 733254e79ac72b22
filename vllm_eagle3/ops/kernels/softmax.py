"""The pieces of attention that both kernels of tree attention are made of.

Rows of a tile are (query row, query head) pairs that share one key head: query row
``m // group``, head ``m % group`` of the group. Scores are in base 2.
"""

import triton
import triton.language as tl


@triton.jit
def scale_scores(scores, inner_scale, outer_scale, HAS_SOFTCAP: tl.constexpr):
    """Raw products to scores in base 2: the scale, and the soft cap."""
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1: no library call, which the interpreter lacks.
        return outer_scale * (2.0 * tl.sigmoid(2.0 * inner_scale * scores) - 1.0)
    return outer_scale * scores


@triton.jit
def update_softmax(
    acc,  # [M, D] float32: weighted sum so far
    peak,  # [M] float32: largest score so far, -inf before the first
    total,  # [M] float32: sum of weights so far
    scores,  # [M, S] float32, -inf where hidden
    value,  # [S, D]
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One more block of keys in an online softmax (arXiv 1805.02867)."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that has seen nothing yet must not compute inf - inf.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, axis=1)
    weights = weights.to(value.dtype).to(DOT)
    acc = acc * decay[:, None]
    acc += tl.dot(weights, value.to(DOT), input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def attend_tree(
    query,  # [M, D]
    bits,  # [M] int64
    acc,
    peak,
    total,
    key_ptr,  # of the request's tree and of the head
    value_ptr,
    key_stride,
    value_stride,
    tree_len,
    inner_scale,
    outer_scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Continue the online softmax over the tree keys whose bits are set."""
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    for first in range(0, tree_len, BLOCK_S):
        node = first + tl.arange(0, BLOCK_S)
        in_tree = node < tree_len
        # Rows past the tree may hold anything, NaN too, which no weight of 0 would hide.
        key = tl.load(
            key_ptr + node[None, :] * key_stride + dim[:, None],
            mask=in_tree[None, :] & in_head[:, None],
            other=0.0,
        )
        value = tl.load(
            value_ptr + node[:, None] * value_stride + dim[None, :],
            mask=in_tree[:, None] & in_head[None, :],
            other=0.0,
        )
        shift = node.to(tl.int64)[None, :]
        visible = (((bits[:, None] >> shift) & 1) != 0) & in_tree[None, :]
        if HAS_WINDOW:
            # A key's depth is its rank among the ancestors that the row sees.
            up_to_node = (tl.full([1, BLOCK_S], 2, tl.int64) << shift) - 1
            distance = popcount(bits)[:, None] - popcount(bits[:, None] & up_to_node)
            visible = visible & (distance < window)
        scores = tl.dot(query, key.to(DOT), input_precision=PRECISION)
        scores = scale_scores(scores, inner_scale, outer_scale, HAS_SOFTCAP)
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = update_softmax(acc, peak, total, scores, value, DOT, PRECISION)
    return acc, peak, total


@triton.jit
def popcount(bits):
    """Set bits of int64 words. The shifts are arithmetic; the masks drop the sign."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits += bits >> 8
    bits += bits >> 16
    bits += bits >> 32
    return bits & 0x7F
