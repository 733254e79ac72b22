"""The training loop: data in, head out.

One process for each GPU; ``torchrun -m vllm_eagle3.cli train ...`` starts several.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vllm_eagle3.corpus import read_corpus, write_json
from vllm_eagle3.train import checkpoints, interruption
from vllm_eagle3.train.card import model_card
from vllm_eagle3.train.clock import Clock
from vllm_eagle3.train.data import TokenBatch, check_tokens, split_held_out
from vllm_eagle3.train.distributed import World, is_main_process, joined
from vllm_eagle3.train.evaluation import Evaluation, evaluate
from vllm_eagle3.train.export import export
from vllm_eagle3.train.features import FeatureBatch, Target, load_target
from vllm_eagle3.train.loader import Loader, StepBatches
from vllm_eagle3.train.logs import RunLog, peak_memory_gib, rounded
from vllm_eagle3.train.objectives import OBJECTIVES, LossResult, LossSettings
from vllm_eagle3.train.packing import Packing
from vllm_eagle3.train.recompute import recompute_mlps
from vllm_eagle3.train.settings import TrainConfig, add_arguments, config_from_arguments
from vllm_eagle3.train.vocabulary import frequent_tokens

_BETAS = (0.9, 0.95)

__all__ = ["TrainConfig", "add_arguments", "run", "train"]


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 train``."""
    config = config_from_arguments(args)
    out_dir = train(args.target, args.data, args.out, config, args.device, args.resume)
    if is_main_process():
        print(f"wrote {out_dir}")


def train(
    target: str | Path,
    data_dir: Path,
    out_dir: Path,
    config: TrainConfig | None = None,
    device: str | None = None,
    resume: bool = False,
) -> Path:
    """Train a head for ``target`` on ``data_dir`` and write it to ``out_dir``.

    ``out_dir`` gets the checkpoint with its model card, a log of JSON lines, and the last two
    states to resume from.

    Args:
        target: a Llama checkpoint, folder or hub name.
        data_dir: shards of ``vllm-eagle3 data synth``.
        device: ``"cuda"``, ``"cpu"``; None takes CUDA where there is some.
        resume: go on from ``out_dir``'s state; the data and the config must be the same.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: no data, an unsuitable target, a state of another configuration, a full
            disk, or a loss that is not finite.
    """
    with joined(device) as (world, chosen):
        paths = Path(data_dir), Path(out_dir)
        return _Trainer(target, *paths, config or TrainConfig(), chosen, world).train(resume)


class _Trainer:
    def __init__(
        self,
        target: str | Path,
        data_dir: Path,
        out_dir: Path,
        config: TrainConfig,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.out_dir, self.device, self.world = config, out_dir, device, world
        self.target_name, self.data_dir = str(target), data_dir
        out_dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        corpus = read_corpus(data_dir)
        self.documents, self.held_out = split_held_out(corpus, config.held_out, config.seed)
        # Half precision only where it is fast; the master weights are float32 everywhere.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = load_target(target, device, self.dtype)
        self.objective = OBJECTIVES[config.objective]
        self.settings = replace(self.objective.settings, **config.loss_changes())
        head_config = self.objective.head_config(model.config, config.draft_vocab_size)
        check_tokens(corpus, head_config.vocab_size)
        self.target = Target(model, head_config.aux_layer_ids)
        ids, self.coverage = frequent_tokens(
            self.documents,
            head_config.vocab_size,
            head_config.draft_vocab_size,
            always=self.target.end_token_ids,
        )
        self.head = self.objective.make_head(head_config, self.target, ids).to(device)
        if config.recompute:
            recompute_mlps(self.head)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.packing = Packing(model.model, self.head)
        self.loader = Loader(self.documents, config, world, self.settings.num_steps)
        self.step = self.tokens_seen = 0
        self.saved_step: int | None = None
        self.clock = Clock(config.minutes, world, device)
        self.evaluation: Evaluation | None = None

    def train(self, resume: bool) -> Path:
        self.log = RunLog(self.out_dir, self.world.is_main, self.config.tensorboard, resume)
        if resume:
            self._load_state()
            self.log.rewind(self.step)
        else:
            sample = self.loader.first().to(self.device)
            with self.packing.of(sample):
                self.objective.initialise(self.head, self.target, self._read(sample))
        self.world.share_weights(self.head)
        self.log.write(
            "start",
            config=asdict(self.config),
            processes=self.world.size,
            documents=len(self.documents),
            coverage=self.coverage,
            parameters=sum(p.numel() for p in self.head.parameters()),
        )
        self._loop()
        self._evaluate()
        self._save_state()
        self.log.close()
        if self.world.is_main:
            export(self.head, self.out_dir, self._card())
        return self.out_dir

    def _loop(self) -> None:
        self.clock.start(self.step, self.tokens_seen, self.loader.num_steps())
        # Several processes would note a signal at different steps, and wait for each other.
        with interruption.noted(self.world.size == 1) as interrupted:
            for batches in self.loader.steps(self.step, self.device):
                progress = self.clock.progress(self.step)
                if progress >= 1:
                    break
                self._step(batches, progress)
                if interrupted():
                    self._save_state()
                    self.log.write("interrupted", step=self.step)
                    raise KeyboardInterrupt

    def _step(self, batches: StepBatches, progress: float) -> None:
        measures, grad_norm = self._optimise(batches, progress)
        self.step += 1
        self.tokens_seen += batches.num_tokens
        if self.step % self.config.log_every == 0:
            self._log_step(measures, grad_norm, progress)
        self.log.advance(progress, self.tokens_seen)
        if self.step % self.config.eval_every == 0:
            self._evaluate()
        if self.step % self.config.save_every == 0:
            self._save_state()

    def _optimise(self, batches: StepBatches, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: the measures of this process's share of the step, and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(progress)
        measures = torch.zeros(1 + 3 * self.settings.num_steps, device=self.device)
        for batch, share in batches.parts:
            result = self._forward(batch)
            (result.loss * share).backward()
            measures += share * _as_vector(result)
        self.world.sum_gradients(self.head)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        # Of the summed gradient, so that all processes stop together, and before the optimiser
        # has seen it.
        if not torch.isfinite(grad_norm):
            raise ValueError(self._not_finite())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return measures, grad_norm

    def _forward(self, batch: TokenBatch, settings: LossSettings | None = None) -> LossResult:
        half = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        with self.packing.of(batch), half:
            return self.objective.loss(self.head, self._read(batch), settings or self.settings)

    def _read(self, batch: TokenBatch) -> FeatureBatch:
        return self.objective.read(self.target, batch, self.head)

    def _not_finite(self) -> str:
        if self.saved_step is None:
            remedy = "start again"
        else:
            remedy = f"go on from step {self.saved_step} with --resume"
        return (
            f"the gradient of step {self.step + 1} is not finite: nothing of it was kept; lower "
            f"--learning-rate (now {self.config.learning_rate:g}) or --clip, and {remedy}"
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        if not self.world.is_main:
            return
        # Noise is for training; a measure must not depend on it, nor draw from its generator.
        quiet = replace(self.settings, feature_noise=0.0)
        self.evaluation = evaluate(
            self.head,
            self.target,
            self.held_out,
            self.config,
            self.device,
            lambda batch: self._forward(batch, quiet),
        )
        self.log.write("evaluation", step=self.step, **asdict(self.evaluation))

    def _log_step(self, measures: torch.Tensor, grad_norm: torch.Tensor, progress: float) -> None:
        loss, *rest = self.world.sum_(measures).tolist()
        K = self.settings.num_steps
        self.log.write(
            "step",
            step=self.step,
            progress=progress,
            **self.clock.report(self.step, self.tokens_seen),
            learning_rate=self.optimizer.param_groups[0]["lr"],
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
            checkpoints.save(
                self.out_dir, self.config, self.head, self.optimizer, progress, random_states
            )
        self.saved_step = self.step

    def _load_state(self) -> None:
        progress, random_states = checkpoints.load(
            self.out_dir, self.config, self.head, self.optimizer, self.world.size
        )
        self.step, self.tokens_seen = progress.step, progress.tokens_seen
        self.saved_step = progress.step
        self.clock.seconds_before = progress.seconds
        checkpoints.restore_random_state(random_states[self.world.rank], self.device)

    def _card(self) -> str:
        facts = {
            # The name alone: a card is shared, a path is this machine's.
            "target": Path(self.target_name).name,
            "title": self.objective.title,
            "method": self.objective.method,
            "draft_vocab_size": len(self.head.d2t),
            "documents": len(self.documents),
            "tokens": sum(len(d.tokens) for d in self.documents),
            "assistant_tokens": int(sum(d.assistant.sum() for d in self.documents)),
            "coverage": self.coverage,
            "steps": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.clock.seconds(),
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "CPU",
            "processes": self.world.size,
            "config": asdict(self.config)
            | {"num_ttt_steps": self.settings.num_steps, "ttt_decay": self.settings.decay},
            "evaluation": rounded(asdict(self.evaluation)),
        }
        write_json(self.out_dir / "training.json", facts)
        return model_card(facts, self.data_dir)


def _as_vector(result: LossResult) -> torch.Tensor:
    return torch.cat(
        [
            result.loss.detach().float().reshape(1),
            result.losses_K,
            result.accuracy_K,
            result.accepted_K,
        ]
    )
