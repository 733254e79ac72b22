"""Documents by what they are about: hashed TF-IDF and spherical k-means, in numpy.

Tokens stand for words, so no language needs rules of its own, and documents of different
languages or domains part by themselves. Template tokens are in every document and weigh
nothing. Enough for a look at a corpus, not a taxonomy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_DIMENSIONS = 2048
_FIT_DOCUMENTS = 20_000
_CHUNK = 4096
_ITERATIONS = 30
_HASH = 2654435761  # Knuth's multiplicative hashing


@dataclass(frozen=True)
class Clusters:
    """``centres_KF`` float32, unit rows; ``idf_F`` float32, weights of the hashed tokens."""

    centres_KF: np.ndarray
    idf_F: np.ndarray

    @classmethod
    def fit(cls, documents: Sequence[np.ndarray], count: int, seed: int) -> "Clusters":
        """At most ``count`` clusters of token-id arrays; of many, a sample decides."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(documents))[:_FIT_DOCUMENTS]
        counts_DF = np.concatenate(list(_counts([documents[i] for i in order])))
        seen_F = (counts_DF > 0).sum(0)
        idf_F = np.log((1 + len(order)) / (1 + seen_F)).astype(np.float32)
        points_DF = _unit(counts_DF * idf_F)
        return cls(_k_means(points_DF, min(count, len(order)), rng), idf_F)

    def assign(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """The cluster of every document, int64 [D]."""
        nearest = [
            (_unit(counts_DF * self.idf_F) @ self.centres_KF.T).argmax(1)
            for counts_DF in _counts(documents)
        ]
        return np.concatenate(nearest) if nearest else np.zeros(0, np.int64)


def typical_tokens(
    documents: Sequence[np.ndarray], cluster_D: np.ndarray, clusters: int
) -> list[np.ndarray]:
    """For every cluster, its token ids by how much they tell it from the others, best first.

    The measure is a token's part of the Kullback-Leibler divergence between the cluster's
    documents and all documents, by the number of documents that hold the token.
    """
    size = 1 + max((int(d.max()) for d in documents if len(d)), default=0)
    held_KV = np.zeros((clusters, size))
    for document, cluster in zip(documents, cluster_D, strict=True):
        held_KV[cluster, np.unique(document)] += 1
    share_KV = held_KV / np.maximum(np.bincount(cluster_D, minlength=clusters), 1)[:, None]
    all_V = held_KV.sum(0) / max(1, len(documents))
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_KV = np.nan_to_num(share_KV * np.log(share_KV / all_V))
    return list(np.argsort(-gain_KV, axis=1, kind="stable"))


def _counts(documents: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Dampened counts of hashed tokens, float32 [chunk, F] each."""
    for start in range(0, len(documents), _CHUNK):
        chunk = documents[start : start + _CHUNK]
        rows = np.repeat(np.arange(len(chunk)), [len(d) for d in chunk])
        tokens = np.concatenate(chunk).astype(np.uint64)
        hashed = (tokens * np.uint64(_HASH) & np.uint64(0xFFFFFFFF)) >> np.uint64(21)
        flat = rows * _DIMENSIONS + hashed.astype(np.int64)
        counts = np.bincount(flat, minlength=len(chunk) * _DIMENSIONS)
        yield np.log1p(counts, dtype=np.float32).reshape(len(chunk), _DIMENSIONS)


def _unit(rows_DF: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows_DF, axis=1, keepdims=True)
    return (rows_DF / np.maximum(norms, 1e-12)).astype(np.float32)


def _k_means(points_DF: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit centres, begun far from each other (k-means++)."""
    centres_KF = points_DF[rng.integers(len(points_DF))][None]
    while len(centres_KF) < count:
        distance_D = np.maximum(1 - (points_DF @ centres_KF.T).max(1), 0).astype(np.float64)
        if distance_D.sum() < 1e-6:  # fewer distinct documents than clusters
            break
        chosen = rng.choice(len(points_DF), p=distance_D / distance_D.sum())
        centres_KF = np.concatenate([centres_KF, points_DF[chosen][None]])
    nearest_D = None
    for _ in range(_ITERATIONS):
        before, nearest_D = nearest_D, (points_DF @ centres_KF.T).argmax(1)
        if before is not None and np.array_equal(before, nearest_D):
            break
        for k in range(len(centres_KF)):
            if (members := points_DF[nearest_D == k]).size:
                centres_KF[k] = _unit(members.sum(0, keepdims=True))[0]
    return centres_KF
