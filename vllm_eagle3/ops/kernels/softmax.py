"""The pieces of attention that the kernels of tree attention are made of.

Rows of a tile are (query row, query head) pairs that share one key head: query row
``m // group``, head ``m % group`` of the group. Scores are in base 2. Keys and values of a
quantised cache stay in its units, the value divided by the scale: the key's scale belongs
to the scores, the value's to the output.
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, kv_head, start, num_rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query row, query head, and whether there is one, of each row of a tile."""
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return start + member // GROUP, kv_head * GROUP + member % GROUP, member < num_rows * GROUP


@triton.jit
def split_of_prefix(
    prefix_len,
    window,
    num_splits,  # at most so many
    few_splits,  # that keep the device busy
    LEAST_KEYS: tl.constexpr,
    MOST_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Where a prefix starts for its rows, the keys of one split, and how many splits it has."""
    first = 0
    if HAS_WINDOW:
        # The root sees furthest back; whole blocks before that are hidden from all rows.
        first = tl.maximum(prefix_len - window, 0) // BLOCK_N * BLOCK_N
    num_keys = prefix_len - first
    # Long prefixes take more splits than fill the device: their requests would end last.
    keys = tl.minimum(tl.maximum(tl.cdiv(num_keys, few_splits), LEAST_KEYS), MOST_KEYS)
    keys = tl.cdiv(tl.maximum(keys, tl.cdiv(num_keys, num_splits)), BLOCK_N) * BLOCK_N
    return first, keys, tl.maximum(tl.cdiv(num_keys, keys), 1)


@triton.jit
def load_scales(
    inner_scale,
    outer_scale,
    query_scale,
    key_scale,
    value_scale,
    HAS_SOFTCAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
):
    """The scales of scores with those of query and keys, and those of keys and values."""
    if QUANTISED:
        if SCALES_ON_DEVICE:
            key_scale = tl.load(key_scale)
            value_scale = tl.load(value_scale)
        factor = key_scale
        if query_scale is not None:
            if SCALES_ON_DEVICE:
                query_scale = tl.load(query_scale)
            factor = factor * query_scale
        if HAS_SOFTCAP:
            inner_scale *= factor
        else:
            outer_scale *= factor
    return inner_scale, outer_scale, key_scale, value_scale


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
    TYPE: tl.constexpr,
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
    acc = acc * decay[:, None]
    acc += tl.dot(weights.to(TYPE).to(DOT), value.to(DOT), input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def attend_prefix(
    query,  # [M, D]
    bits,  # [M] int64
    in_request,  # [M]
    acc,
    peak,
    total,
    first,
    last,  # keys first .. last - 1 of the prefix; first is a multiple of BLOCK_N
    prefix_len,
    key_cache_ptr,  # of the head
    value_cache_ptr,
    block_table_ptr,  # of the request
    key_stride_b,
    key_stride_n,
    value_stride_b,
    value_stride_n,
    inner_scale,
    outer_scale,
    window,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TYPE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Continue the online softmax over a part of the paged prefix."""
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    position = first + tl.arange(0, BLOCK_N)
    in_prefix = position < last
    if HAS_WINDOW:
        # Pages before every row's window may have been freed and hold another request's.
        in_prefix = in_prefix & (position >= prefix_len - window)
    page = tl.load(block_table_ptr + position // PAGE, mask=in_prefix, other=0).to(tl.int64)
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        in_prefix = position < last
        if HAS_WINDOW:
            in_prefix = in_prefix & (position >= prefix_len - window)
        key_at = page * key_stride_b + position % PAGE * key_stride_n
        value_at = page * value_stride_b + position % PAGE * value_stride_n
        # Rows past the prefix may hold anything, NaN too, which no weight of 0 would hide.
        key = tl.load(
            key_cache_ptr + key_at[None, :] + dim[:, None],
            mask=in_prefix[None, :] & in_head[:, None],
            other=0.0,
        )
        value = tl.load(
            value_cache_ptr + value_at[:, None] + dim[None, :],
            mask=in_prefix[:, None] & in_head[None, :],
            other=0.0,
        )
        # A step ahead: keys whose address waits for this step's page could not be prefetched.
        position_ahead = position + BLOCK_N
        page = tl.load(
            block_table_ptr + position_ahead // PAGE, mask=position_ahead < last, other=0
        ).to(tl.int64)
        visible = in_request[:, None] & in_prefix[None, :]
        if HAS_WINDOW:
            row_position = prefix_len + popcount(bits) - 1
            visible = visible & (position[None, :] > row_position[:, None] - window)
        scores = tl.dot(query, key.to(DOT), input_precision=PRECISION)
        scores = scale_scores(scores, inner_scale, outer_scale, HAS_SOFTCAP)
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = update_softmax(acc, peak, total, scores, value, TYPE, DOT, PRECISION)
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
