"""The checkout as tests read it: where it is, and what its files import."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ("baselines", "models", "tasks", "harness")
"""The package's folders; each may import itself and those before it."""


def imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in it, relative imports resolved."""
    package = ("visionselector_eval", *path.relative_to(ROOT).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            # `from visionselector_eval import models` names a module in its last part.
            names.update([module] if module != "visionselector_eval" else [f"{module}.{a.name}" for a in node.names])
    return names
