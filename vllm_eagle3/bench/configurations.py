"""The engine configurations that a benchmark compares."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.heads.method import method_of
from vllm_eagle3.paths import PUBLISHED

_PLUGIN_GROUP = "vllm.general_plugins"
_PLUGIN = "vllm_eagle3.engine.plugin:register"


@dataclass(frozen=True)
class Configuration:
    """Plain decoding, vLLM's chain of drafts, or a draft tree.

    Attributes:
        name: unique in a benchmark, e.g. ``plain``, ``chain-5``, ``tree-32``.
        num_speculative_tokens: draft tokens for each target forward; None decodes plainly.
        tree: the ``tree`` key of the speculative config; None asks for the chain.
    """

    name: str
    num_speculative_tokens: int | None = None
    tree: dict[str, Any] | bool | None = None

    def speculative_config(self, head: str) -> dict[str, Any] | None:
        """What a user would pass to ``LLM(speculative_config=...)``.

        Raises:
            ValueError: a folder ``head`` that holds no EAGLE head.
        """
        if self.num_speculative_tokens is None:
            return None
        config: dict[str, Any] = {
            "method": method_of(head),
            "model": head,
            "num_speculative_tokens": self.num_speculative_tokens,
        }
        if self.tree is not None:
            config["tree"] = self.tree
        return config

    @property
    def shape(self) -> dict[str, Any] | None:
        """Depth and top-k of the tree, or its paths; None for the others."""
        return None if self.tree is None else self.as_tree.to_dict()

    @property
    def as_tree(self) -> TreeConfig:
        """The whole tree; a chain is one of one child a node."""
        drafts = self.num_speculative_tokens
        assert drafts is not None, "plain decoding drafts nothing"
        if self.tree is None:
            return TreeConfig(drafts, depth=drafts, top_k=1, verify_budget=None)
        return TreeConfig.from_dict(self.tree, drafts)

    def draft_forwards(self, batch_size: int) -> int:
        """Forwards of the draft for each one of the target, with so many requests."""
        if self.tree is None:
            return self.num_speculative_tokens or 0
        config = TreeConfig.from_dict(self.tree, self.num_speculative_tokens)
        drafts = next(drafts for _, last, drafts in config.tiers() if batch_size <= last)
        return config.tier(drafts).depth if drafts else 0


PLAIN = Configuration("plain")


def chain(num_speculative_tokens: int) -> Configuration:
    """vLLM's own chain of ``num_speculative_tokens`` drafts.

    Raises:
        ValueError: fewer than one draft.
    """
    if num_speculative_tokens < 1:
        raise ValueError(f"--chain {num_speculative_tokens}: a chain has at least one draft")
    return Configuration(f"chain-{num_speculative_tokens}", num_speculative_tokens)


def tree(
    num_speculative_tokens: int, depth: int | None = None, top_k: int | None = None
) -> Configuration:
    """A draft tree of one size in every batch.

    Args:
        depth, top_k: of the default shape where not given.

    Raises:
        ValueError: a shape that no tree can have.
    """
    given = _shape(depth, top_k) | {"verify_budget": None}
    shape = TreeConfig.from_dict(given, num_speculative_tokens).to_dict()
    return Configuration(f"tree-{num_speculative_tokens}", num_speculative_tokens, tree=shape)


def _shape(*sizes: int | None) -> dict[str, int | None]:
    names = ("depth", "top_k")
    return {name: n for name, n in zip(names, sizes, strict=False) if n is not None}


def parse_tree(text: str, one_size: bool = False) -> Configuration:
    """A tree as the command line names it.

    ``N``, or ``N/D/K`` with depth and top-k; a static one by its published name, or by a JSON
    file with its paths.

    Args:
        one_size: the same in every batch; else as a server has it, smaller where more requests
            share the default verification budget.

    Raises:
        ValueError: another form, or a shape that no tree can have.
    """
    if text in PUBLISHED or text.endswith(".json"):
        return _static(text, one_size)
    sizes = text.split("/")
    if len(sizes) not in (1, 3) or not all(size.isdecimal() for size in sizes):
        raise ValueError(
            f"--tree {text}: give the number of draft tokens, as in 31, or also depth and"
            f" top-k, as in 31/6/8, or a static tree: {', '.join(PUBLISHED)} or a file of paths,"
            " as in paths.json"
        )
    nodes, *shape = map(int, sizes)
    name = "tree-" + "-".join(sizes)
    if one_size:
        return replace(tree(nodes, *shape), name=name)
    asked = _shape(*shape) or True
    TreeConfig.from_dict(asked, nodes)
    return Configuration(name, nodes, tree=asked)


def _static(text: str, one_size: bool) -> Configuration:
    budget: dict[str, Any] = {"verify_budget": None} if one_size else {}
    if text in PUBLISHED:
        asked = {"paths": text, **budget}
    else:
        try:
            asked = {"paths": json.loads(Path(text).read_text(encoding="utf-8")), **budget}
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--tree {text}: no JSON list of paths ({error})") from error
    nodes = TreeConfig.from_dict(asked).num_speculative_tokens
    return Configuration(f"tree-{Path(text).stem}", nodes, tree=asked)


def check_plugin(configurations: Sequence[Configuration]) -> None:
    """Refuse trees where vLLM will not find the plugin.

    vLLM finds plugins through installed metadata only: a checkout on ``PYTHONPATH`` can be
    imported, yet registers nothing.

    Raises:
        ValueError: a configuration asks for a tree, and the entry point is not installed.
    """
    if not any(configuration.tree is not None for configuration in configurations):
        return
    if not any(point.value == _PLUGIN for point in entry_points(group=_PLUGIN_GROUP)):
        raise ValueError(
            f"draft trees need vllm_eagle3 registered as a vLLM plugin, but no installed package"
            f" offers the entry point {_PLUGIN!r} in {_PLUGIN_GROUP!r}: run `pip install .` in"
            " the repository (PYTHONPATH alone registers nothing)"
        )
