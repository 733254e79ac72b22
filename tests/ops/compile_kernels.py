"""Compiles the Triton kernels for GPUs that this machine does not have: ``ARCHITECTURE...``.

The interpreter accepts programs that the compiler does not (a None passed on, a type that
changes in a loop). Here each launch goes through the compiler down to machine code, with
tensors on the CPU and a driver that only names the GPU. A process of its own, because the
interpreter must be off when the kernels are imported.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from vllm_eagle3 import ops
from vllm_eagle3.ops.dispatch import interpreted

compiled: list[str] = []


class NamedGpu:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": 132, "max_shared_mem": 101376}


def compile_only(self, grid):  # in place of JITFunction.__getitem__
    def launch(*args, **kwargs):
        kernel = self.warmup(*args, grid=grid, **kwargs)
        kernel.asm["cubin"]
        compiled.append(self.fn.__name__)

    return launch


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention(
    head_dim: int, dtype: torch.dtype, group: int, splits: tuple[int, ...], **options
) -> None:
    """Both tree attention kernels."""
    kv_heads, rows = 2, 4
    quantised = options.pop("quantised", None)
    window = options.pop("window", None)
    heads = kv_heads * group
    query = torch.zeros(rows, heads, head_dim, dtype=dtype)
    node = torch.zeros(rows, kv_heads, head_dim, dtype=dtype)
    cache = torch.zeros(2, 16, kv_heads, head_dim)
    cache = cache.to(torch.float8_e4m3fn if quantised else dtype)
    one = torch.ones(()) if quantised == "device" else 1.0
    settings = {
        "query_start_loc_B1": int32(0, 4),
        "tree_start_B": int32(0),
        "tree_lens_B": int32(4),
        "ancestor_bits_T": torch.ones(rows, dtype=torch.int64),
        "out_THD": torch.zeros(rows, heads, head_dim, dtype=dtype),
        "scale": 1.0,
        "max_query_len": rows,
        "max_tree_len": 40,
        "softcap": options.pop("softcap", 0.0),
        "impl": "triton",
    }
    if options.pop("scratch", False):
        settings["scratch"] = (torch.zeros(64, kv_heads, head_dim, dtype=dtype),) * 2
    if quantised:
        settings |= {"k_scale": one, "v_scale": one}
    if quantised == "query":
        query = query.to(torch.float8_e4m3fn)
        settings["q_scale"] = one
    assert not options
    for num_splits in splits:
        ops.tree_attention(
            query,
            node,
            node,
            cache,
            cache,
            torch.zeros(1, 2, dtype=torch.int32),
            int32(20),
            max_prefix_len=4096,
            sliding_window=window,
            num_splits=num_splits,
            **settings,
        )
    if window is None:
        lse = torch.zeros(heads, rows)
        ops.finish_tree_attention(query, node, node, lse_HT=lse, **settings)


def attentions() -> None:
    """Each branch of the kernels at least once; a compilation takes two seconds."""
    attention(128, torch.bfloat16, 4, splits=(1, 4))
    attention(128, torch.float32, 4, splits=(4,))
    attention(80, torch.float16, 3, splits=(4,), scratch=True, window=64, softcap=20.0)
    attention(128, torch.bfloat16, 4, splits=(4,), quantised="device")
    attention(64, torch.float16, 1, splits=(1,), quantised="query", softcap=20.0, scratch=True)


def trees() -> None:
    path = (torch.zeros(3, 40, dtype=torch.int32), int32(1, 1, 1))
    batch = (torch.zeros(2, dtype=torch.int64), int32(0, 4, 8), int32(0, 4, 8))
    bits, long = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    ops.accepted_row_index(*path, *batch, 8, impl="triton")
    ops.gather_tree_rows(bits, path[0], *batch, long, long.clone(), long.clone(), int32(0, 0),
        int32(9, 9), impl="triton")  # fmt: skip
    ops.verify_tree(long, long.to(torch.int32), path[0], batch[0], batch[2], *path, num_nodes=40,
        impl="triton")  # fmt: skip
    for dtype in (torch.bfloat16, torch.uint8):
        cache = torch.zeros(4, 2, 16, 128, dtype=dtype)
        table = ops.KVCacheTable.from_layers([(cache, 0), (cache.clone(), 0)])
        ops.compact_kv(table, long[None], *path, *batch, impl="triton")


def training() -> None:
    """Losses of both sizes of rows, with each part and without; one later step, and two; turns."""
    rows, weights = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    top = torch.zeros(2, 10, dtype=torch.int64), weights
    for vocab_size, dtype, given, with_gradient in (
        (8192, torch.bfloat16, (), True),
        (49152, torch.bfloat16, top, True),
        (8191, torch.float32, top, False),
    ):
        logits = torch.zeros(2, vocab_size, dtype=dtype)
        ops.soft_cross_entropy(logits, logits.clone(), rows, weights, *given,
            with_gradient=with_gradient, impl="triton")  # fmt: skip
    for head_dim, dtype, steps in ((64, torch.bfloat16, 2), (80, torch.float16, 1)):
        x, lse = torch.zeros(1, 2, 5, head_dim, dtype=dtype), torch.zeros(1, 2, 5)
        later = ([x] * steps,) * 2
        ops.add_diagonal(x, x, lse, *later, impl="triton")
        ops.diagonal_gradients(x, x, x, lse, *later, x, impl="triton")
        angles = torch.zeros(1, 2, head_dim)
        ops.rotate_halves(x, angles, angles, inverse=steps > 1, impl="triton")


def main() -> None:
    assert not interpreted()
    # The dispatcher would refuse tensors on the CPU: nothing runs here.
    import vllm_eagle3.ops.dispatch as dispatch

    dispatch.interpreted = lambda: True
    triton.runtime.jit.JITFunction.__getitem__ = compile_only
    for capability in map(int, sys.argv[1:]):
        triton.runtime.driver.set_active(NamedGpu(capability))
        attentions()
        trees()
        training()
    print(len(compiled), *sorted(set(compiled)))


if __name__ == "__main__":
    main()
