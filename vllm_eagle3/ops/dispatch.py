"""Which implementation of an operation runs, and the checks that all operations share."""

import functools
import importlib.util
from typing import Literal

import torch

from vllm_eagle3.ops import extension

Impl = Literal["auto", "torch", "triton", "extension"]
Kernel = Literal["triton", "extension"]


def resolve(
    impl: Impl, device: torch.device, kernels: tuple[Kernel, ...] = ("triton",)
) -> Literal["torch", "triton", "extension"]:
    """The implementation to run for tensors on ``device``.

    ``auto`` is torch where there is no GPU: Triton's interpreter, the only way to run its
    kernels there, is for tests.

    Args:
        impl: what the caller asked for.
        device: where the tensors are.
        kernels: what the operation has besides torch, the fastest first.

    Raises:
        ValueError: an unknown name, one that the operation does not have, or one that cannot
            run here.
    """
    if impl == "auto":
        if device.type != "cuda":
            return "torch"
        return next(filter(_is_installed, kernels), "torch")
    if impl != "torch" and impl not in kernels:
        names = ", ".join(f'"{name}"' for name in ("auto", "torch", *kernels))
        raise ValueError(f"impl must be one of {names}, got {impl!r}")
    if impl == "triton" and not _has_triton():
        raise ValueError('impl="triton" needs the package triton: install it, or use impl="auto"')
    if impl == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            f'impl="triton" cannot run on {device.type} tensors: use impl="auto", or set '
            "TRITON_INTERPRET=1 before triton is imported to test the kernels without a GPU"
        )
    if impl == "extension" and not extension.load():
        raise ValueError(
            'impl="extension" needs the CUDA extension, which is not in this installation: '
            f'use impl="auto", or {extension.REMEDY}'
        )
    return impl


_TRITON_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def runs_triton(impl: Impl, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether Triton computes an operation of training, which takes any float, or torch.

    Args:
        dtypes: of what it computes with; the kernels are float32 inside, so float64 is torch's.

    Raises:
        ValueError: ``impl="triton"`` cannot run here, or not on these types; an unknown name.
    """
    if resolve(impl, device) != "triton":
        return False
    can_run = all(dtype in _TRITON_FLOATS for dtype in dtypes)
    if not can_run and impl != "auto":
        raise ValueError(
            'impl="triton" takes bfloat16, float16 or float32, got '
            f'{" and ".join(map(str, dtypes))}: use impl="auto"'
        )
    return can_run


def _is_installed(kernel: Kernel) -> bool:
    return extension.load() if kernel == "extension" else _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU."""
    from triton import knobs

    return knobs.runtime.interpret


# Every step of the engine runs these, but for those that replay a whole graph: what has much to
# say puts its message together only where it raises one.


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_same_device(**tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all tensors are on one device."""
    devices = [tensor.device for tensor in tensors.values()]
    if devices.count(devices[0]) != len(devices):
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device: {found}")


def check_vector(name: str, tensor: torch.Tensor, min_length: int, *dtypes: torch.dtype) -> None:
    """Raise ``ValueError`` unless contiguous, 1-d, long enough and of one of the types."""
    if tensor.dim() != 1 or tensor.numel() < min_length or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous vector of at least {min_length} elements, got shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    if tensor.dtype not in dtypes:
        raise _wrong_dtype(name, tensor, dtypes)


def check_matrix(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ``ValueError`` unless contiguous, 2-d and of one of the types."""
    if tensor.dim() != 2 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous matrix, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )
    if tensor.dtype not in dtypes:
        raise _wrong_dtype(name, tensor, dtypes)


def check_rows(name: str, tensor: torch.Tensor, width: int, *dtypes: torch.dtype) -> None:
    """Raise ``ValueError`` unless 2-d, of that width, one of the types, and contiguous rows."""
    if tensor.dim() != 2 or tensor.shape[1] != width or tensor.stride(1) != 1:
        raise ValueError(
            f"{name} must be a matrix of {width} columns with contiguous rows, got shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    if tensor.dtype not in dtypes:
        raise _wrong_dtype(name, tensor, dtypes)


def _wrong_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> ValueError:
    return ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
