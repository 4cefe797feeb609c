"""What an adapter hooks in an engine, and whether the installed engine has it: read from its source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from importlib_metadata import PackageNotFoundError, version
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = ["Engine", "Seam"]

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Seam:
    """One function or method of an engine that an adapter hooks or calls.

    Attributes:
        module: where it is defined.
        name: ``function`` or ``Class.method``.
        parameters: their names in order, ``self`` included, ``*name`` and ``**name`` as they are written.
        sets: attributes of self that its body assigns, and that the adapter reads.
        among: other parameters may stand between these; the adapter passes them on as they come.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    sets: tuple[str, ...] = ()
    among: bool = False

    def __str__(self) -> str:
        return f"{self.name}({', '.join((*self.parameters, '...') if self.among else self.parameters)})"

    def problem(self, tree: ast.Module) -> str | None:
        """How `tree`, the source of the module, differs from what is wanted; None if it does not. Pure."""
        found = _find(tree, self.name)
        if found is None:
            return f"wanted {self} in {self.module}, found nothing of that name"
        names = _parameters(found.args)
        if (not set(self.parameters) <= set(names)) if self.among else (tuple(names) != self.parameters):
            return f"wanted {self} in {self.module}, found {self.name}({', '.join(names)})"
        missing = sorted(set(self.sets) - _assigned(found))
        if missing:
            return f"wanted {self.name} in {self.module} to set self.{', self.'.join(missing)}, found that it does not"
        return None


@dataclass(frozen=True)
class Engine:
    """An engine as one adapter knows it.

    Attributes:
        name: its distribution and its import name.
        adapter: distribution of the adapter.
        versions: the versions that the adapter was tested with, as a specifier.
        seams: what it hooks and calls.
        leave_out: how a user starts the engine without the adapter.
        repeatable: the environment variable that asks the engine for the same bits whatever else is in a batch.
    """

    name: str
    adapter: str
    versions: str
    seams: tuple[Seam, ...]
    leave_out: str
    repeatable: str

    @property
    def version(self) -> str | None:
        """The installed version, None where the engine is not installed. Local."""
        try:
            return str(version(self.name))
        except PackageNotFoundError:
            return None

    def has(self, seam: Seam) -> bool:
        """Whether this one is as wanted, whatever the version and the others. Local."""
        return not self._differences([seam])

    def problem(self) -> str | None:
        """Why the adapter must not touch the installed engine, in one sentence; None if it may. Local, imports nothing."""
        found = self.version
        known = found is not None and _within(found, self.versions)
        wrong = [] if known else [f"wanted {self.name}{self.versions}, found {found or 'none installed'}"]
        if found is not None:
            wrong += self._differences(self.seams)
        if not wrong:
            return None
        return (
            f"{self.adapter} {version(self.adapter)} does not touch {self.name}: {'; '.join(wrong)}: install a {self.adapter} "
            f"that was made for this {self.name} (pip install --upgrade {self.adapter}), or {self.leave_out}"
        )

    def _differences(self, seams: Iterable[Seam]) -> list[str]:
        trees: dict[str, ast.Module | str] = {}
        out = []
        for seam in seams:
            if seam.module not in trees:
                trees[seam.module] = _source(seam.module)
            tree = trees[seam.module]
            text = f"wanted {seam} in {seam.module}, found {tree}" if isinstance(tree, str) else seam.problem(tree)
            if text is not None:
                out.append(text)
        return out


def _within(found: str, wanted: str) -> bool:
    try:
        return SpecifierSet(wanted).contains(Version(found), prereleases=True)
    except InvalidVersion:
        return False


def _source(module: str) -> ast.Module | str:
    """The parsed source of `module`, found without importing its package; or what is found instead. Local."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # something that was put into sys.modules and came from no file
        spec = None
    for folder in () if spec is None else spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                try:
                    return ast.parse(path.read_bytes())
                except (SyntaxError, ValueError) as error:  # written for a newer Python, or cut off
                    return f"a source that this Python cannot read ({error})"
    return "no source of that module"


def _find(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The last definition of `name`, also inside of an `if` or a `try`, as the interpreter would have it."""
    *outer, last = name.split(".")
    scope: ast.AST = tree
    for part in outer:
        classes = [n for n in _body(scope) if isinstance(n, ast.ClassDef) and n.name == part]
        if not classes:
            return None
        scope = classes[-1]
    functions = [n for n in _body(scope) if isinstance(n, _Function) and n.name == last]
    return functions[-1] if functions else None


def _body(scope: ast.AST) -> Iterable[ast.AST]:
    """What is defined in `scope` itself, not in a function or class within it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, (*_Function, ast.ClassDef, ast.Lambda)):
            yield from _body(node)


def _parameters(args: ast.arguments) -> list[str]:
    out = [a.arg for a in (*args.posonlyargs, *args.args)]
    if args.vararg is not None:
        out.append(f"*{args.vararg.arg}")
    out += [a.arg for a in args.kwonlyargs]
    if args.kwarg is not None:
        out.append(f"**{args.kwarg.arg}")
    return out


def _assigned(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    stores = (n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {n.attr for n in stores if isinstance(n.value, ast.Name) and n.value.id == "self"}
