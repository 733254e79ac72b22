"""Runs engines side by side: rounds, cells, repeats, profiles."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eagle3.bench.configurations import PLAIN, Configuration
from vllm_eagle3.bench.engines import Engine, start_engines
from vllm_eagle3.bench.jobs import WorkerError
from vllm_eagle3.bench.options import MEMORY_SHARE
from vllm_eagle3.bench.schedule import Cell, Prompt, rotation, take_round, waves
from vllm_eagle3.bench.speed_results import SpeedResults
from vllm_eagle3.bench.steps import NoSteps, split_trace

_BLOCK_SLACK = 32  # tokens: a last block that is not full, and one ahead
_CACHE_SLACK = 1024  # tokens: where blocks are larger
_PROFILE_DELAY = 6  # steps: the prefill, and the first of decoding
_PROFILE_WAVES = 3


@dataclass(frozen=True)
class Settings:
    """What all engines and measurements share.

    Attributes:
        engine: arguments of ``LLM`` beside those of a configuration.
        head: the draft's checkpoint.
        folder: receives logs and traces.
    """

    engine: dict[str, Any]
    head: str
    folder: Path
    compile_cache: Path | None
    repeats: int
    prompts_per_repeat: int
    max_tokens: int
    engines_at_once: int
    profile: tuple[int, ...]
    keep_traces: bool
    start_timeout: float
    timeout: float
    deadline: float | None

    @classmethod
    def from_arguments(
        cls,
        args: argparse.Namespace,
        prompts: Sequence[Prompt],
        configurations: Sequence[Configuration],
    ) -> "Settings":
        """Out of the command's options; the time budget starts to run."""
        rows = max(1 + (c.num_speculative_tokens or 0) for c in configurations)
        batch = max(args.batch)
        lengths = sorted((len(prompt.tokens) for prompt in prompts), reverse=True)
        max_model_len = lengths[0] + args.max_tokens + rows + _BLOCK_SLACK
        in_largest_batch = sum((lengths * batch)[:batch])
        engine = {
            "model": args.target,
            "dtype": args.dtype,
            "seed": args.seed,
            "max_model_len": max_model_len,
            "max_num_seqs": batch,
            # The same for all, with room for every request's drafts.
            "max_num_batched_tokens": max(args.max_num_batched_tokens, batch * rows, max_model_len),
            # Else a prompt's second answer would have no prefill.
            "enable_prefix_caching": False,
            "enforce_eager": args.enforce_eager,
            # Checked at the start only; what an engine takes is its weights and this cache.
            "gpu_memory_utilization": round(
                MEMORY_SHARE / min(args.engines_at_once, len(configurations)), 3
            ),
            "kv_cache_tokens": in_largest_batch
            + batch * (args.max_tokens + rows + _BLOCK_SLACK)
            + max_model_len
            + _CACHE_SLACK,
        }
        if args.profile:
            engine["profiler_config"] = {
                "profiler": "torch",
                "torch_profiler_dir": str(_folder(args).resolve() / "traces"),
                "torch_profiler_with_stack": False,
                "torch_profiler_dump_cuda_time_total": False,
                "ignore_frontend": True,
                "delay_iterations": _PROFILE_DELAY,
                "max_iterations": args.profile_steps,
            }
        return cls(
            engine={**engine, **args.engine},
            head=args.head,
            folder=_folder(args),
            compile_cache=args.compile_cache,
            repeats=args.repeats,
            prompts_per_repeat=args.prompts_per_repeat,
            max_tokens=args.max_tokens,
            engines_at_once=args.engines_at_once,
            profile=tuple(args.profile),
            keep_traces=args.keep_traces,
            start_timeout=args.start_timeout,
            timeout=args.timeout,
            deadline=time.monotonic() + args.time_budget if args.time_budget else None,
        )

    def engine_settings(self, configuration: Configuration) -> dict[str, Any]:
        """All arguments of a configuration's ``LLM``."""
        settings = dict(self.engine)
        settings["speculative_config"] = configuration.speculative_config(self.head)
        return settings

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is spent."""
        return self.deadline is not None and time.monotonic() > self.deadline


def _folder(args: argparse.Namespace) -> Path:
    return args.output.with_suffix(".logs")


class Comparison:
    """Measures all configurations, in as many rounds as their memory needs."""

    def __init__(
        self,
        settings: Settings,
        configurations: Sequence[Configuration],
        prompts: Sequence[Prompt],
        results: SpeedResults,
    ) -> None:
        self._settings = settings
        self._configurations = {c.name: c for c in configurations}
        self._prompts = prompts
        self._results = results

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure the cells; whatever is there is in the results, even when this raises."""
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        remaining, anchors = list(self._configurations), []
        while remaining and not self._settings.out_of_time:
            names, remaining = take_round(remaining, anchors, self._settings.engines_at_once)
            self._round(names, cells, is_last=not remaining)
            anchors = anchors or self._anchors(len(remaining))

    def _anchors(self, num_remaining: int) -> list[str]:
        """Plain decoding and the chain that was best in most cells."""
        if not num_remaining:
            return []
        best = Counter(cell["best_chain"] for cell in self._results.summaries())
        best.pop(None, None)
        names = [PLAIN.name] if PLAIN.name in self._configurations else []
        return names + [name for name, _ in best.most_common(1)]

    def _round(self, names: Sequence[str], cells: Sequence[Cell], is_last: bool) -> None:
        number = self._results.begin_round(names)
        _say(f"starting {', '.join(names)}")
        with ExitStack() as stack:
            engines = start_engines(
                stack,
                [self._configurations[name] for name in names],
                self._make,
                self._settings.start_timeout,
                self._failed,
            )
            for engine in engines.values():
                self._results.ready(engine.name, engine.ready or {})
            for cell in cells:
                if not engines or self._settings.out_of_time:
                    break
                self._cell(engines, cell, number)
            for batch_size in self._settings.profile:
                if self._settings.out_of_time:
                    _say("no time is left to split steps")
                    break
                self._profile(engines, batch_size, cells[0].temperature)
            if not is_last:
                # Else the next round would find their memory still taken.
                for engine in engines.values():
                    engine.ask_to_stop()
                for engine in engines.values():
                    engine.wait_stopped()

    def _make(self, configuration: Configuration) -> Engine:
        environment = {}
        if self._settings.compile_cache:
            # Of its own: several engines that compile at once would write the same files.
            folder = self._settings.compile_cache.resolve() / configuration.name
            environment["VLLM_CACHE_ROOT"] = str(folder)
        return Engine(
            configuration.name,
            self._settings.engine_settings(configuration),
            self._settings.folder / f"{configuration.name}.log",
            environment,
        )

    def _failed(self, name: str, error: str) -> None:
        _say(f"{name} failed: {error}")
        self._results.failed(name, error)

    def _cell(self, engines: dict[str, Engine], cell: Cell, round_number: int) -> None:
        start = time.monotonic()
        # Not recorded: compiles and caches what this batch size needs.
        self._repeat(engines, cell, 0)
        repeats = []
        for number in range(self._settings.repeats):
            if repeats and self._settings.out_of_time:
                break
            repeats.append(self._repeat(engines, cell, number))
        self._results.add_cell(cell, round_number, repeats)
        _say(
            f"batch {cell.batch_size}, T={cell.temperature:g}: {len(repeats)} repeats,"
            f" {time.monotonic() - start:.0f} s  {self._results.headline()}"
        )

    def _repeat(self, engines: dict[str, Engine], cell: Cell, number: int) -> dict[str, Any]:
        batches = self._waves(cell.batch_size, number)
        order = rotation(list(engines), number)
        runs = {}
        for name in order:
            with self._surviving(engines, name):
                runs[name] = engines[name].measure(
                    batches, cell.temperature, self._settings.max_tokens, self._settings.timeout
                )
        for run in runs.values():
            del run["event"]
        return {"order": order, "runs": runs}

    def _waves(self, batch_size: int, repeat: int) -> list[list[dict[str, Any]]]:
        at_least = self._settings.prompts_per_repeat
        return [
            [prompt.to_dict() for prompt in wave]
            for wave in waves(self._prompts, batch_size, repeat, at_least)
        ]

    def _profile(self, engines: dict[str, Engine], batch_size: int, temperature: float) -> None:
        batches = (self._waves(batch_size, 0) * _PROFILE_WAVES)[:_PROFILE_WAVES]
        for name in list(engines):
            with self._surviving(engines, name):
                trace = engines[name].profile(
                    f"{name}-b{batch_size}",
                    batches,
                    temperature,
                    self._settings.max_tokens,
                    self._settings.timeout,
                )
                if trace is None:
                    continue
                try:
                    split = split_trace(trace, batch_size)
                    self._results.add_profile(name, batch_size, temperature, split)
                except NoSteps as error:
                    _say(f"{name}, batch {batch_size}: {error}")
                if not self._settings.keep_traces:
                    trace.unlink()

    @contextmanager
    def _surviving(self, engines: dict[str, Engine], name: str) -> Iterator[None]:
        """Drop an engine that fails inside, so that the others go on."""
        try:
            yield
        except WorkerError as error:
            self._failed(name, str(error))
            engines.pop(name).__exit__()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
