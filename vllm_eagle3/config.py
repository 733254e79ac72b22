"""The shape of a draft tree, validated once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

MAX_NODES = 64  # one int64 word of ancestor bits for each node
MAX_EXPANDED = 64  # likewise for the draft's own attention, over the nodes it expands

# With the root 32 rows: four query heads for each key head fill one 128-row attention tile.
DEFAULT_NUM_SPECULATIVE_TOKENS = 31
_DEFAULT_DEPTH = 6
_DEFAULT_TOP_K = 8
_KEYS = ("depth", "top_k")


@dataclass(frozen=True)
class TreeConfig:
    """A draft tree of ``num_speculative_tokens`` nodes below the root.

    Source: EAGLE-2 (arXiv 2406.16858), section 4: expansion to ``depth`` levels with
    ``top_k`` children for each node, then reranking to the best nodes.

    Attributes:
        num_speculative_tokens: draft tokens verified for each target forward (N - 1).
        depth: levels below the root that the draft expands (D).
        top_k: children for each expanded node, and nodes expanded for each level (K).

    Raises:
        ValueError: a size that is not a positive integer, or more draft tokens than
            ``depth`` levels of ``top_k`` can make or than one 64-bit mask holds, or more
            expanded nodes than one holds.
    """

    num_speculative_tokens: int
    depth: int = _DEFAULT_DEPTH
    top_k: int = _DEFAULT_TOP_K

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "depth", "top_k"):
            value = getattr(self, name)
            # bool is an int to Python, and `"depth": true` is a mistake worth naming.
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{_path(name)} must be an integer of at least 1, got {value!r}")
        if self.num_nodes > MAX_NODES:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} is more than a tree "
                f"can hold: use at most {MAX_NODES - 1}"
            )
        if self.num_speculative_tokens > self.num_candidates:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} is more than a tree of "
                f"depth={self.depth} and top_k={self.top_k} can make "
                f"({self.num_candidates} nodes): lower it, or raise tree.depth or tree.top_k"
            )
        if self.num_expanded > MAX_EXPANDED:
            raise ValueError(
                f"tree.depth={self.depth} and tree.top_k={self.top_k} expand "
                f"(depth - 1) * top_k = {self.num_expanded} nodes, more than {MAX_EXPANDED}: "
                f"lower tree.depth or tree.top_k"
            )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any] | bool, num_speculative_tokens: int) -> Self:
        """Read the ``tree`` key of a speculative config.

        Args:
            tree: ``{"depth": int, "top_k": int}``, either key optional, or ``True`` for
                the defaults.
            num_speculative_tokens: the key of that name beside ``tree``.

        Raises:
            ValueError: ``tree`` is of another type, has an unknown key, or describes an
                impossible shape.
        """
        if tree is True:
            return cls._default(num_speculative_tokens)
        if not isinstance(tree, Mapping):
            raise ValueError(
                f'tree must be true or an object such as {{"depth": 6, "top_k": 8}}, got {tree!r};'
                " leave the key out to serve a chain"
            )
        unknown = sorted(map(repr, set(tree) - set(_KEYS)))
        if unknown:
            raise ValueError(
                f"unknown key {', '.join(unknown)} in tree: use {' and '.join(_KEYS)}"
                " (the number of nodes is num_speculative_tokens)"
            )
        return cls(num_speculative_tokens, **tree)

    @classmethod
    def _default(cls, num_speculative_tokens: int) -> Self:
        """The default depth and width, both raised no further than the node count needs."""
        if isinstance(num_speculative_tokens, int) and num_speculative_tokens < _DEFAULT_TOP_K:
            # Fewer nodes than one level offers: a shape no wider and no deeper than them.
            size = max(1, num_speculative_tokens)
            return cls(num_speculative_tokens, depth=min(_DEFAULT_DEPTH, size), top_k=size)
        return cls(num_speculative_tokens)

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, root included (N)."""
        return self.num_speculative_tokens + 1

    @property
    def num_candidates(self) -> int:
        """Candidates the expansion offers to the reranking: K + (D - 1) * K * K."""
        return self.top_k + (self.depth - 1) * self.top_k**2

    @property
    def num_expanded(self) -> int:
        """Nodes the draft runs a forward over: (D - 1) * K."""
        return (self.depth - 1) * self.top_k

    def check_draft_vocabulary(self, draft_vocab_size: int) -> None:
        """Raise ``ValueError`` if a node cannot have ``top_k`` different children."""
        if self.top_k > draft_vocab_size:
            raise ValueError(
                f"tree.top_k={self.top_k} is more than the draft vocabulary of "
                f"{draft_vocab_size} tokens: lower tree.top_k"
            )

    def to_dict(self) -> dict[str, int]:
        """The ``tree`` key that :meth:`from_dict` reads."""
        return {"depth": self.depth, "top_k": self.top_k}


def _path(name: str) -> str:
    return f"tree.{name}" if name in _KEYS else name
