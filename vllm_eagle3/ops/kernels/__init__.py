"""Triton kernels, one file for each operation in :mod:`vllm_eagle3.ops`.

Imported when an operation first runs on Triton. Arguments are checked by the operation.
Kernels also run in Triton's interpreter; nothing here may rely on a compiler's leniency.
"""
