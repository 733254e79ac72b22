import gzip
import json

import pytest

from vllm_eagle3.bench.steps import CATEGORIES, NoSteps, split, split_trace


class Trace:
    """A trace under construction; times in microseconds. The host runs ahead of the GPU."""

    def __init__(self):
        self.events = []
        self._correlation = 0

    def mark(self, start, end, requests=1, tokens=4, context=0):
        name = f"execute_context_{context}({8 * context})_generation_{requests}({tokens})"
        self._add("user_annotation", name, start, end - start)

    def launch(self, at, kernels, graph=False):
        """One call on the host, and what it runs: (name, start, duration)."""
        self._correlation += 1
        call = "cudaGraphLaunch" if graph else "cudaLaunchKernel"
        self._add("cuda_runtime", call, at, 1, correlation=self._correlation)
        for name, start, duration in kernels:
            category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
            self._add(category, name, start, duration, correlation=self._correlation)

    def _add(self, category, name, start, duration, **args):
        event = {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}
        self.events.append(event | {"args": args})


def add_step(trace, host, device, drafting):
    """A step of 1000 us on the GPU: preparation and 400 us of target, then what follows."""
    trace.mark(host, host + 50)
    trace.launch(host + 10, [("_prepare_pos_seq_lens_kernel", device - 20, 10)])
    trace.launch(
        host + 20,
        [("nvjet_tst_128x64", device, 300), ("flash_fwd_kernel", device + 300, 100)],
        graph=True,
    )
    trace.launch(host + 60, [("nvjet_lm_head", device + 400, 50)])
    drafting(trace, host, device)


def chain(trace, host, device):
    trace.launch(host + 70, [("_gumbel_sample_kernel", device + 450, 20)])
    trace.launch(host + 71, [("Memcpy DtoH (Device -> Pinned)", device + 460, 30)])
    trace.launch(host + 80, [("nvjet_fc", device + 500, 25)])
    trace.launch(host + 90, [("prefill", device + 525, 75)], graph=True)
    trace.launch(host + 95, [("decode", device + 600, 300)], graph=True)


def tree(trace, host, device):
    trace.launch(host + 70, [("void verify_tree_kernel<8>()", device + 450, 20)])
    trace.launch(
        host + 90,
        [
            ("nvjet_fc", device + 500, 100),
            ("draft_topk_kernel", device + 600, 50),
            ("_tree_attention_kernel", device + 650, 100),
            ("expand_tree_kernel", device + 750, 10),
        ],
        graph=True,
    )


def trace_of(drafting, steps=3):
    trace = Trace()
    for number in range(steps):
        # The next step is launched long before this one has run.
        add_step(trace, 100 * number, 1000 + 1000 * number, drafting)
    return trace.events


def test_a_chains_step():
    result = split(trace_of(chain), batch_size=1)
    assert (result["steps"], result["step_ms"]) == (2, 1.0)
    assert result["ms"] == pytest.approx(
        {
            "target": 0.450,
            "sampling": 0.020,
            "draft": 0.400,
            "tree": 0.0,
            # The copy's part that nothing else covers, and the next step's preparation.
            "other": 0.030,
            "idle": 0.100,
        }
    )
    assert result["graphs"] == 3


def test_a_trees_step():
    result = split(trace_of(tree), batch_size=1)
    expected = {"target": 0.45, "sampling": 0, "draft": 0.2, "tree": 0.08, "other": 0.01}
    assert result["ms"] == pytest.approx(expected | {"idle": 0.26})
    assert result["graphs"] == 2
    assert result["kernels"]["tree"][0] == ["draft_topk_kernel", 0.05, 1.0]


def test_the_parts_add_up_to_the_step():
    for drafting in (chain, tree, lambda *_: None):
        result = split(trace_of(drafting), batch_size=1)
        assert sum(result["ms"].values()) == pytest.approx(result["step_ms"])
        assert tuple(result["ms"]) == CATEGORIES


def test_prefills_and_other_batch_sizes_do_not_count():
    trace = Trace()
    for number, (requests, context) in enumerate([(0, 1), (2, 0), (2, 0), (2, 0), (1, 0)]):
        trace.mark(100 * number, 100 * number + 50, requests, 8, context)
        kernels = [("nvjet", 1000 * (number + 1), 700 if requests == 2 else 10)]
        trace.launch(100 * number + 10, kernels, graph=True)
    result = split(trace.events, batch_size=2)
    assert (result["steps"], result["ms"]["target"]) == (2, 0.7)


def test_a_forward_without_a_graph():
    trace = Trace()
    for number in range(3):
        host, device = 100 * number, 1000 * (number + 1)
        trace.mark(host, host + 50)
        trace.launch(host + 5, [("Memcpy HtoD", device - 30, 10)])
        trace.launch(host + 10, [("nvjet", device, 200)])
        trace.launch(host + 20, [("rms_norm_kernel", device + 200, 100)])
        trace.launch(host + 60, [("argmax_kernel", device + 300, 50)])
        trace.launch(host + 70, [("rms_norm_kernel", device + 350, 50)])
    ms = split(trace.events, batch_size=1)["ms"]
    assert (ms["target"], ms["sampling"], ms["draft"], ms["other"]) == (0.3, 0.05, 0.05, 0.01)


def test_a_trace_without_a_gpu_has_no_steps(tmp_path):
    trace = Trace()
    trace.mark(0, 10)
    trace.mark(20, 30)
    with pytest.raises(NoSteps, match="batch 1"):
        split(trace.events, batch_size=1)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_traces_file(tmp_path, suffix):
    path = tmp_path / f"t.pt.trace{suffix}"
    data = json.dumps({"traceEvents": trace_of(tree)}).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert split_trace(path, 1)["steps"] == 2
