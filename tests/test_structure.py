"""The structure of the package: what imports what."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fusedopt

ROOT = Path(fusedopt.__file__).parent


def imports(path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split(".")[1:], f"{alias.name}.py")
                is_module = inner.exists() or inner.with_suffix("").is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def test_no_import_cycles():
    """Also among imports within functions or for types only."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found = {n for n in imports(path) if n.startswith("fusedopt.")}
        graph[name] = found - {name}
    assert len(graph) > 50 and "fusedopt.rule" in graph["fusedopt.optimizer"]
    TopologicalSorter(graph).prepare()  # CycleError names the cycle
