"""Where a decoding step's time goes, out of a trace of vLLM's torch profiler.

vLLM marks each step's target forward on the host (``execute_context_0(0)_generation_8(264)``:
no prefill, 8 requests, 264 tokens). Kernels are attributed through the call that launched
them, found by its correlation id: one CUDA graph launched under the mark is the target's
forward; graphs launched after it are the draft's. Kernels of tree drafting are known by name
wherever they run.

A step lasts from the first kernel of one target forward to the first of the next. Its time is
split without overlap, in the order of the starts; what no kernel covers is idle.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# In the order of a step. "tree" is the machinery of trees, "other" everything that is left.
CATEGORIES = ("target", "sampling", "draft", "tree", "other", "idle")
_KERNELS_SHOWN = 10

_MARK = re.compile(r"execute_context_(\d+)\(\d+\)_generation_(\d+)\(\d+\)")
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_HOST = {"cuda_runtime", "cuda_driver"}
_GRAPH_LAUNCH = re.compile(r"cu(da)?GraphLaunch")
_TREE = re.compile(
    r"draft_topk|expand_tree|build_tree|verify_tree|compact_kv|fuse_features|accepted_row_index"
    r"|gather_tree_rows|vllm_eagle3(?!.*attention)"
)
_SAMPLING = re.compile(
    r"sampl|gumbel|reject|argmax|topk|top_k|softmax|sort|multinomial|penalt|_temperature_kernel"
    r"|_min_p|_bias_kernel|bad_words|_max_sumexp",
    re.IGNORECASE,
)
_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul", re.IGNORECASE)
# What the runner does for itself around a forward that runs without one graph.
_PREPARATION = re.compile(
    r"mem(cpy|set)|_prepare|_gather_block_tables|slot_mapping|_combine_sampled|_expand_idx"
    r"|_apply_write|_post_update|_get_num_sampled",
    re.IGNORECASE,
)


class NoSteps(Exception):
    """A trace without two successive decoding steps of the whole batch on a GPU."""


@dataclass(frozen=True)
class _Activity:
    """Something that ran on the GPU; times in microseconds."""

    name: str
    start: float
    end: float
    launched: float
    in_graph: bool


@dataclass
class _Step:
    """One step of the engine: its mark on the host, and what was launched from there on."""

    mark_end: float
    decoding: bool
    activities: list[_Activity]


def split_trace(path: Path, batch_size: int) -> dict[str, Any]:
    """:func:`split` of a trace's file, packed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        return split(json.load(file)["traceEvents"], batch_size)


def split(events: Iterable[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Mean times of a decoding step with all ``batch_size`` requests.

    Returns:
        ``steps`` (how many were averaged), ``step_ms``, ``ms`` by category (they add up to
        the step), ``graphs`` (launched in a step), and ``kernels``: the longest of each
        category, as name, milliseconds and launches of a step.

    Raises:
        NoSteps: nothing to average.
    """
    steps = _steps(events, batch_size)
    times: dict[str, float] = defaultdict(float)
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    count, total, graphs = 0, 0.0, 0
    for step, following in pairwise(steps):
        if not (step.decoding and following.decoding and step.activities and following.activities):
            continue
        start, end = _forward_start(step), _forward_start(following)
        count += 1
        total += end - start
        graphs += len({a.launched for a in step.activities if a.in_graph})
        # What the following step launches before its forward falls into this step's time.
        labelled = _label(step) + [(a, "other") for a in following.activities if a.start < end]
        covered = start
        for activity, category in sorted(labelled, key=lambda pair: pair[0].start):
            spent = min(activity.end, end) - max(activity.start, covered)
            if spent > 0:
                times[category] += spent
                kernel = kernels[category, activity.name]
                kernel[0] += spent
                kernel[1] += 1
                covered = min(activity.end, end)
    if not count:
        raise NoSteps(f"the trace has no two successive decoding steps of batch {batch_size}")
    times["idle"] = total - sum(times.values())
    return {
        "steps": count,
        "step_ms": total / count / 1000,
        "ms": {category: times[category] / count / 1000 for category in CATEGORIES},
        "graphs": graphs / count,
        "kernels": _longest(kernels, count),
    }


def _steps(events: Iterable[Mapping[str, Any]], batch_size: int) -> list[_Step]:
    """Steps in the order of their launch, each with what ran for it."""
    launches: dict[int, tuple[float, bool]] = {}
    device: list[Mapping[str, Any]] = []
    marks: list[tuple[float, _Step]] = []
    for event in events:
        kind = event.get("cat")
        if kind in _DEVICE:
            device.append(event)
        elif kind in _HOST and "correlation" in event.get("args", {}):
            is_graph = _GRAPH_LAUNCH.match(event["name"]) is not None
            launches[event["args"]["correlation"]] = (event["ts"], is_graph)
        elif kind == "user_annotation" and (found := _MARK.fullmatch(event["name"])):
            decoding = found[1] == "0" and int(found[2]) == batch_size
            marks.append((event["ts"], _Step(event["ts"] + event["dur"], decoding, [])))
    marks.sort(key=lambda mark: mark[0])
    starts = [start for start, _ in marks]
    for event in device:
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is None:
            continue
        index = bisect_right(starts, launch[0]) - 1
        if index >= 0:
            end = event["ts"] + event["dur"]
            activity = _Activity(event["name"], event["ts"], end, *launch)
            marks[index][1].activities.append(activity)
    for _, step in marks:
        step.activities.sort(key=lambda activity: activity.start)
    return [step for _, step in marks]


def _is_forward(step: _Step, activity: _Activity) -> bool:
    """Whether an activity is the target's forward and not the preparation of its inputs."""
    if activity.launched > step.mark_end:
        return False
    if _num_graphs(step) == 1:
        return activity.in_graph
    return not _PREPARATION.search(activity.name)


def _num_graphs(step: _Step) -> int:
    """Graphs launched under the mark: one if the whole forward is in a graph."""
    return len({a.launched for a in step.activities if a.in_graph and a.launched <= step.mark_end})


def _forward_start(step: _Step) -> float:
    forward = [a.start for a in step.activities if _is_forward(step, a)]
    return min(forward, default=step.activities[0].start)


def _label(step: _Step) -> list[tuple[_Activity, str]]:
    """Each activity from the target's forward on, with its category."""
    start = _forward_start(step)
    after = [a for a in step.activities if a.launched > step.mark_end]
    eager = [a for a in after if not a.in_graph]
    draft_graphs = len(eager) < len(after)
    # Where logits end and the next drafts begin: sampling, or the verification of trees.
    sampling = [a.start for a in eager if _SAMPLING.search(a.name) or "verify" in a.name]
    labelled = []
    for activity in step.activities:
        if activity.start < start:
            continue
        name = activity.name
        if _TREE.search(name):
            category = "tree"
        elif activity.launched <= step.mark_end:
            category = "target" if _is_forward(step, activity) else "other"
        elif activity.in_graph:
            category = "draft"
        elif _SAMPLING.search(name):
            category = "sampling"
        elif _MATMUL.search(name):
            # Logits come before sampling, the draft's own input after it.
            before = not sampling or activity.start < sampling[0]
            category = "target" if before else "draft"
        elif sampling and activity.start > sampling[-1] and not draft_graphs:
            category = "other" if _PREPARATION.search(name) else "draft"
        else:
            category = "other"
        labelled.append((activity, category))
    return labelled


def _longest(
    kernels: Mapping[tuple[str, str], Sequence[float]], count: int
) -> dict[str, list[list[Any]]]:
    longest: dict[str, list[list[Any]]] = {category: [] for category in CATEGORIES[:-1]}
    for (category, name), (spent, launched) in sorted(kernels.items(), key=lambda kv: -kv[1][0]):
        if len(longest[category]) < _KERNELS_SHOWN:
            row = [name[:120], round(spent / count / 1000, 5), round(launched / count, 2)]
            longest[category].append(row)
    return longest
