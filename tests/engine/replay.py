"""Whole-step CUDA graphs on a machine without a GPU.

vLLM's own managers decide what is captured and when it is replayed; only the graph is another.
As a real one it remembers the Python objects and host integers of its capture, so that
whatever a step changes on the host alone is not seen by a replay; and it runs no Python of the
speculator's between its own operations. Not shown: streams, and what may not be captured.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tests.engine.engines import Engine


class Graphs:
    """An engine whose decoding steps replay graphs, from here on to the end of the test.

    Args:
        num_reqs: batch sizes of the graphs.
        rows: rows of a request, where vLLM's schedule has several sizes of trees.

    Attributes:
        replays: number of replays by ``(what, requests of the graph)``; ``what`` is
            ``"target"``, ``"round"`` (draft prefill and growth) or ``"growth"``.
        padded: of those of the target, how many had fewer requests than the graph.
    """

    def __init__(
        self,
        engine: Engine,
        monkeypatch: Any,
        num_reqs: list[int],
        rows: list[int] | None = None,
    ) -> None:
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu import cudagraph_utils

        self.replays: Counter[tuple[str, int]] = Counter()
        self.padded = 0
        runner, mode = engine.runner, CUDAGraphMode.FULL_DECODE_ONLY
        self._mode = mode
        self._full, self._none = CUDAGraphMode.FULL, CUDAGraphMode.NONE
        self._speculator = speculator = runner.speculator
        self._what = "target"

        query_len = runner.decode_query_len
        compilation = runner.vllm_config.compilation_config
        sizes = sorted({*num_reqs, *(n * r for n in num_reqs for r in rows or [query_len])})
        monkeypatch.setattr(compilation, "cudagraph_mode", mode)
        monkeypatch.setattr(compilation, "cudagraph_capture_sizes", sizes)
        monkeypatch.setattr(compilation, "max_cudagraph_capture_size", sizes[-1])
        platform = type(cudagraph_utils.current_platform)
        monkeypatch.setattr(platform, "get_global_graph_pool", lambda *_: None, raising=False)
        capture = self._capture
        monkeypatch.setattr(
            cudagraph_utils.CudaGraphManager,
            "capture",
            lambda manager, create, *args, **kwargs: capture(manager, create),
        )
        monkeypatch.setattr(
            runner,
            "cudagraph_manager",
            cudagraph_utils.ModelCudaGraphManager(
                runner.vllm_config, runner.device, mode, decode_query_len=query_len
            ),
        )
        for name in ("prefill_cudagraph_manager", "decode_cudagraph_manager"):
            monkeypatch.setattr(speculator, name, None)
        with torch.inference_mode():
            speculator.init_cudagraph_manager(mode)
            runner.cudagraph_manager.capture(
                runner.model,
                runner.model_state,
                runner.input_buffers,
                runner.intermediate_tensors,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
                use_aux_hidden_state_outputs=runner.use_aux_hidden_state_outputs,
            )
            speculator.capture()
        prepare = runner.model_state.tree.batch.prepare

        def counting(batch: Any, buffers: Any, replays_graph: bool) -> None:
            self.padded += replays_graph and batch.num_reqs < batch.num_reqs_after_padding
            prepare(batch, buffers, replays_graph)

        monkeypatch.setattr(runner.model_state.tree.batch, "prepare", counting)

    def _capture(self, manager: Any, create_forward: Callable[..., Any]) -> None:
        speculator = self._speculator
        what = {
            id(speculator.prefill_cudagraph_manager): "round",
            id(speculator.decode_cudagraph_manager): "growth",
        }.get(id(manager), "target")
        for desc in manager._capture_descs[self._full]:
            create_forward(desc, warmup=True)(self._none)
            manager.graphs[desc] = _Graph(self, what, desc, create_forward(desc, warmup=False))
        manager._graphs_captured = True


class _Graph:
    def __init__(self, graphs: Graphs, what: str, desc: Any, forward: Callable[..., Any]) -> None:
        self._graphs, self._what, self._desc, self._forward = graphs, what, desc, forward

    def replay(self) -> None:
        graphs, speculator = self._graphs, self._graphs._speculator
        graphs.replays[self._what, self._desc.num_reqs] += 1
        host = speculator._captures_round, speculator._grown_with_prefill
        speculator._captures_round = True  # as when it was captured
        self._forward(graphs._none)
        speculator._captures_round, speculator._grown_with_prefill = host
