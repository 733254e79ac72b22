"""What one key of each later draft step adds to causal attention, in training-time test.

At step k the query of a slot attends to the keys of step 0 up to its slot, for which there are
flash kernels, and to one key of each step 1..k at the slot itself (EAGLE-3, arXiv 2503.01840,
section 3.2). Here these J = k keys join the softmax, and gradients leave it.

Shape suffixes: B sequences, T slots, N heads, D head dimension. Tensors may have any strides;
those that are views of BTND are not copied.
"""

import math
from collections.abc import Sequence

import torch

from vllm_eagle3.ops.dispatch import Impl, check, check_same_device, runs_triton

Tensors = Sequence[torch.Tensor]


def add_diagonal(
    query_BNTD: torch.Tensor,
    out_BNTD: torch.Tensor,
    lse_BNT: torch.Tensor,
    keys: Tensors,
    values: Tensors,
    *,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output and log-sum-exp once keys of the own slot have joined it.

    With scores s_j = q k_j / sqrt(D):  L' = log(e^L + sum_j e^s_j),
    O' = e^(L - L') O + sum_j e^(s_j - L') v_j, in float32.

    Args:
        out_BNTD, lse_BNT: O and L of the keys so far; L in float32 (float64 of float64 queries).
            Both may be overwritten.
        keys, values: one of each step, BNTD, in the type of the queries.

    Returns:
        O' in the type of the queries, and L'.

    Raises:
        ValueError: a tensor of another type, size or device.
    """
    _check(query_BNTD, lse_BNT, keys, values, out_BNTD)
    if not keys:
        return out_BNTD, lse_BNT
    if not runs_triton(impl, query_BNTD.device, query_BNTD.dtype):
        return _add_diagonal_torch(query_BNTD, out_BNTD, lse_BNT, keys, values)
    from vllm_eagle3.ops.kernels.diagonal_attention import launch_forward

    query, out, lse = _packed(query_BNTD), _packed(out_BNTD), lse_BNT.contiguous()
    launch_forward(query, out, lse, _all_packed(keys), _all_packed(values), _scale(query))
    return out.transpose(1, 2), lse


def diagonal_gradients(
    grad_BNTD: torch.Tensor,
    query_BNTD: torch.Tensor,
    out_BNTD: torch.Tensor,
    lse_BNT: torch.Tensor,
    keys: Tensors,
    values: Tensors,
    query_grad_BNTD: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of :func:`add_diagonal`'s output.

    With weights w_j = e^(s_j - L') and g_j = w_j (dO v_j - dO O') / sqrt(D):

        dq += sum_j g_j k_j,    dk_j = g_j q,    dv_j = w_j dO

    Args:
        grad_BNTD: dO, of the output.
        out_BNTD, lse_BNT: O' and L', as returned.
        query_grad_BNTD: what the other keys have given; may be overwritten.

    Returns:
        dq with these keys; of each step dk; dv.

    Raises:
        ValueError: as :func:`add_diagonal`.
    """
    _check(query_BNTD, lse_BNT, keys, values, out_BNTD, grad_BNTD, query_grad_BNTD)
    tensors = grad_BNTD, query_BNTD, out_BNTD
    if not keys:
        return query_grad_BNTD, [], []
    if not runs_triton(impl, query_BNTD.device, query_BNTD.dtype):
        return _diagonal_gradients_torch(*tensors, lse_BNT, keys, values, query_grad_BNTD)
    from vllm_eagle3.ops.kernels.diagonal_attention import launch_backward

    packed, packed_keys = _all_packed(tensors), _all_packed(keys)
    query_grad = _packed(query_grad_BNTD)
    key_grads = [torch.empty_like(key) for key in packed_keys]
    value_grads = [torch.empty_like(key) for key in packed_keys]
    launch_backward(
        *packed,
        lse_BNT.contiguous(),
        packed_keys,
        _all_packed(values),
        query_grad,
        key_grads,
        value_grads,
        _scale(query_BNTD),
    )
    results = [[x.transpose(1, 2) for x in grads] for grads in (key_grads, value_grads)]
    return query_grad.transpose(1, 2), *results


def _check(query_BNTD, lse_BNT, keys: Tensors, values: Tensors, *others: torch.Tensor) -> None:
    check(len(keys) == len(values), f"keys and values differ: {len(keys)} and {len(values)} steps")
    check(query_BNTD.is_floating_point(), f"queries must be float, got {query_BNTD.dtype}")
    accurate = torch.promote_types(query_BNTD.dtype, torch.float32)
    for tensor in (*keys, *values, *others):
        if tensor.shape != query_BNTD.shape or tensor.dtype != query_BNTD.dtype:
            raise ValueError(
                f"queries are {query_BNTD.dtype} {tuple(query_BNTD.shape)}: all others must be, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        check_same_device(queries=query_BNTD, others=tensor)
    if lse_BNT.shape != query_BNTD.shape[:3] or lse_BNT.dtype != accurate:
        raise ValueError(
            f"lse_BNT must be {accurate} {tuple(query_BNTD.shape[:3])}, got {lse_BNT.dtype} "
            f"{tuple(lse_BNT.shape)}"
        )


def _scale(query: torch.Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[-1])


def _packed(x_BNTD: torch.Tensor) -> torch.Tensor:
    """As BTND; without a copy where it is a view of that."""
    return x_BNTD.transpose(1, 2).contiguous()


def _all_packed(tensors: Tensors) -> list[torch.Tensor]:
    return [_packed(tensor) for tensor in tensors]


def _add_diagonal_torch(
    query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, keys: Tensors, values: Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.stack([_score(query, key, lse.dtype) for key in keys])
    joint = torch.logaddexp(lse, scores.logsumexp(0))
    merged = out.to(lse.dtype) * (lse - joint).exp().unsqueeze(-1)
    for weight, value in zip((scores - joint).exp(), values, strict=True):
        merged.addcmul_(weight.unsqueeze(-1), value.to(lse.dtype))
    return merged.to(query.dtype), joint


def _diagonal_gradients_torch(
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: Tensors,
    values: Tensors,
    query_grad: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    accurate_query, accurate_grad = query.to(lse.dtype), grad.to(lse.dtype)
    delta = (accurate_grad * out.to(lse.dtype)).sum(-1)
    query_grad = query_grad.to(lse.dtype)
    key_grads, value_grads = [], []
    for key, value in zip(keys, values, strict=True):
        weight = (_score(query, key, lse.dtype) - lse).exp()
        score_grad = weight * ((grad * value).sum(-1, dtype=lse.dtype) - delta) * _scale(query)
        query_grad = query_grad.addcmul(score_grad.unsqueeze(-1), key.to(lse.dtype))
        key_grads.append((score_grad.unsqueeze(-1) * accurate_query).to(key.dtype))
        value_grads.append((weight.unsqueeze(-1) * accurate_grad).to(value.dtype))
    return query_grad.to(query.dtype), key_grads, value_grads


def _score(query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (query * key).sum(-1, dtype=dtype) * _scale(query)
