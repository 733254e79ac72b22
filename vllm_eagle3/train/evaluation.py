"""What a head is worth, measured on documents kept out of training.

Losses and accuracies are those of the objective, means over batches by their roots. Mean
acceptance lengths (tau: tokens emitted for each forward of the target, the bonus token included)
are predicted by drafting and verifying offline, in the rounds of :mod:`vllm_eagle3.train.rounds`:
those of a server that emits the documents. For each root the tree is scored at every temperature:

    tau(T)        mean over rounds of the expected number of tokens at temperature T
    tau of text   tokens / rounds: what a server whose draws were the documents would reach

At temperature 0 the roots are still those of the documents, which were sampled.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import TokenBatch, epoch_batches
from vllm_eagle3.train.features import Target
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.objectives import LossResult
from vllm_eagle3.train.objectives.slots import counted_slots
from vllm_eagle3.train.rounds import Replay, Rounds, batches_to_replay
from vllm_eagle3.train.settings import TrainConfig

TEMPERATURES = (0.0, 1.0)
_LONGEST = 1024  # tokens of a document that are drafted on


@dataclass(frozen=True)
class Prediction:
    """What a chain or a tree would do.

    Attributes:
        roots: rounds of drafting that the means are over.
        tau: by temperature, ``"T=0"`` and ``"T=1"``.
        tau_of_text: where the target's draws are the documents themselves.
        accepted: by temperature, the share of rounds that accept a draft of depth 1, 2, ... and
            emit a token after it: the sums of these are ``tau - 1``.
    """

    roots: int
    tau: dict[str, float]
    tau_of_text: float
    accepted: dict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """Held-out measures.

    Attributes:
        losses, accuracy, accepted: by draft step, as in ``LossResult``.
        chain_tau: 1 + sum of ``accepted``: every position of the documents as a root.
        predicted: by the name of the chain or tree.
    """

    losses: list[float]
    accuracy: list[float]
    accepted: list[float]
    chain_tau: float
    predicted: dict[str, Prediction] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    head: DraftHead,
    target: Target,
    documents: Sequence[Document],
    config: TrainConfig,
    device: torch.device,
    forward: Callable[[TokenBatch], LossResult],
    num_parts: int = 1,
) -> Evaluation:
    """Measure ``head`` on held-out documents.

    Args:
        forward: the objective on a batch of tokens.
        num_parts: that a step of training is read in; a batch is read in as many, so that what
            fits into the memory in training does here.
    """
    part_tokens = config.batch_tokens // num_parts
    batches = epoch_batches(documents, part_tokens, config.max_length, config.seed)
    results, roots = [], []
    for batch in itertools.islice(batches, config.eval_batches * num_parts):
        results.append(forward(batch.to(device)))
        roots.append(len(counted_slots(batch.assistant_BT, 0)))
    num_roots = max(1, sum(roots))

    def mean(name: str) -> list[float]:
        parts = zip(results, roots, strict=True)
        return sum(getattr(r, name) * (count / num_roots) for r, count in parts).tolist()

    accepted = mean("accepted_K")
    predicted = {}
    if config.eval_documents:
        chosen = documents[: config.eval_documents]
        longest = min(config.max_length, _LONGEST)
        predicted = predict(head, target, chosen, config.trees(), longest)
    return Evaluation(
        losses=mean("losses_K"),
        accuracy=mean("accuracy_K"),
        accepted=accepted,
        chain_tau=1 + sum(accepted),
        predicted=predicted,
    )


@torch.no_grad()
def predict(
    head: DraftHead,
    target: Target,
    documents: Sequence[Document],
    trees: dict[str, TreeConfig],
    longest: int = _LONGEST,
) -> dict[str, Prediction]:
    """Predicted acceptance of each tree; documents without an answer are passed over."""
    tallies = {name: _Tally(config) for name, config in trees.items()}
    cut = [Document(d.tokens[:longest], d.assistant[:longest]) for d in documents]
    answered = [document for document in cut if document.assistant.any()]
    for numbers in batches_to_replay(answered):
        replay = Replay(target, head, [answered[number] for number in numbers])
        for tally in tallies.values():
            for rounds in replay.rounds(tally.config, TEMPERATURES):
                if rounds is not None:
                    tally.add(rounds)
    return {name: tally.result() for name, tally in tallies.items() if tally.roots}


class _Tally:
    """Sums over the rounds of several documents."""

    def __init__(self, config: TreeConfig) -> None:
        self.config = config
        self.roots = self.emitted = 0
        self.accepted_D = {
            temperature: torch.zeros(config.depth, dtype=torch.float64)
            for temperature in TEMPERATURES
        }

    def add(self, rounds: Rounds) -> None:
        self.roots += len(rounds.roots_R)
        self.emitted += int(rounds.emitted_R.sum())
        for temperature, exceeds_RD in rounds.exceeds_TRD.items():
            self.accepted_D[temperature] += exceeds_RD.sum(0)

    def result(self) -> Prediction:
        shares = {f"T={t:g}": (sums / self.roots).tolist() for t, sums in self.accepted_D.items()}
        return Prediction(
            roots=self.roots,
            tau={name: 1 + sum(share) for name, share in shares.items()},
            tau_of_text=self.emitted / self.roots,
            accepted=shares,
        )
