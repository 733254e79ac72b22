"""The tree's part of tree attention: its nodes' keys and values, unpaged.

A tree's rows are those of the step (the verification), or those of a level of the draft and,
in a scratch buffer, those of the levels before it.
"""

import triton
import triton.language as tl

from vllm_eagle3.ops.kernels.softmax import popcount, scale_scores, update_softmax


@triton.jit
def attend_tree(
    query,  # [M, D]
    bits,  # [M] int64
    acc,
    peak,
    total,
    start,  # of the request's query rows
    num_rows,
    tree_row,  # of the request's first node
    tree_len,
    tree_key_ptr,  # of the head
    tree_value_ptr,
    tree_key_stride,
    tree_value_stride,
    scratch_key_ptr,  # of the head, or None
    scratch_value_ptr,
    scratch_stride,
    key_scale,
    value_scale,
    inner_scale,
    outer_scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SCRATCH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
    TYPE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Continue the online softmax over the whole tree."""
    first_fresh = 0
    fresh_row = tree_row.to(tl.int64)
    if HAS_SCRATCH:
        first_fresh = tl.maximum(tree_len - num_rows, 0)
        acc, peak, total = attend_nodes(
            query,
            bits,
            acc,
            peak,
            total,
            0,
            first_fresh,
            scratch_key_ptr + fresh_row * scratch_stride,
            scratch_value_ptr + fresh_row * scratch_stride,
            scratch_stride,
            scratch_stride,
            key_scale,
            value_scale,
            inner_scale,
            outer_scale,
            window,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_S,
            HAS_SOFTCAP,
            HAS_WINDOW,
            QUANTISED,
            TYPE,
            DOT,
            PRECISION,
        )
        fresh_row = start.to(tl.int64)
    return attend_nodes(
        query,
        bits,
        acc,
        peak,
        total,
        first_fresh,
        tree_len,
        tree_key_ptr + fresh_row * tree_key_stride,
        tree_value_ptr + fresh_row * tree_value_stride,
        tree_key_stride,
        tree_value_stride,
        key_scale,
        value_scale,
        inner_scale,
        outer_scale,
        window,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_S,
        HAS_SOFTCAP,
        HAS_WINDOW,
        QUANTISED,
        TYPE,
        DOT,
        PRECISION,
    )


@triton.jit
def store_level(
    start,
    num_rows,
    tree_row,
    tree_len,
    tree_key_ptr,  # of the head
    tree_value_ptr,
    tree_key_stride,
    tree_value_stride,
    scratch_key_ptr,  # of the head
    scratch_value_ptr,
    scratch_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Keep a level's rows for the levels after it. Nobody reads them in this launch."""
    dim = tl.arange(0, BLOCK_D)
    for first in tl.range(0, num_rows, BLOCK_S, num_stages=1):
        row = first + tl.arange(0, BLOCK_S)
        mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
        source = (start + row).to(tl.int64)[:, None]
        key = tl.load(tree_key_ptr + source * tree_key_stride + dim[None, :], mask=mask)
        value = tl.load(tree_value_ptr + source * tree_value_stride + dim[None, :], mask=mask)
        target = (tree_row + tree_len - num_rows + row).to(tl.int64)[:, None] * scratch_stride
        tl.store(scratch_key_ptr + target + dim[None, :], key, mask=mask)
        tl.store(scratch_value_ptr + target + dim[None, :], value, mask=mask)


@triton.jit
def attend_nodes(
    query,  # [M, D]
    bits,  # [M] int64
    acc,
    peak,
    total,
    first_node,
    last_node,  # nodes first_node .. last_node - 1 of the tree
    key_ptr,  # of first_node and of the head
    value_ptr,
    key_stride,
    value_stride,
    key_scale,
    value_scale,
    inner_scale,
    outer_scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
    TYPE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Continue the online softmax over the nodes whose bits are set."""
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    # One or two steps: stages would only take shared memory from the walk over the prefix.
    for start in tl.range(first_node, last_node, BLOCK_S, num_stages=1):
        node = start + tl.arange(0, BLOCK_S)
        row = node - first_node
        in_tree = node < last_node
        # Rows past the tree may hold anything, NaN too, which no weight of 0 would hide.
        key = tl.load(
            key_ptr + row[None, :] * key_stride + dim[:, None],
            mask=in_tree[None, :] & in_head[:, None],
            other=0.0,
        )
        value = tl.load(
            value_ptr + row[:, None] * value_stride + dim[None, :],
            mask=in_tree[:, None] & in_head[None, :],
            other=0.0,
        )
        if QUANTISED:
            key = quantise(key, key_scale)
            value = quantise(value, value_scale)
        # A shift of 64 bits or more is undefined.
        shift = tl.minimum(node, 63).to(tl.int64)[None, :]
        visible = (((bits[:, None] >> shift) & 1) != 0) & in_tree[None, :]
        if HAS_WINDOW:
            # A key's depth is its rank among the ancestors that the row sees.
            up_to_node = (tl.full([1, BLOCK_S], 2, tl.int64) << shift) - 1
            distance = popcount(bits)[:, None] - popcount(bits[:, None] & up_to_node)
            visible = visible & (distance < window)
        scores = tl.dot(query, key.to(DOT), input_precision=PRECISION)
        scores = scale_scores(scores, inner_scale, outer_scale, HAS_SOFTCAP)
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = update_softmax(acc, peak, total, scores, value, TYPE, DOT, PRECISION)
    return acc, peak, total


@triton.jit
def quantise(values, scale):
    """What a cache of e4m3 would hold, in its units: ``values / scale``, rounded to it.

    In float32 arithmetic, exactly as the conversion of the hardware (to nearest, ties to
    even, saturating), since the interpreter's conversion rounds differently.
    """
    exact = tl.div_rn(values.to(tl.float32), scale)
    kept = tl.minimum(tl.maximum(exact, -448.0), 448.0)
    # Three bits of mantissa from 2^-6 on, and steps of 2^-9 below: the last bit of 1.5 * 2^14.
    bits = kept.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    rounded = bits.to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(kept) < 0.015625, (kept + 24576.0) - 24576.0, rounded)
    return tl.where(exact == exact, rounded, exact)
