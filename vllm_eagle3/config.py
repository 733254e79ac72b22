"""The shape of a draft tree, validated once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm_eagle3.paths import Paths, depth_of, read_paths, width_of

MAX_NODES = 64  # one int64 word of ancestor bits for each node
MAX_EXPANDED = 64  # likewise for the draft's own attention, over the nodes it expands

DEFAULT_NUM_SPECULATIVE_TOKENS = MAX_NODES - 1
# A fifth level pays with weak heads too, and up to here the widest frontier fits its limit.
_DEFAULT_DEPTH = 5
_DEFAULT_TOP_K = 16
# Rows that cost a target's forward little more than one: reading its weights takes as long.
_DEFAULT_VERIFY_BUDGET = 128
_ANY_NUMBER = 1 << 20  # of requests
_SMALLEST_TIER = 2  # rows of a request with a tree
# Requests for each token of the budget from which on nothing is drafted: their own tokens keep
# the GPU busy, and no size that vLLM captures by default holds them with a draft each.
_CROWD = 2
_SIZES = ("depth", "top_k", "verify_budget")
_KEYS = (*_SIZES, "paths")


@dataclass(frozen=True)
class TreeConfig:
    """A draft tree of ``num_speculative_tokens`` nodes below the root.

    Source: EAGLE-2 (arXiv 2406.16858), section 4: expansion to ``depth`` levels with
    ``top_k`` children for each node, then reranking to the best nodes. With ``paths`` the tree
    is static, as EAGLE-1's (arXiv 2401.15077): :meth:`static` makes it.

    Attributes:
        num_speculative_tokens: draft tokens verified for each target forward (N - 1).
        depth: levels below the root that the draft expands (D).
        top_k: children for each expanded node, and nodes expanded for each level (K).
        verify_budget: tokens that one target forward verifies, over all requests, prompts not
            counted; with more requests their trees are smaller, down to one node, and from
            twice as many requests on nothing is drafted. None for trees of one size.
        paths: the nodes below the root of a static tree, each by its ranks; None for dynamic
            trees.

    Raises:
        ValueError: a size that is not a positive integer, or more draft tokens than
            ``depth`` levels of ``top_k`` can make or than one 64-bit mask holds, or more
            expanded nodes than one holds; paths of another number.
    """

    num_speculative_tokens: int
    depth: int = _DEFAULT_DEPTH
    top_k: int = _DEFAULT_TOP_K
    verify_budget: int | None = _DEFAULT_VERIFY_BUDGET
    paths: Paths | None = None

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", *_SIZES):
            value = getattr(self, name)
            if name == "verify_budget" and value is None:
                continue
            # bool is an int to Python, and `"depth": true` is a mistake worth naming.
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{_path(name)} must be an integer of at least 1, got {value!r}")
        if self.num_nodes > MAX_NODES:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} is more than a tree "
                f"can hold: use at most {MAX_NODES - 1}"
            )
        if self.paths is not None and len(self.paths) != self.num_speculative_tokens:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} but tree.paths has "
                f"{len(self.paths)} nodes: use num_speculative_tokens={len(self.paths)}, or leave "
                "it out"
            )
        if self.num_speculative_tokens > self.num_candidates:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} is more than a tree of "
                f"depth={self.depth} and top_k={self.top_k} can make "
                f"({self.num_candidates} nodes): lower it, or raise tree.depth or tree.top_k"
            )
        if self.verify_budget is not None and self.verify_budget < self.num_nodes:
            raise ValueError(
                f"tree.verify_budget={self.verify_budget} is less than one tree of "
                f"num_speculative_tokens={self.num_speculative_tokens} and its root: raise it to "
                f"{self.num_nodes}, or lower num_speculative_tokens"
            )
        if self.num_expanded > MAX_EXPANDED:
            shape = f"tree.depth={self.depth} and tree.top_k={self.top_k} expand"
            remedy = "lower tree.depth or tree.top_k"
            if self.paths is not None:
                shape = f"tree.paths of depth {self.depth}, {self.top_k} wide, expand up to"
                remedy = "leave out the widest or the deepest paths"
            raise ValueError(
                f"{shape} (depth - 1) * top_k = {self.num_expanded} nodes, more than "
                f"{MAX_EXPANDED}: {remedy}"
            )

    @classmethod
    def static(
        cls,
        paths: Any,
        num_speculative_tokens: int | None = None,
        verify_budget: int | None = _DEFAULT_VERIFY_BUDGET,
    ) -> Self:
        """A static tree, its depth and width from its paths.

        Args:
            paths: as :func:`~vllm_eagle3.paths.read_paths` takes them.
            num_speculative_tokens: as many as there are paths, or None.

        Raises:
            ValueError: paths that are no tree, or of another number.
        """
        paths = read_paths(paths)
        size = len(paths) if num_speculative_tokens is None else num_speculative_tokens
        return cls(size, depth_of(paths), width_of(paths), verify_budget, paths)

    @classmethod
    def from_dict(
        cls, tree: Mapping[str, Any] | bool, num_speculative_tokens: int | None = None
    ) -> Self:
        """Read the ``tree`` key of a speculative config.

        Args:
            tree: ``{"depth": int, "top_k": int, "verify_budget": int or None}``, each key
                optional, or ``True`` for the defaults; or ``{"paths": str or list of lists of
                int, "verify_budget": int or None}``.
            num_speculative_tokens: the key of that name beside ``tree``; by default 63, or as
                many as there are paths.

        Raises:
            ValueError: ``tree`` is of another type, has an unknown key, or describes an
                impossible shape.
        """
        if isinstance(tree, Mapping) and "paths" in tree:
            if unknown := sorted(map(repr, set(tree) - {"paths", "verify_budget"})):
                raise ValueError(
                    f"tree has paths, which say the whole shape, and {', '.join(unknown)}: leave "
                    "out one of them"
                )
            return cls.static(**tree, num_speculative_tokens=num_speculative_tokens)
        if num_speculative_tokens is None:
            num_speculative_tokens = DEFAULT_NUM_SPECULATIVE_TOKENS
        if tree is True:
            tree = {}
        if not isinstance(tree, Mapping):
            raise ValueError(
                f'tree must be true or an object such as {{"depth": 5, "top_k": 16}}, got'
                f" {tree!r}; leave the key out to serve a chain"
            )
        unknown = sorted(map(repr, set(tree) - set(_KEYS)))
        if unknown:
            raise ValueError(
                f"unknown key {', '.join(unknown)} in tree: use {', '.join(_KEYS)}"
                " (the number of nodes is num_speculative_tokens)"
            )
        return cls(
            num_speculative_tokens, **{**_default_shape(num_speculative_tokens, tree), **tree}
        )

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

    def tiers(self) -> list[tuple[int, int, int]]:
        """``(first, last, draft tokens)``: the tree's size by the number of running requests.

        The budget is shared out in powers of two, so that few sizes are captured in graphs.
        Smaller trees are the best nodes of the whole one: every prefix of it is a tree.
        """
        tiers, first, rows = [], 1, self.num_nodes
        if self.verify_budget is None:
            return [(1, _ANY_NUMBER, rows - 1)]
        while rows > _SMALLEST_TIER:
            last = self.verify_budget // rows
            if last >= first:
                tiers.append((first, last, rows - 1))
                first = last + 1
            rows = 1 << ((rows - 1).bit_length() - 1)
        crowd = _CROWD * self.verify_budget
        return [*tiers, (first, crowd, rows - 1), (crowd + 1, _ANY_NUMBER, 0)]

    def tier(self, num_drafts: int) -> Self:
        """The shape in which a smaller tree is grown, of ``num_drafts`` nodes below the root.

        The whole tree has the depth that was asked for, a smaller one of n nodes at most
        log2(n + 1) + 1 levels, rounded up: deeper ones are rarely accepted. As many nodes as
        the tree has are a frontier wide enough: no node that it leaves out, nor a child of
        one, is among the best. Of a static tree it is the first paths.
        """
        if num_drafts >= self.num_speculative_tokens:
            return self
        if self.paths is not None:
            return self.static(self.paths[:num_drafts], verify_budget=None)
        top_k = min(self.top_k, num_drafts)
        depth = min(num_drafts, num_drafts.bit_length() + 1)
        depth = min(self.depth, max(depth, _levels_for(num_drafts, top_k)))
        return type(self)(num_drafts, depth, top_k, verify_budget=None)

    def check_draft_vocabulary(self, draft_vocab_size: int) -> None:
        """Raise ``ValueError`` if a node cannot have ``top_k`` different children."""
        if self.top_k > draft_vocab_size:
            what, remedy = f"tree.top_k={self.top_k}", "lower tree.top_k"
            if self.paths is not None:
                what, remedy = f"the width {self.top_k} of tree.paths", "leave out the widest paths"
            raise ValueError(
                f"{what} is more than the draft vocabulary of {draft_vocab_size} tokens: {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The ``tree`` key that :meth:`from_dict` reads."""
        if self.paths is not None:
            paths = [list(path) for path in self.paths]
            return {"paths": paths, "verify_budget": self.verify_budget}
        return {name: getattr(self, name) for name in _SIZES}


def _path(name: str) -> str:
    return f"tree.{name}" if name in _SIZES else name


def _levels_for(num_drafts: int, top_k: int) -> int:
    """Levels that offer so many candidates: ``top_k`` the first, ``top_k`` squared each other."""
    return 1 + max(0, -(-(num_drafts - top_k) // top_k**2))


def _default_shape(num_drafts: int, given: Mapping[str, Any]) -> dict[str, int]:
    """Depth and top-k where they are not ``given``: the defaults, or what fits the other one."""

    def size(value: Any) -> int | None:
        # What is no size at all is refused where the whole shape is checked.
        return value if isinstance(value, int) and value >= 1 else None

    largest = size(num_drafts) or MAX_NODES
    depth, top_k = size(given.get("depth")), size(given.get("top_k"))
    if top_k is None:
        top_k = min(_DEFAULT_TOP_K, largest)
        if depth is not None and depth > 1:
            top_k = max(1, min(top_k, MAX_EXPANDED // (depth - 1)))
    if depth is None:
        depth = max(min(_DEFAULT_DEPTH, largest), _levels_for(largest, top_k))
        depth = max(1, min(depth, MAX_EXPANDED // top_k + 1))
    return {"depth": depth, "top_k": top_k}
