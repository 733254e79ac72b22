"""Static trees as lists of paths.

A path names a node by ranks: ``(0, 2)`` is the third best child of the root's best child. So
write EAGLE-1 (arXiv 2401.15077, section 3.1) and Medusa (arXiv 2401.10774) their trees. A node
stands after its parent and after its better siblings: then every prefix of the list is a tree,
and whatever trims it leaves a valid one.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

Path = tuple[int, ...]
Paths = tuple[Path, ...]

# EAGLE-1's default tree, (4, 8, 8, 3, 2) nodes by depth. Medusa has another one of this name,
# of 63 nodes.
_MC_SIM_7B_63: Paths = (
    *((0,), (1,), (2,), (3,)),
    *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2)),
    *((0, 0, 0, 0, 0), (0, 0, 0, 0, 1)),
)
PUBLISHED: Mapping[str, Paths] = MappingProxyType({"mc_sim_7b_63": _MC_SIM_7B_63})


def read_paths(value: Any) -> Paths:
    """Read ``tree.paths``: the name of a published tree, or a list of lists of ranks.

    Raises:
        ValueError: an unknown name, something that is no path, a path twice, or one that stands
            before its parent or before a better sibling.
    """
    if isinstance(value, str):
        if value not in PUBLISHED:
            raise ValueError(
                f"tree.paths={value!r} is no known tree: use {', '.join(map(repr, PUBLISHED))}, or "
                "a list of paths such as [[0], [1], [0, 0]]"
            )
        return PUBLISHED[value]
    if not isinstance(value, Sequence) or not value or not all(map(_is_path, value)):
        raise ValueError(
            "tree.paths must be the name of a tree, or a list of paths such as"
            f" [[0], [1], [0, 0]], each the ranks of the children from the root, got {value!r}"
        )
    known: set[Path] = {()}
    paths = tuple(map(tuple, value))
    for path in paths:
        if path in known:
            raise ValueError(f"tree.paths has {list(path)} twice: remove one")
        *above, rank = path
        parent, sibling = tuple(above), (*above, rank - 1)
        for needed in (parent, sibling) if rank else (parent,):
            if needed not in known:
                raise ValueError(
                    f"tree.paths has {list(path)} without {list(needed)} before it: list a node "
                    "after its parent and after its better siblings"
                )
        known.add(path)
    return paths


def depth_of(paths: Paths) -> int:
    """Levels below the root."""
    return max(map(len, paths))


def width_of(paths: Paths) -> int:
    """The most children that a node has, or nodes with children on a level, if these are more."""
    branching = max(path[-1] + 1 for path in paths)
    expanded = [len(expanded_nodes(paths, level)) for level in range(1, depth_of(paths))]
    return max(branching, *expanded, 1)


def expanded_nodes(paths: Paths, level: int) -> list[Path]:
    """The nodes of a level that have children, in the order of the list."""
    parents = {path[:-1] for path in paths}
    return [path for path in paths if len(path) == level and path in parents]


def _is_path(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        # bool is an int to Python.
        and all(isinstance(rank, int) and rank is not True and rank is not False for rank in value)
        and min(value) >= 0
    )
