"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before import."""

import os

# Two processes run tests side by side: a thread each, and none tied to a core that the other
# has as well. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
import torch

from vllm_eagle3.engine import interpreter

if not torch.cuda.is_available():
    interpreter.prepare()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What only a GPU can show, and is marked so, waits for one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
