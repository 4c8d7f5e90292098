"""Imports go downward only: run_eval -> harness -> tasks -> models -> baselines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from source_tree import FLOORS, ROOT, imported_modules

FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
# What all compressors share; every other file in baselines/ is one method.
SHARED = {"__init__", "base", "budget", "chain", "errors", "registry"}
METHODS = [path for path in FILES if path.parent.name == "baselines" and path.stem not in SHARED]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downward(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    ours = {name for name in imported_modules(path) if name.split(".")[0] == "visionselector_eval"}
    assert {name.split(".")[1] for name in ours} <= set(allowed)
    # Given as `harness.store`, a module would be loaded a second time beside the installed one.
    assert not {name.split(".")[0] for name in imported_modules(path)} & {*FLOORS, "run_eval"}


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_compressor_needs_the_contract_and_torch_alone(path: Path) -> None:
    others = {name for name in imported_modules(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in others if name.split(".")[0] != "torch"} == {"visionselector_eval.baselines.base"}


def test_the_script_calls_the_harness_alone() -> None:
    ours = {name for name in imported_modules(ROOT / "run_eval.py") if name not in sys.stdlib_module_names}
    assert ours == {"visionselector_eval.harness.cli"}
