"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before import."""

import os

# Two processes run tests side by side: a thread each, and none tied to a core that the other
# has as well. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

from vllm_eagle3.engine import interpreter

if not torch.cuda.is_available():
    interpreter.prepare()
