"""What a GPU has, asked once."""

import functools

import torch


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors; 1 where the interpreter takes a GPU's place."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
