"""Imports go downward only: run_eval -> harness -> tasks -> models -> baselines."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
from source_tree import LAYERS, ROOT, imported_modules

from visionselector_eval.baselines.contract.registry import BUILTIN
from visionselector_eval.models.backbones import FAMILIES
from visionselector_eval.models.protocols import PROTOCOLS

FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
# What compressors share lies in baselines/contract/; every file beside it is one method.
METHODS = [path for path in FILES if path.parent.name == "baselines" and path.stem != "__init__"]
CONTRACT = "visionselector_eval.baselines.contract."


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downward(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    ours = {name for name in imported_modules(path) if name.split(".")[0] == "visionselector_eval"}
    assert {name.split(".")[1] for name in ours} <= set(allowed)
    # Given as `harness.store`, a module would be loaded a second time beside the installed one.
    assert not {name.split(".")[0] for name in imported_modules(path)} & {*LAYERS, "run_eval"}


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_compressor_needs_the_contract_and_torch_alone(path: Path) -> None:
    others = {name for name in imported_modules(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert all(name.split(".")[0] == "torch" or name.startswith(CONTRACT) for name in others)


def test_the_script_calls_the_harness_alone() -> None:
    ours = {name for name in imported_modules(ROOT / "run_eval.py") if name not in sys.stdlib_module_names}
    assert ours == {"visionselector_eval.harness.cli"}


# Compressors and backbones know each other by the contract alone -----------------------------------------------------

COMPRESSORS = [
    path
    for path in FILES
    if f"visionselector_eval.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
    in {target.partition(":")[0] for target in BUILTIN.values()}
]
BACKBONES = [path for path in FILES if path.parent == ROOT / "models" / "backbones"]


def said(path: Path) -> Iterator[tuple[int, str]]:
    """Names, attributes and texts of a file's code with their lines; docstrings and comments are prose, not code."""
    tree = ast.parse(path.read_text())
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno, " ".join([getattr(node, "module", None) or "", *(alias.name for alias in node.names)])


# Papers are named after the models they were made for: LLaVA-PruMerge, Dynamic-LLaVA, Dynamic-Qwen.
PAPERS = re.compile(r"llava-prumerge|dynamic-llava|dynamic[-_]?qwen", re.IGNORECASE)
NAMES_OF_FAMILIES = re.compile("|".join({re.split(r"[_\d]", name)[0] for name in FAMILIES}), re.IGNORECASE)
NAMES_OF_METHODS = re.compile(
    "|".join([rf"\b{name}\b" for name in BUILTIN if name not in ("full", "random", "uniform", "pooling")]),
    re.IGNORECASE,
)


def test_the_lists_are_not_empty() -> None:
    assert len(COMPRESSORS) == len(set(BUILTIN.values())) == len(BUILTIN)
    assert {path.stem for path in BACKBONES} >= {"qwen2_5_vl", "llava", "base"}
    assert NAMES_OF_FAMILIES.search("Qwen2_5_VL")
    assert NAMES_OF_FAMILIES.search("load_llava")


@pytest.mark.parametrize("path", COMPRESSORS, ids=name_of)
def test_no_compressor_names_a_backbone(path: Path) -> None:
    found = [(line, text) for line, text in said(path) if NAMES_OF_FAMILIES.search(PAPERS.sub("", text))]
    assert not found
    assert not {name for name in imported_modules(path) if name.startswith("visionselector_eval.models.backbones")}


@pytest.mark.parametrize("path", BACKBONES, ids=name_of)
def test_no_backbone_names_a_compressor(path: Path) -> None:
    # A protocol is named after the paper whose settings it has.
    assert not [(n, text) for n, text in said(path) if text not in PROTOCOLS and NAMES_OF_METHODS.search(text)]
    ours = {name for name in imported_modules(path) if name.startswith("visionselector_eval.")}
    methods = {target.partition(":")[0] for target in BUILTIN.values()}
    assert not ours & {*methods, "visionselector_eval.baselines.contract.registry", "visionselector_eval.baselines"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_long_function_says_why_and_no_file_is_long(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
            assert "Long " in (ast.get_docstring(node) or ""), f"{node.name} has more than 60 lines"


def module_name(path: Path) -> str:
    return ".".join(["visionselector_eval", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def imported_at_once(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) that a file of ours imports when it is itself imported."""
    nodes = list(ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += node.body
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visionselector_eval."):
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {module_name(path) for path in FILES}
    edges = [
        (module_name(path), f"{module}.{name}" if f"{module}.{name}" in modules else module)
        for path in FILES
        for module, name in imported_at_once(path)
    ]
    assert len(edges) > 500
    assert not list(networkx.simple_cycles(networkx.DiGraph(edges)))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_a_private_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visionselector_eval."):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
