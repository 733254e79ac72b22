"""The training loop: data in, head out."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.corpus import read_corpus, write_json
from vllm_eagle3.train import state
from vllm_eagle3.train.card import model_card
from vllm_eagle3.train.data import TokenBatch, epoch_batches, split_held_out
from vllm_eagle3.train.export import export
from vllm_eagle3.train.features import Target, load_target
from vllm_eagle3.train.initialise import initialise
from vllm_eagle3.train.model import Eagle3Head, HeadConfig
from vllm_eagle3.train.settings import TrainConfig, add_arguments, config_from_arguments
from vllm_eagle3.train.ttt import TTTBatch, TTTResult, ttt_loss
from vllm_eagle3.train.vocabulary import frequent_tokens

STATE_FILE = "training_state.pt"
LOG_FILE = "training_log.jsonl"
_BETAS = (0.9, 0.95)

__all__ = ["TrainConfig", "add_arguments", "run", "train"]


def run(args: argparse.Namespace) -> None:
    """The command ``vllm-eagle3 train``."""
    config = config_from_arguments(args)
    print(f"wrote {train(args.target, args.data, args.out, config, args.device, args.resume)}")


def train(
    target: str | Path,
    data_dir: Path,
    out_dir: Path,
    config: TrainConfig | None = None,
    device: str | None = None,
    resume: bool = False,
) -> Path:
    """Train a head for ``target`` on ``data_dir`` and write it to ``out_dir``.

    ``out_dir`` gets the checkpoint with its model card, a log of JSON lines, and a state to
    resume from.

    Args:
        target: a Llama checkpoint, folder or hub name.
        data_dir: shards of ``vllm-eagle3 data synth``.
        device: ``"cuda"``, ``"cpu"``; None takes CUDA where there is some.
        resume: go on from ``out_dir``'s state; the data and the config must be the same.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: no data, an unsuitable target, or a state of another configuration.
    """
    config = config or TrainConfig()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _Trainer(target, Path(data_dir), Path(out_dir), config, chosen).train(resume)


class _Trainer:
    def __init__(
        self,
        target: str | Path,
        data_dir: Path,
        out_dir: Path,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.config, self.out_dir, self.device = config, out_dir, device
        self.target_name, self.data_dir = str(target), data_dir
        out_dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        corpus = read_corpus(data_dir)
        self.documents, self.held_out = split_held_out(corpus, config.held_out, config.seed)
        # Half precision only where it is fast; the master weights are float32 everywhere.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = load_target(target, device, self.dtype)
        head_config = HeadConfig.from_target(model.config, config.draft_vocab_size)
        self.target = Target(model, head_config.aux_layer_ids)
        ids, self.coverage = frequent_tokens(
            self.documents,
            head_config.vocab_size,
            config.draft_vocab_size,
            always=self.target.end_token_ids,
        )
        self.head = Eagle3Head(head_config, self.target.embedding, ids).to(device)
        self.draft_token_ids = ids.to(device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.step = 0
        self.tokens_seen = 0
        self.seconds_before = 0.0
        self.evaluation: dict[str, Any] = {}

    def train(self, resume: bool) -> Path:
        if resume:
            self._load_state()
        else:
            (self.out_dir / LOG_FILE).unlink(missing_ok=True)
            sample = self._read(next(self._batches(0)))
            initialise(self.head, self.target, sample)
        self._log(
            event="start",
            config=asdict(self.config),
            documents=len(self.documents),
            coverage=self.coverage,
            parameters=sum(p.numel() for p in self.head.parameters()),
        )
        self._loop()
        self._evaluate()
        self._save_state()
        return export(self.head, self.out_dir, self._card())

    def _loop(self) -> None:
        from tqdm import tqdm

        total_steps = self._total_steps()
        self.started = time.monotonic()
        bar = tqdm(total=100, unit="%", desc="training", disable=not sys.stderr.isatty())
        for batch in self._batches(self.step):
            progress = self._progress(total_steps)
            if progress >= 1:
                break
            result, grad_norm = self._optimise(batch, progress)
            self.step += 1
            self.tokens_seen += batch.tokens_BT.numel()
            if self.step % self.config.log_every == 0:
                self._log_step(result, grad_norm, progress)
                bar.set_postfix(loss=f"{result.loss.item():.3f}", step=self.step)
            bar.update(int(100 * progress) - bar.n)
            if self.step % self.config.eval_every == 0:
                self._evaluate()
            if self.step % self.config.save_every == 0:
                self._save_state()
        bar.close()

    def _optimise(self, batch: TokenBatch, progress: float) -> tuple[TTTResult, torch.Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(progress)
        result = self._forward(batch)
        result.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result, grad_norm

    def _forward(self, batch: TokenBatch) -> TTTResult:
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            return ttt_loss(
                self.head,
                self._read(batch),
                self.config.num_ttt_steps,
                self.config.ttt_decay,
                self.config.attention,
            )

    def _read(self, batch: TokenBatch) -> TTTBatch:
        return self.target.read(batch, self.draft_token_ids, self.head.t2d)

    @torch.no_grad()
    def _evaluate(self) -> None:
        batches = epoch_batches(
            self.held_out, self.config.batch_tokens, self.config.max_length, self.config.seed
        )
        results = [
            self._forward(batch.to(self.device))
            for batch in itertools.islice(batches, self.config.eval_batches)
        ]
        if not all(torch.isfinite(r.losses_K).all() for r in results):
            raise RuntimeError(
                f"the loss is not finite at step {self.step}: lower learning_rate, and resume "
                f"from {self.out_dir / STATE_FILE} or start anew"
            )

        def mean(name: str) -> list[float]:
            return torch.stack([getattr(r, name) for r in results]).mean(0).tolist()

        self.evaluation = {
            "losses": mean("losses_K"),
            "accuracy": mean("accuracy_K"),
            "accepted": mean("accepted_K"),
        }
        self.evaluation["chain_tau"] = 1 + sum(self.evaluation["accepted"])
        self._log(event="evaluation", step=self.step, **_rounded(self.evaluation))

    def _epoch(self, index: int) -> Iterator[TokenBatch]:
        config = self.config
        return epoch_batches(
            self.documents, config.batch_tokens, config.max_length, config.seed * 1000 + index
        )

    def _batches(self, start: int) -> Iterator[TokenBatch]:
        """All batches of the run from batch ``start`` on; the order depends on the seed only."""
        epochs = map(self._epoch, range(self.config.epochs))
        for batch in itertools.islice(itertools.chain.from_iterable(epochs), start, None):
            yield batch.to(self.device)

    def _total_steps(self) -> int:
        by_data = self.config.epochs * sum(1 for _ in self._epoch(0))
        return by_data if self.config.steps is None else min(by_data, self.config.steps)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _progress(self, total_steps: int) -> float:
        """Share of the run that is over, by steps or by time, whichever ends first."""
        progress = self.step / total_steps
        if self.config.minutes is not None:
            progress = max(progress, self._seconds() / (60 * self.config.minutes))
        return progress

    def _log_step(self, result: TTTResult, grad_norm: torch.Tensor, progress: float) -> None:
        self._log(
            event="step",
            step=self.step,
            progress=round(progress, 4),
            seconds=round(self._seconds(), 1),
            tokens_per_second=round(self.tokens_seen / self._seconds()),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=round(float(grad_norm), 4),
            **_rounded(
                {
                    "loss": result.loss.item(),
                    "losses": result.losses_K.tolist(),
                    "accuracy": result.accuracy_K.tolist(),
                    "accepted": result.accepted_K.tolist(),
                }
            ),
        )

    def _log(self, **entry: Any) -> None:
        line = json.dumps(entry)
        with (self.out_dir / LOG_FILE).open("a") as file:
            file.write(line + "\n")
        if not sys.stderr.isatty():
            print(line, flush=True)

    def _save_state(self) -> None:
        state.save(
            self.out_dir / STATE_FILE,
            self.config,
            self.head,
            self.optimizer,
            state.Progress(self.step, self.tokens_seen, self._seconds()),
        )

    def _load_state(self) -> None:
        progress = state.load(self.out_dir / STATE_FILE, self.config, self.head, self.optimizer)
        self.step, self.tokens_seen = progress.step, progress.tokens_seen
        self.seconds_before = progress.seconds

    def _card(self) -> str:
        facts = {
            # The name alone: a card is shared, a path is this machine's.
            "target": Path(self.target_name).name,
            "documents": len(self.documents),
            "tokens": sum(len(d.tokens) for d in self.documents),
            "assistant_tokens": int(sum(d.assistant.sum() for d in self.documents)),
            "coverage": self.coverage,
            "steps": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self._seconds(),
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "CPU",
            "config": asdict(self.config),
            "evaluation": _rounded(self.evaluation),
        }
        write_json(self.out_dir / "training.json", facts)
        return model_card(facts, self.data_dir)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        return [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4)

    return {name: one(value) for name, value in values.items()}
