"""The training loop: data in, head out.

One process for each GPU; ``torchrun -m vllm_eagle3.cli train ...`` starts several.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from vllm_eagle3.corpus import read_corpus, write_json
from vllm_eagle3.files import make_out_folder
from vllm_eagle3.train import checkpoints, fingerprint, interruption
from vllm_eagle3.train.card import accounts, model_card
from vllm_eagle3.train.clock import Clock
from vllm_eagle3.train.data import drawn_share, split_held_out
from vllm_eagle3.train.distributed import World, failing_once, is_main_process, joined
from vllm_eagle3.train.evaluation import Evaluation, evaluate
from vllm_eagle3.train.export import export
from vllm_eagle3.train.features import read_target_config
from vllm_eagle3.train.head_config import rotary_scaling
from vllm_eagle3.train.learner import Learner
from vllm_eagle3.train.loader import Loader, StepBatches
from vllm_eagle3.train.logs import RunLog, peak_memory_gib, rounded
from vllm_eagle3.train.settings import TrainConfig, add_arguments, config_from_arguments

__all__ = ["TrainConfig", "add_arguments", "run", "train"]


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 train``."""
    with failing_once():
        config = config_from_arguments(args)
        out_dir = train(args.target, args.data, args.out, config, args.device, args.resume)
    if is_main_process():
        print(f"wrote {out_dir}")


def train(
    target: str | Path,
    data_dirs: Path | Sequence[Path],
    out_dir: Path,
    config: TrainConfig | None = None,
    device: str | None = None,
    resume: bool = False,
) -> Path:
    """Train a head for ``target`` on ``data_dirs`` and write it to ``out_dir``.

    ``out_dir`` gets the checkpoint with its model card, a log of JSON lines, and the last two
    states to resume from.

    Args:
        target: a Llama checkpoint, folder or hub name.
        data_dirs: a folder of ``vllm-eagle3 data synth``, ``regenerate`` or ``convert``, or
            several.
        device: ``"cuda"``, ``"cpu"``; None takes CUDA where there is some.
        resume: go on from ``out_dir``'s state; target, data and config must be the same.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: no data, an unsuitable target, a state of another configuration, target
            or data, a state or a head in the way of a new run, a full disk, too little memory on
            the GPU, or a loss that is not finite.
    """
    given = [data_dirs] if isinstance(data_dirs, str | Path) else data_dirs
    paths = tuple(map(Path, given)), Path(out_dir)
    if not resume:
        checkpoints.refuse_overwriting(paths[1])
    read_target_config(target)  # a mistake ends here, before anything is written
    try:
        with joined(device) as (world, chosen):
            return _Trainer(target, *paths, config or TrainConfig(), chosen, world).train(resume)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has too little memory ({error}): give --recompute or a larger --accumulate, "
            "or where the target alone is too large --shard-target with torchrun"
        ) from error


class _Trainer:
    def __init__(
        self,
        target: str | Path,
        data_dirs: tuple[Path, ...],
        out_dir: Path,
        config: TrainConfig,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.out_dir, self.device, self.world = config, out_dir, device, world
        # The name alone: a card is shared, a path is this machine's.
        self.target_name, self.data_dirs = Path(target).absolute().name, data_dirs
        torch.manual_seed(config.seed)
        corpus = read_corpus(*data_dirs)
        make_out_folder(out_dir)
        known, self.held_out = split_held_out(corpus, config.held_out, config.seed)
        self.documents = drawn_share(known, config.data_share)
        self.learner = Learner(target, self.documents, config, device, world, self.held_out)
        self.inputs = {
            "data": fingerprint.of_documents(corpus),
            "target": fingerprint.of_target(self.learner.target),
        }
        self.loader = Loader(self.documents, config, world, self.learner.settings.num_steps)
        self.step = self.tokens_seen = 0
        self.saved_step: int | None = None
        self.clock = Clock(config.minutes, world)
        self.evaluation: Evaluation | None = None

    def train(self, resume: bool) -> Path:
        tensorboard = self.config.tensorboard
        with closing(RunLog(self.out_dir, self.world.is_main, tensorboard, resume)) as self.log:
            self._begin(resume)
            self._loop()
            if self.saved_step != self.step:
                self._save_state()  # before what may yet fail or be interrupted
            if self.evaluation is None or self.step % self.config.eval_every:
                self._evaluate()  # else the loop has, at this very step
            if self.world.is_main:
                depth = self.learner.target.config.num_hidden_layers
                export(self.learner.head, self.out_dir, self._card(), num_target_layers=depth)
        return self.out_dir

    def _begin(self, resume: bool) -> None:
        if resume:
            self._load_state()
            self.log.rewind(self.step)
        else:
            self.learner.initialise(self.loader.first().to(self.device))
            if self.world.rank:  # noise of its own
                torch.manual_seed(self.config.seed + self.world.rank)
        self.learner.replicate()
        self.log.write(
            "start",
            config=asdict(self.config),
            processes=self.world.size,
            documents=len(self.documents),
            coverage=self.learner.coverage,
            parameters=sum(p.numel() for p in self.learner.head.parameters()),
            target_parameters=self.learner.target.num_parameters,
        )
        if scaling := rotary_scaling(self.learner.target.config):
            base = self.learner.head.config.rope_theta
            self.log.write("rotary embedding", target=scaling, head="not scaled", rope_theta=base)
        made_for = {account.get("target") for account in accounts(self.data_dirs)} - {None, ""}
        if others := sorted(made_for - {self.target_name}):
            # Perhaps only another name; another tokenizer's tokens would be learnt as they are.
            self.log.write("data of other targets", target=self.target_name, data=others)

    def _loop(self) -> None:
        self.clock.start(self.step, self.tokens_seen, self.loader.num_steps())
        with interruption.noted(patient=self.world.size > 1) as interrupted:
            for batches in self.loader.steps(self.step, self.device):
                progress = self.clock.progress(self.step)
                if progress >= 1:
                    break
                self._step(batches, progress)
                # One for all: they would note it at different steps, and wait for each other.
                if self.world.any(interrupted()):
                    self._check_finite()
                    self._save_state()
                    self.log.write("interrupted", step=self.step)
                    raise KeyboardInterrupt

        self._check_finite()

    def _step(self, batches: StepBatches, progress: float) -> None:
        measures, grad_norm = self.learner.optimise(batches, progress)
        self.step += 1
        self.tokens_seen += batches.num_tokens
        config = self.config
        # Here alone the host waits for the device, which it is ahead of in between.
        reading = config.log_every, config.eval_every, config.save_every
        if any(self.step % every == 0 for every in reading):
            self._check_finite()
        if self.step % config.log_every == 0:
            self._log_step(measures, grad_norm, progress)
        self.log.advance(progress, self.tokens_seen)
        if self.step % config.save_every == 0:
            self._save_state()  # before the evaluation, which may fail or be interrupted
        if self.step % config.eval_every == 0:
            self._evaluate()

    def _check_finite(self) -> None:
        try:
            self.learner.check_finite()
        except FloatingPointError as error:
            if self.saved_step is None:
                remedy = "start again"
            else:
                remedy = f"go on from step {self.saved_step} with --resume"
            raise ValueError(
                f"the gradient of step {self.learner.updates + 1} is not finite: nothing of it was"
                f" kept; lower --learning-rate (now {self.config.learning_rate:g}) or --clip, and "
                f"{remedy}"
            ) from error

    @torch.no_grad()
    def _evaluate(self) -> None:
        # A sharded target runs on all processes or on none.
        if not (self.world.is_main or self.config.shard_target):
            return
        learner = self.learner
        self.evaluation = evaluate(
            *(learner.head, learner.target, self.held_out, self.config, self.device),
            learner.measure,
            self.loader.group,
        )
        self.log.write("evaluation", step=self.step, **asdict(self.evaluation))

    def _log_step(self, measures: torch.Tensor, grad_norm: torch.Tensor, progress: float) -> None:
        loss, *rest = self.world.sum_(measures).tolist()
        K = self.learner.settings.num_steps
        self.log.write(
            "step",
            step=self.step,
            progress=progress,
            **self.clock.report(self.step, self.tokens_seen),
            learning_rate=self.learner.learning_rate,
            grad_norm=float(grad_norm),
            peak_memory_gib=peak_memory_gib(self.device),
            loss=loss,
            losses=rest[:K],
            accuracy=rest[K : 2 * K],
            accepted=rest[2 * K :],
        )
        self.log.advance(progress, self.tokens_seen, loss=f"{loss:.3f}", step=str(self.step))

    def _save_state(self) -> None:
        random_states = self.world.gather(checkpoints.random_state(self.device))
        if self.world.is_main:
            progress = checkpoints.Progress(self.step, self.tokens_seen, self.clock.seconds())
            of_run = progress, random_states, self.inputs
            checkpoints.save(self.out_dir, self.config, *self._trained(), *of_run)
        self.saved_step = self.step

    def _trained(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        return self.learner.head, self.learner.optimizer

    def _load_state(self) -> None:
        progress, random_states = checkpoints.load(
            self.out_dir, self.config, *self._trained(), self.inputs, self.world.size
        )
        self.step, self.tokens_seen = progress.step, progress.tokens_seen
        self.saved_step = progress.step
        self.clock.seconds_before = progress.seconds
        if len(random_states) == self.world.size:
            checkpoints.restore_random_state(random_states[self.world.rank], self.device)
        else:
            torch.manual_seed(self.config.seed + 1_000_003 * self.step + self.world.rank)
            self.log.write(
                "other processes",
                step=self.step,
                before=len(random_states),
                now=self.world.size,
                equal="the batches and their order",
                different="the rounding of sums, and noise",
            )

    def _card(self) -> str:
        learner = self.learner
        facts = {
            "target": self.target_name,
            "title": learner.objective.title,
            "method": learner.objective.method,
            "draft_vocab_size": len(learner.head.d2t),
            "documents": len(self.documents),
            "tokens": sum(len(d.tokens) for d in self.documents),
            "assistant_tokens": int(sum(d.assistant.sum() for d in self.documents)),
            "coverage": learner.coverage,
            "steps": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.clock.seconds(),
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "CPU",
            "processes": self.world.size,
            "config": asdict(self.config)
            | {"num_ttt_steps": learner.settings.num_steps, "ttt_decay": learner.settings.decay},
            "evaluation": rounded(asdict(self.evaluation)),
        }
        write_json(self.out_dir / "training.json", facts)
        return model_card(facts, self.data_dirs)
