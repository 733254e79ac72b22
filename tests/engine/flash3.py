"""FlashAttention 3: itself on Hopper, elsewhere a stand-in.

The stand-in is written from its sources: it checks arguments as its host code does, and a plan
fits one kernel only, so that one made for another type, page size or batch does not go unnoticed.
"""

import zlib
from typing import Any

import torch

E4M3 = torch.float8_e4m3fn
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
_GARBAGE = 7.0


class Flash3:
    """What vLLM's backend and ours call, counted.

    Attributes:
        num_plans, num_calls: how often each function was called.
        num_splits: those of the last call.
    """

    def __init__(self, monkeypatch: Any) -> None:
        from vllm.v1.attention.backends import fa_utils

        self.num_plans = self.num_calls = self.num_splits = 0
        names = ("get_scheduler_metadata", "flash_attn_varlen_func")
        if not hasattr(fa_utils, names[0]):  # no GPU: only for the imports below
            for name in names:
                monkeypatch.setattr(fa_utils, name, None, raising=False)
        from vllm.v1.attention.backends import flash_attn

        from vllm_eagle3.engine import attention_flash

        source = fa_utils if IS_HOPPER else StandIn
        self._plan, self._attend = (getattr(source, name) for name in names)
        for module in (flash_attn, attention_flash):
            for name in names:
                monkeypatch.setattr(module, name, getattr(self, name), raising=False)
        monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)
        monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)

    def get_scheduler_metadata(self, **arguments: Any) -> torch.Tensor:
        self.num_plans += 1
        return self._plan(**arguments)

    def flash_attn_varlen_func(self, **arguments: Any) -> Any:
        self.num_calls += 1
        self.num_splits = arguments["num_splits"]
        return self._attend(**arguments)


class StandIn:
    @staticmethod
    def get_scheduler_metadata(
        batch_size: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_heads_q: int,
        num_heads_kv: int,
        headdim: int,
        cache_seqlens: torch.Tensor,
        qkv_dtype: torch.dtype,
        cu_seqlens_q: torch.Tensor,
        page_size: int,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        has_softcap: bool = False,
        num_splits: int = 0,
    ) -> torch.Tensor:
        assert qkv_dtype in (torch.bfloat16, torch.float16, E4M3, torch.float32)
        assert cache_seqlens.shape == (batch_size,)
        kernel = (num_heads_q, num_heads_kv, headdim, qkv_dtype, page_size, max_seqlen_q)
        kernel += (causal, tuple(window_size), has_softcap)
        return _plan(kernel, max_seqlen_k, num_splits, cu_seqlens_q, cache_seqlens)

    @staticmethod
    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        max_seqlen_q: int,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_k: int,
        seqused_k: torch.Tensor,
        softmax_scale: float,
        causal: bool,
        block_table: torch.Tensor,
        out: torch.Tensor,
        scheduler_metadata: torch.Tensor,
        fa_version: int,
        window_size: list[int] | None = None,
        softcap: float = 0.0,
        return_softmax_lse: bool = False,
        q_descale: torch.Tensor | None = None,
        k_descale: torch.Tensor | None = None,
        v_descale: torch.Tensor | None = None,
        num_splits: int = 0,
        alibi_slopes: None = None,
        s_aux: None = None,
        mask_mod: None = None,
        aux_tensors: None = None,
        dynamic_causal: None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        window = tuple(window_size or (-1, -1))
        assert fa_version == 3
        assert window == (-1, -1), "not among what this stand-in computes"
        _check(q, k, v, out, cu_seqlens_q, seqused_k, block_table)
        rows = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q >= max(rows)
        assert max_seqlen_k >= max(length for length, n in zip(seqused_k, rows, strict=True) if n)

        kernel = (*q.shape[1:2], *k.shape[2:], q.dtype, k.shape[1], max_seqlen_q)
        kernel += (causal, window, softcap > 0)
        plan = _plan(kernel, max_seqlen_k, num_splits, cu_seqlens_q, seqused_k)
        assert torch.equal(scheduler_metadata, plan), "planned for another kernel or batch"
        behind = scheduler_metadata.untyped_storage().nbytes() // 4 - len(plan)
        behind = scheduler_metadata.as_strided((behind,), (1,), len(plan))
        assert not behind.any(), "what stands behind its plan the kernel takes for work"

        if q.dtype == E4M3:
            q, k, v = q.float(), k.float(), v.float()
            descales = (q_descale, k_descale, v_descale)
        else:
            descales = (seqused_k.new_ones(len(rows), k.shape[2], dtype=torch.float32),) * 3
        for descale in descales:
            assert descale.shape == (len(rows), k.shape[2])
            assert descale.dtype == torch.float32
        lse = out.new_full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float32)
        for b, length in enumerate(seqused_k.tolist()):
            start, end = cu_seqlens_q[b : b + 2].tolist()
            if start == end:  # padding: its length and its pages mean nothing
                continue
            if length == 0:
                out[start:end], lse[:, start:end] = _GARBAGE, torch.inf
                continue
            pages = block_table[b, : -(-length // k.shape[1])].long()
            out[start:end], lse[:, start:end] = _attend(
                q[start:end],
                k[pages].flatten(0, 1)[:length],
                v[pages].flatten(0, 1)[:length],
                [descale[b] for descale in descales],
                softmax_scale,
                softcap,
                causal,
            )
        return (out, lse) if return_softmax_lse else out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    # float32 is for exact tests, FlashAttention 3 has none.
    assert q.dtype == k.dtype == v.dtype
    if q.dtype == E4M3:
        assert out.dtype in (torch.bfloat16, torch.float32)
    else:
        assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert k.shape == v.shape
    assert k.shape[3] == q.shape[2]
    assert q.shape[2] % (16 if q.dtype == E4M3 else 8) == 0
    for tensor in (q, k, v, out):
        assert tensor.stride(-1) == 1
    for cache in (k, v):  # as TMA wants them
        assert cache.data_ptr() % 16 == 0
        assert all(stride * cache.element_size() % 16 == 0 for stride in cache.stride()[:3])
    batch = len(cu_seqlens_q) - 1
    assert seqused_k.shape == (batch,)
    assert block_table.shape[0] == batch
    for tensor in (cu_seqlens_q, seqused_k, block_table):
        assert tensor.dtype == torch.int32
        assert tensor.stride(-1) == 1


def _attend(
    query_QHD: torch.Tensor,
    key_SHD: torch.Tensor,
    value_SHD: torch.Tensor,
    descales: list[torch.Tensor],
    scale: float,
    softcap: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[Q, H, D]`` and natural log-sum-exp ``[H, Q]`` of one request, in float64."""
    group = query_QHD.shape[1] // key_SHD.shape[1]
    query, key, value = (
        tensor.double() * descale.double().repeat_interleave(heads)[:, None]
        for tensor, descale, heads in zip(
            (query_QHD, key_SHD, value_SHD), descales, (group, 1, 1), strict=True
        )
    )
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:  # aligned at the last row and the last key
        num_rows, num_keys = scores.shape[1:]
        hidden = scores.new_ones(num_rows, num_keys).triu(num_keys - num_rows + 1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return out, scores.logsumexp(-1).float()


def _plan(
    kernel: tuple[Any, ...],
    max_seqlen_k: int,
    num_splits: int,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
) -> torch.Tensor:
    """As long as that of FlashAttention 3; its words depend on everything it depends on."""
    if num_splits == 0:  # chosen on the host, by the longest prefix
        num_splits = max(1, max_seqlen_k // 16)
    mark = zlib.crc32(repr((*kernel, num_splits)).encode())
    rows = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).long()
    words = (mark + 7919 * rows + 104729 * seqused_k.long()) & 0x7FFFFFFF
    words = torch.nn.functional.pad(words, (0, -len(words) % 4), value=1)
    vectors = [words, words] if num_splits > 1 else [words]
    return torch.cat([*vectors, words.new_zeros(1)]).int()  # and a counter
