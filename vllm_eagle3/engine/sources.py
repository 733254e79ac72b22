"""Look up names in a package's source files, without importing the package."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


class Sources:
    """The modules of one package folder, parsed when asked for.

    Args:
        root: the package's folder, such as ``site-packages/vllm``; its name is the
            package's.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parse = cache(self._parse_module)

    def describe(self, symbol: str) -> str | None:
        """What ``module:qualified.name`` is, in one line; ``None`` if it is not there.

        A function gives its parameters with their defaults, without annotations; a class its
        bases; the ``__init__`` of a dataclass its fields; anything else its kind. A member is
        looked for in the class, among what its methods assign to ``self``, and in its bases.
        """
        module, _, name = symbol.partition(":")
        owner, _, member = name.partition(".")
        found = self._find(module, owner)
        if found is None:
            return None
        module, node = found
        if not member:
            return _shape(node)
        return self._describe_member(module, node, member)

    def _describe_member(self, module: str, owner: ast.AST, member: str) -> str | None:
        if not isinstance(owner, ast.ClassDef):
            return None
        for name, node in _bindings(owner.body):
            if name == member:
                return _shape(node)
        if member == "__init__" and _is_dataclass(owner):
            return f"dataclass ({', '.join(_fields(owner))})"
        if member in _assigned_to_self(owner):
            return "attribute"
        for base in owner.bases:
            if isinstance(base, ast.Subscript):  # a generic base
                base = base.value
            found = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if found and (shape := self._describe_member(*found, member)):
                return shape
        return None

    def _find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines ``name`` and its definition, imports followed."""
        tree = self._parse(module)
        if tree is None:
            return None
        for bound, node in _bindings(tree.body):
            if bound != name:
                continue
            if not isinstance(node, ast.ImportFrom):
                return module, node
            origin, original = _origin(node, name, self._package_of(module))
            return self._find(origin, original)
        if submodule := self._parse(f"{module}.{name}"):
            return f"{module}.{name}", submodule
        return None

    def _package_of(self, module: str) -> str:
        return module if self._path(module).name == "__init__.py" else module.rpartition(".")[0]

    def _path(self, module: str) -> Path:
        path = self._root.parent.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _parse_module(self, module: str) -> ast.Module | None:
        path = self._path(module)
        return ast.parse(path.read_text()) if path.is_file() else None


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Each name that the statements bind, blocks of ``if``, ``try`` and ``with`` included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _bindings(handler.body)


def _assigned_to_self(owner: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(owner)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _is_dataclass(owner: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in owner.decorator_list)


def _fields(owner: ast.ClassDef) -> Iterator[str]:
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = f"={ast.unparse(node.value)}" if node.value else ""
            yield node.target.id + default


def _origin(node: ast.ImportFrom, name: str, package: str) -> tuple[str, str]:
    """The module that an import takes ``name`` from, and its name there."""
    original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
    parents = package.split(".")
    if node.level:
        parents = parents[: len(parents) - node.level + 1]
        return ".".join(filter(None, [*parents, node.module])), original
    return str(node.module), original


def _shape(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class ({', '.join(map(ast.unparse, node.bases))})"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        decorators = {
            ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list
        }
        for kind in ("property", "cached_property"):
            if kind in decorators:
                return "property"
        for kind in ("staticmethod", "classmethod"):
            if kind in decorators:
                return f"{kind} {_parameters(node.args)}"
        return f"function {_parameters(node.args)}"
    return "module" if isinstance(node, ast.Module) else "attribute"


def _parameters(args: ast.arguments) -> str:
    """The parameter list without annotations, which may change without any harm."""
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg is not None:
            arg.annotation = None
    return f"({ast.unparse(args)})"
