"""One readable Python file out of everything an entry module needs from this package.

Exported checkpoints carry the decoding code with them, and one file is what `transformers` loads reliably from a folder
and from the Hub alike (it copies code to a cache, and how it follows relative imports has changed between versions).
Nothing is written twice: definitions are copied verbatim with their comments, and only those that are reached.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A top-level definition of a module.

    Attributes:
        names: what it defines.
        uses: names its code mentions; locals among them do no harm.
        text: source lines with the comments above them.
        import_line: line of an import inside it, 0 where there is none: such a definition cannot be copied.
    """

    names: tuple[str, ...]
    uses: frozenset[str]
    text: str
    import_line: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A parsed module of the package.

    Attributes:
        name: dotted name.
        statements: its definitions, in order.
        external: name -> import statement of another package.
        internal: name -> `(module, name there)`; the second is empty where the name is the module itself.
    """

    name: str
    statements: list[Statement] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    internal: dict[str, tuple[str, str]] = field(default_factory=dict)


def bundle(entry: str, name: str, *, values: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the body of a file that defines `name` of the module `entry` and needs nothing of its package.

    Args:
        entry: dotted name of a module; everything under its first part counts as the package.
        name: what the file is for; definitions that it does not reach are left out.
        values: Python source for names that `entry` only declares (`SPEC: LatentSpec`).

    Returns:
        The source (imports, then definitions, modules in dependency order) and the modules it came from.

    Raises:
        ValueError: the modules use something that cannot be put into one file; the message names it.
    """
    modules: dict[str, Module] = {}
    _read(entry, modules)
    kept, imports = _reached(modules, entry, name)
    _check_shadowing(modules, kept, entry)
    body, used = [], []
    for module in modules.values():
        lines = []
        for here, (_, there) in module.internal.items():
            if (module.name, here) in kept and here != there:
                lines.append(f"{here} = {there or 'sys.modules[__name__]'}")
                imports |= set() if there else {"import sys"}
        for statement in module.statements:
            if any((module.name, n) in kept for n in statement.names):
                declared = statement.names[0] if module.name == entry else ""
                lines.append(f"{declared} = {values[declared]}" if declared in values else statement.text)
        if lines:
            used.append(module.name)
            body.append(f"# ---- {module.name} ----\n\n" + "\n\n\n".join(lines))
    future = "from __future__ import annotations"
    plain = sorted(i for i in imports if i.startswith("import "))
    return "\n\n\n".join(["\n".join([future, "", *plain, *sorted(imports - set(plain))]), *body]) + "\n", used


def _read(name: str, modules: dict[str, Module]) -> None:
    """Parse a module and, before it, those it imports; `modules` ends up in dependency order."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    source = Path(found.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    package = name.split(".")[0]
    module = Module(name=name)
    end = 0
    for node in tree.body:
        begin, end = end, node.end_lineno or 0
        if isinstance(node, ast.Expr):
            continue  # a docstring
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                _import(node, alias, package, module)
            continue
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)):
            raise ValueError(_refusal(name, node.lineno))
        inner = [n.lineno for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
        module.statements.append(
            Statement(
                names=_defined(node),
                uses=frozenset(_mentioned(node, {n for n, (_, there) in module.internal.items() if not there})),
                text="\n".join(lines[begin:end]).strip("\n"),
                import_line=inner[0] if inner else 0,
            )
        )
    for origin, _ in module.internal.values():
        if origin not in modules:
            _read(origin, modules)
    modules[name] = module


def _refusal(module: str, line: int) -> str:
    return f"{module}:{line}: only definitions and imports at the top level can be bundled."


def _import(node: ast.Import | ast.ImportFrom, alias: ast.alias, package: str, module: Module) -> None:
    here = alias.asname or alias.name
    renamed = f" as {alias.asname}" if alias.asname else ""
    if isinstance(node, ast.Import):
        module.external[here.split(".")[0]] = f"import {alias.name}{renamed}"
    elif node.module is None or node.module.split(".")[0] != package:
        if node.module != "__future__":
            module.external[here] = f"from {node.module} import {alias.name}{renamed}"
    elif _is_module(f"{node.module}.{alias.name}"):
        module.internal[here] = (f"{node.module}.{alias.name}", "")
    else:
        module.internal[here] = (node.module, alias.name)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and not a package
        return False


def _defined(node: ast.stmt) -> tuple[str, ...]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return (node.name,)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
    return tuple(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def _mentioned(node: ast.stmt, whole_modules: set[str]) -> set[str]:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    for n in ast.walk(node):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in whole_modules:
            names.add(f"{n.value.id}.{n.attr}")
    return names


def _reached(modules: dict[str, Module], entry: str, name: str) -> tuple[set[tuple[str, str]], set[str]]:
    """Return the `(module, name)` pairs needed for a name of the entry module, and the imports of other packages."""
    kept: set[tuple[str, str]] = set()
    imports: set[str] = set()
    queue = [(entry, name)]
    while queue:
        where, wanted = pair = queue.pop()
        if pair in kept:
            continue
        module = modules[where]
        before, _, attribute = wanted.partition(".")
        if attribute:
            queue += [(module.internal[before][0], attribute), (where, before)]
        elif wanted in module.external:
            imports.add(module.external[wanted])
        elif wanted in module.internal:
            kept.add(pair)
            origin, there = module.internal[wanted]
            queue += [(origin, there)] if there else []
        else:
            for statement in module.statements:
                if wanted in statement.names:
                    if statement.import_line:
                        raise ValueError(_refusal(where, statement.import_line))
                    kept.add(pair)
                    queue += [(where, used) for used in statement.uses]
    if (entry, name) not in kept:
        raise ValueError(f"{entry} does not define {name!r}.")
    return kept, imports


def _check_shadowing(modules: dict[str, Module], kept: set[tuple[str, str]], entry: str) -> None:
    """In one file the last definition of a name wins; refuse where that would change what code means."""
    defined: dict[str, str] = {}
    for module in modules.values():
        for statement in module.statements:
            for name in statement.names:
                if (module.name, name) not in kept:
                    continue
                first = defined.setdefault(name, module.name)
                if first == module.name:
                    continue
                others = [m for m in modules.values() if m.name != entry]
                if module.name != entry or any(name in s.uses for m in others for s in m.statements):
                    raise ValueError(f"{name!r} is defined in {first} and {module.name}; one file has room for one.")
