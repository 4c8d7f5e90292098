"""What is installed is what is in the checkout: wheel, sdist, metadata and the lock file. Never the network."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_tree import LAYERS, ROOT, imported_modules

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
JUNK = (".git", ".venv", "build", "dist", "runs", "profiles", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(target: Path) -> None:
    """The files that a clone would have (those git ignores are left out), so that building leaves no trace here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode or not (ROOT / ".git").exists():  # an unpacked sdist
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*JUNK))
        return
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=out)
    (made,) = out.iterdir()
    return made


@dataclass(frozen=True)
class Built:
    source: Path
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    here = tmp_path_factory.mktemp("packaging")
    source = here / "source"
    copy_checkout(source)
    sdist = build("sdist", source, here / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(here / "unpacked", filter="data")
    (unpacked,) = (here / "unpacked").iterdir()
    return Built(
        source,
        wheel=build("wheel", source, here / "wheel"),
        sdist=sdist,
        wheel_of_sdist=build("wheel", unpacked, here / "wheel2"),
    )


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, built.wheel, cwd=target.parent)
    return target


DATA = "results/published"
"""A folder of the package without code."""


def package_files(source: Path) -> set[str]:
    """Every file of the package by its place in the wheel."""
    return {
        "visionselector_eval/" + path.relative_to(source).as_posix()
        for folder in (*LAYERS, DATA)
        for path in (source / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_package_list_is_the_folders_with_an_init() -> None:
    folders = {
        ".".join(("visionselector_eval", *path.parent.relative_to(ROOT).parts))
        for folder in LAYERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    data = "visionselector_eval." + DATA.replace("/", ".")
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders | {data}


@pytest.mark.parametrize("which", ["wheel", "wheel_of_sdist"])
def test_a_wheel_holds_every_file_of_the_package_and_no_other(built: Built, which: str) -> None:
    expected = package_files(built.source)
    assert {name.split("/")[1] for name in expected} == {*LAYERS, "results"}
    weights = [f"models/tiny/{folder}/model.safetensors" for folder in ("checkpoint", "llava", "llava_stf")]
    needed_files = ("models/py.typed", "tasks/suites.yaml", *weights)
    for needed in (*needed_files, f"{DATA}/llava_stf.csv", f"{DATA}/backbones.yaml"):
        assert f"visionselector_eval/{needed}" in expected
    assert contents(getattr(built, which)) == expected


def test_the_sdist_holds_what_it_takes_to_test_it(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"run_eval.py", "LICENSE", "README.md", "requirements.lock", "Makefile", "tests/conftest.py"} <= names


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (found,) = [entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}")]
        return archive.read(found).decode()


def asked(*extras: str) -> list[Requirement]:
    """What pyproject asks for, with these extras, and with those that they include."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += asked(*requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return found


def test_metadata(built: Built) -> None:
    headers = email.message_from_string(metadata(built.wheel, "METADATA"))
    assert headers["Name"] == "visionselector-eval"
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers["License-File"] == "LICENSE"
    assert headers["Requires-Python"] == ">=3.11"
    assert {"flash", "ray", "dev"} <= set(headers.get_all("Provides-Extra", []))
    assert "visionselector-eval" in headers.get_payload()  # the README
    requires = {r.name: r for r in map(Requirement, headers.get_all("Requires-Dist", [])) if r.marker is None}
    assert requires["lmms-eval"].specifier == Requirement("x>=0.7.3,<0.8").specifier
    assert requires["transformers"].specifier == Requirement("x>=5.18,<5.25").specifier
    licence = metadata(built.wheel, "licenses/LICENSE")
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "Copyright 2026 the visionselector-eval authors" in licence


def test_entry_points(built: Built) -> None:
    points = ConfigParser(delimiters="=")
    points.read_string(metadata(built.wheel, "entry_points.txt"))
    assert points["console_scripts"]["visionselector-eval"] == "visionselector_eval.harness.cli:main"
    assert points["lmms_eval.models"]["visionselector_eval"] == "visionselector_eval.models:manifests"


def test_every_range_has_two_ends() -> None:
    for requirement in asked(*PROJECT["optional-dependencies"]):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement


# ------------------------------------------------------------------------------------------------ the installed wheel


def test_the_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
import visionselector_eval.models as models
print(models.__file__)
assert not {"torch", "lmms_eval", "transformers"} & set(sys.modules), "importing the models brings heavy libraries"
from visionselector_eval.tasks.suites import load_suites
from visionselector_eval.models.tiny import checkpoint
assert "tiny" in load_suites().suites
print(checkpoint())
assert (checkpoint() / "model.safetensors").is_file()
from visionselector_eval.harness.report.published import FOLDER, load_published
assert len(load_published()) > 300
print(FOLDER)
"""
    places = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert all(Path(place).is_relative_to(installed) for place in places), places


def test_the_command_starts_without_heavy_libraries(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
from visionselector_eval.harness import cli
assert cli.__file__.startswith(sys.argv[1])
assert cli.main(["--help"]) == 0 and cli.main(["--version"]) == 0
assert not {"torch", "lmms_eval", "transformers", "pandas"} & set(sys.modules)
"""
    shown = run(sys.executable, "-c", code, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert PROJECT["version"] in shown


# --------------------------------------------------------------------------------------------------------- dependencies


def direct() -> dict[str, Requirement]:
    """What pyproject asks for, with the extra `dev`, by canonical name."""
    return {canonicalize_name(requirement.name): requirement for requirement in asked("dev")}


def test_the_lock_pins_every_direct_dependency_inside_its_range() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        assert "*" not in specifier.version, line
        assert canonicalize_name(requirement.name) not in pins, line
        pins[canonicalize_name(requirement.name)] = specifier.version
    for name, requirement in direct().items():
        assert name in pins, f"{name} is missing in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(pins[name]), f"{requirement} is not {pins[name]}: run `make lock`"


def test_the_lock_has_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    for address in ("://", "--", " @", "file:", "-e ", "/"):
        assert address not in text, address


def test_every_third_party_import_is_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in asked(*PROJECT["optional-dependencies"])}
    homes = packages_distributions()
    for folder in LAYERS:
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported_modules(path):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top == "visionselector_eval":
                    continue
                homes_of = {canonicalize_name(home) for home in homes.get(top, [top])}
                assert homes_of & declared, f"{path.relative_to(ROOT)} imports {top}, which pyproject does not name"
