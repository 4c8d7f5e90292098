"""What `make test-lowest` and `make test-newest` make of what uv and the tests say. Never the network."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from source_tree import ROOT

IMPOSSIBLE = (
    "  x No solution found when resolving dependencies:\n  ╰─▶ Because only b<2 is available and a needs b>=2, ...\n"
)
NO_SERVER = "error: Failed to fetch: `a`\n  cause: error sending request for url (a)\n  cause: tcp connect error\n"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The script as a module; it finds a Python, and nothing is built or tested."""
    spec = importlib.util.spec_from_file_location("versions_of_ci", ROOT / ".ci" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def with_uv(monkeypatch: pytest.MonkeyPatch, versions: Any, **said: str) -> list[tuple[str, ...]]:
    """Let uv say this for the first word(s) that name a step; the steps that were run."""
    steps: list[tuple[str, ...]] = []

    def uv(*arguments: str, **options: Any) -> str | None:
        steps.append(arguments)
        # "packaging" is what is asked for to see whether a server answers.
        return said.get("asking" if options.get("input") else arguments[1] if arguments[0] == "pip" else arguments[0])

    monkeypatch.setattr(versions, "uv", uv)
    monkeypatch.setattr(versions, "interpreter", lambda version: f"/python{version}")
    return steps


def test_the_oldest_and_the_newest_python_of_the_classifiers(versions: Any, monkeypatch, capsys) -> None:
    assert versions.supported()[0] == "3.11"
    assert versions.supported() == sorted(versions.supported(), key=lambda v: int(v.split(".")[1]))
    steps = with_uv(monkeypatch, versions)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0))
    for end, version, resolution in (("lowest", "3.11", "lowest-direct"), ("newest", "3.13", "highest")):
        steps.clear()
        assert versions.main(end) == 0
        assert f"/python{version}" in steps[0]
        assert steps[1][steps[1].index("--resolution") + 1] == resolution
        assert f"Python {version}" in capsys.readouterr().out


def test_an_unreachable_registry_is_skipped_with_its_reason(versions: Any, monkeypatch, capsys) -> None:
    with_uv(monkeypatch, versions, compile=NO_SERVER, asking=NO_SERVER)
    assert versions.main("newest") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "test-newest: skipped, since the registry can't be reached: error sending request for url (a)"


@pytest.mark.parametrize("asking", [None, IMPOSSIBLE])
def test_an_impossible_resolution_is_a_failure(versions: Any, monkeypatch, capsys, asking) -> None:
    with_uv(monkeypatch, versions, compile=IMPOSSIBLE, **({"asking": asking} if asking else {}))
    assert versions.main("lowest") == 1
    assert "No solution found" in capsys.readouterr().out


def test_failing_tests_are_a_failure(versions: Any, monkeypatch) -> None:
    with_uv(monkeypatch, versions)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    assert versions.main("lowest") == 1


def test_without_a_python_of_ours_it_says_which_it_looked_for(versions: Any, monkeypatch, capsys) -> None:
    with_uv(monkeypatch, versions)
    monkeypatch.setattr(versions, "interpreter", lambda version: None)
    assert versions.main("lowest") == 2
    assert "no Python of 3.11, 3.12, 3.13 runs here" in capsys.readouterr().out


def test_this_python_is_found_by_its_version(versions: Any, monkeypatch, tmp_path) -> None:
    here = "{}.{}".format(*sys.version_info)
    (tmp_path / f"python{here}").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert versions.interpreter(here) is not None
    assert versions.interpreter("3.99") is None
