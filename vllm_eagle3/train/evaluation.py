"""What a head is worth, measured on documents kept out of training.

Losses and accuracies are those of the objective. Mean acceptance lengths (tau: tokens emitted
for each forward of the target, the bonus token included) are predicted by drafting and verifying
offline. The roots are those that a server would draft from while it emits the documents: the
walk along a document goes from a root past the drafts that equal the document and one token
further. For each root the tree is scored at every temperature:

    tau(T)        1 + mean over roots of the expected number of accepted drafts at temperature T
    tau of text   tokens walked / roots: what a server whose draws were the documents would reach

At temperature 0 the roots are still those of the documents, which were sampled.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.corpus import Document
from vllm_eagle3.train.data import TokenBatch, epoch_batches
from vllm_eagle3.train.drafting import DocumentDrafter
from vllm_eagle3.train.features import FeatureBatch, Target
from vllm_eagle3.train.model import DraftHead
from vllm_eagle3.train.objectives import LossResult
from vllm_eagle3.train.scoring import accepted_of_document, path_probabilities
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
        accepted: by temperature, the share of rounds that accept a draft of depth 1, 2, ...:
            the sums of these are ``tau - 1``.
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
    read: Callable[[TokenBatch], FeatureBatch],
) -> Evaluation:
    """Measure ``head`` on held-out documents.

    Args:
        forward: the objective on a batch of tokens.
        read: the target's states for a batch of tokens, as the head takes them.
    """
    batches = epoch_batches(documents, config.batch_tokens, config.max_length, config.seed)
    results = [
        forward(batch.to(device)) for batch in itertools.islice(batches, config.eval_batches)
    ]

    def mean(name: str) -> list[float]:
        return torch.stack([getattr(r, name) for r in results]).mean(0).tolist()

    accepted = mean("accepted_K")
    predicted = {}
    if config.eval_documents:
        chosen = documents[: config.eval_documents]
        longest = min(config.max_length, _LONGEST)
        dtype = target.embedding.dtype
        with torch.autocast(device.type, dtype, dtype == torch.bfloat16):
            predicted = predict(head, target, chosen, config.trees(), read, longest)
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
    read: Callable[[TokenBatch], FeatureBatch],
    longest: int = _LONGEST,
) -> dict[str, Prediction]:
    """Predicted acceptance of each tree; documents without an answer are passed over."""
    tallies = {name: _Tally(config) for name, config in trees.items()}
    for document in documents:
        tokens_T = torch.from_numpy(document.tokens[:longest].astype("int64")).to(head.d2t.device)
        assistant_T = torch.from_numpy(document.assistant[:longest]).to(head.d2t.device)
        slots_R = _possible_roots(assistant_T)
        if not len(slots_R):
            continue
        batch = TokenBatch(tokens_T.unsqueeze(0), assistant_T.unsqueeze(0))
        features_TF = read(batch).features_BTF[0]
        drafter = DocumentDrafter(head, tokens_T, features_TF)
        for tally in tallies.values():
            tally.add(target, drafter, slots_R)
    return {name: tally.result() for name, tally in tallies.items() if tally.roots}


class _Tally:
    """Sums over the roots of several documents."""

    def __init__(self, config: TreeConfig) -> None:
        self.config = config
        self.roots = self.emitted = 0
        self.accepted_D = {
            temperature: torch.zeros(config.depth, dtype=torch.float64)
            for temperature in TEMPERATURES
        }

    def add(self, target: Target, drafter: DocumentDrafter, slots_R: torch.Tensor) -> None:
        tokens_T = drafter.tokens_T
        trees = drafter.trees(slots_R, self.config)
        accepted_R = accepted_of_document(tokens_T, slots_R, trees).tolist()
        visited = _walk(slots_R.tolist(), accepted_R)
        self.roots += len(visited)
        self.emitted += sum(accepted_R[index] + 1 for index in visited)
        kept = torch.tensor(visited, device=slots_R.device)
        trees = type(trees)(*(value[kept] for value in vars(trees).values()))
        scores = path_probabilities(target, tokens_T, slots_R[kept], trees, TEMPERATURES)
        depths = trees.depths_BN.flatten().long().cpu()
        for temperature, probs_RN in zip(TEMPERATURES, scores, strict=True):
            by_depth = torch.zeros(self.config.depth + 1, dtype=torch.float64)
            by_depth.index_add_(0, depths, probs_RN.flatten().double().cpu())
            self.accepted_D[temperature] += by_depth[1:]

    def result(self) -> Prediction:
        shares = {f"T={t:g}": (sums / self.roots).tolist() for t, sums in self.accepted_D.items()}
        return Prediction(
            roots=self.roots,
            tau={name: 1 + sum(share) for name, share in shares.items()},
            tau_of_text=self.emitted / self.roots,
            accepted=shares,
        )


def _possible_roots(assistant_T: torch.Tensor) -> torch.Tensor:
    """Slots p whose root (token p+1) and next token (p+2) are the assistant's."""
    return (assistant_T[1:-1] & assistant_T[2:]).nonzero().squeeze(1)


def _walk(slots: list[int], accepted: list[int]) -> list[int]:
    """Indices of the roots that are drafted from, ``slots`` rising."""
    visited, beyond = [], -1
    for index, slot in enumerate(slots):
        if slot >= beyond:
            visited.append(index)
            beyond = slot + accepted[index] + 1
    return visited
