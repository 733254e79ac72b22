"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before import."""

import torch

from vllm_eagle3.engine import interpreter

if not torch.cuda.is_available():
    interpreter.prepare()
