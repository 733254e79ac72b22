"""The target's captured states side by side: the input of the head's `fc` layer."""

from collections.abc import Sequence

import torch

from vllm_eagle3.ops.dispatch import Impl, check_rows, check_same_device, check_vector, resolve

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_STATES = 8


def fuse_features(
    states: Sequence[torch.Tensor],
    index_T: torch.Tensor | None,
    norm_weights: Sequence[torch.Tensor],
    eps: float,
    out_TF: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Write row ``index[t]`` of all states side by side into row t of ``out``, normed if asked.

    EAGLE-3 (arXiv 2503.01840, section 3.1) concatenates the states of a low, a middle and a
    high layer of the target. EAGLE-3.1 heads norm each of them before (``fc_norm``), others
    the whole row (``norm_before_fc``).

    RMSNorm rounds as vLLM's does: x / sqrt(mean(x^2) + eps) in float32, rounded to the type of
    x, times the weight, rounded again.

    Args:
        states: 1 to 8 matrices ``[S, H]`` of one type (float32, float16 or bfloat16), with
            contiguous rows.
        index_T: int32 or int64 rows to take; without it row t is row t.
        norm_weights: none; one weight ``[H]`` for each state; or one ``[F]`` over the whole
            row. In the type of the states.
        eps: of the norm; not read without one.
        out_TF: ``[T, F]``, F = H times the number of states, in the type of the states, with
            contiguous rows; written.

    Raises:
        ValueError: a tensor of another type, layout, size or device.
    """
    num_states, num_weights = len(states), len(norm_weights)
    if not 1 <= num_states <= _MAX_STATES:
        raise ValueError(f"states must be 1 to {_MAX_STATES}, got {num_states}")
    num_rows, dtype = out_TF.shape[0], states[0].dtype
    num_state_rows, hidden_size = states[0].shape
    for state in states:
        check_rows("states", state, hidden_size, *_FLOATS)
        check_same_device(states=state, out_TF=out_TF)
        if state.dtype != dtype or state.shape[0] != num_state_rows:
            found = ", ".join(f"{state.dtype} {tuple(state.shape)}" for state in states)
            raise ValueError(f"states must have one shape and type, got {found}")
    check_rows("out_TF", out_TF, num_states * hidden_size, dtype)
    if index_T is not None:
        check_vector("index_T", index_T, num_rows, torch.int32, torch.int64)
        check_same_device(index_T=index_T, out_TF=out_TF)
    elif num_state_rows < num_rows:
        raise ValueError(
            f"states of {num_state_rows} rows cannot fill the {num_rows} rows of out_TF: "
            "give them as many, or an index_T"
        )
    if num_weights not in (0, 1, num_states):
        raise ValueError(
            f"norm_weights must be none, one, or one for each of {num_states} states, got "
            f"{num_weights}"
        )
    for weight in norm_weights:
        width = num_states * hidden_size if num_weights == 1 else hidden_size
        check_vector("norm_weights", weight, width, dtype)
        check_same_device(norm_weights=weight, out_TF=out_TF)
    if resolve(impl, out_TF.device, ("extension",)) == "extension":
        torch.ops.vllm_eagle3.fuse_features(states, index_T, norm_weights, eps, out_TF)
    else:
        _fuse_features_torch(states, index_T, norm_weights, eps, out_TF)


def _fuse_features_torch(
    states: Sequence[torch.Tensor],
    index_T: torch.Tensor | None,
    norm_weights: Sequence[torch.Tensor],
    eps: float,
    out_TF: torch.Tensor,
) -> None:
    num_rows = out_TF.shape[0]
    hidden_size = states[0].shape[1]
    for column, state in enumerate(states):
        rows_TH = state[:num_rows] if index_T is None else state[index_T[:num_rows]]
        if len(norm_weights) == len(states):
            rows_TH = _rms_norm(rows_TH, norm_weights[column], eps)
        out_TF[:, column * hidden_size : (column + 1) * hidden_size] = rows_TH
    if len(norm_weights) == 1 != len(states):
        out_TF.copy_(_rms_norm(out_TF, norm_weights[0], eps))


def _rms_norm(rows_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    wide_TH = rows_TH.float()
    wide_TH = wide_TH * torch.rsqrt(wide_TH.pow(2).mean(dim=1, keepdim=True) + eps)
    return wide_TH.to(rows_TH.dtype) * weight_H
