"""What a GPU machine without network needs beside its own torch: wheels in one folder, installed by one script.

    make bundle

It writes build/bundle/: this package's wheel, the wheels of the libraries that measuring needs, at the versions of
requirements.lock, `install.sh`, `missing.py` and `commit`. Copy the folder there, see what is missing, and install into
a folder of its own, which leaves the machine's packages alone:

    python3 bundle/missing.py
    sh bundle/install.sh SITE && export PYTHONPATH=SITE
    python3 -m visionselector_eval.harness.microbenchmarks.gpu --minutes 8 --commit "$(cat bundle/commit)"

`missing.py` needs nothing but Python and prints each library that is not there, or not in the range that this package
admits; give their names with `--only` to make the bundle smaller. torch, torchvision and what they bring along (numpy,
pillow) are the machine's own.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.environment import git_commit

log = logging.getLogger(__name__)

ROOTS = (
    "transformers",
    "huggingface-hub",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "pydantic",
    "pandas",
    "tabulate",
    "rich",
    "pyyaml",
    "tqdm",
    "packaging",
    "psutil",
    "nvidia-ml-py",
)
"""What measuring and its tables import; plots and parquet files are done without."""

EXTRAS = ("pyarrow", "matplotlib", "av")
"""What `--with` adds: rows as parquet, plots, videos."""

_THEIRS = ("torch", "torchvision")  # with all that they need; and of the rest, what nothing here needs:
_NEEDLESS = ("numpy", "pillow", "hf-xet")

_MAX_MIB = 60
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]

_INSTALL = """#!/bin/sh
# Usage: sh install.sh SITE. Puts the bundle's packages into the folder SITE; then: export PYTHONPATH=SITE
set -eu
test $# -eq 1 || { echo "usage: sh install.sh SITE" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$1" "$here"/*.whl
"""

_MISSING = '''"""Prints each library of the bundle that this Python lacks, with the version that the bundle holds."""

import sys
from importlib.metadata import PackageNotFoundError, version

PINS = {pins!r}
RANGES = {ranges!r}


def numbers(text):
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:3]]


def fits(found, bounds):
    checks = {{">=": lambda a, b: a >= b, "<": lambda a, b: a < b}}
    return all(checks[sign](numbers(found), numbers(bound)) for sign, bound in bounds)


lacking = 0
for name in ("torch", "torchvision", *PINS):
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    if found is not None and fits(found, RANGES.get(name, ())):
        continue
    lacking += 1
    bounds = ",".join(sign + bound for sign, bound in RANGES.get(name, ()))
    print(name, "(needed: %s; here: %s)" % (bounds or "any", found or "none"))
print("python %d.%d, %d of %d missing" % (*sys.version_info[:2], lacking, len(PINS) + 2))
'''


def closure(roots: Iterable[str], without: Container[str] = ()) -> list[str]:
    """`roots` and the libraries that they need, sorted, by the metadata of what is installed here.

    Args:
        without: names that are left out, with what only they need.
    """
    names: set[str] = set()
    remaining = [canonicalize_name(root) for root in roots]
    while remaining:
        name = remaining.pop()
        if name in names or name in without:
            continue
        names.add(name)
        needed = [Requirement(line) for line in metadata.requires(name) or ()]
        remaining += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted(names)


def libraries(extras: Iterable[str] = ()) -> list[str]:
    """What the bundle holds beside this package: `ROOTS`, `extras` and what they need, less what comes with torch."""
    return closure([*ROOTS, *extras], {*closure(_THEIRS), *_NEEDLESS})


def pins(lock: Path) -> dict[str, str]:
    """{name: version} of a lock file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def ranges(root: Path) -> dict[str, tuple[tuple[str, str], ...]]:
    """{name: ((">=", "5.18"), ("<", "6"))} of pyproject.toml's run-time dependencies."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for line in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        assert name is not None
        found[name[0].lower()] = tuple(re.findall(r"(>=|<)\s*([0-9.]+)", line))
    return found


def make(root: Path, output: Path, names: Sequence[str], python: str) -> int:
    """Write the bundle from the checkout at `root`; returns its size in bytes.

    Raises:
        InputError: a library that the lock does not pin, or that the registry has no wheel of.
    """
    if not (root / "requirements.lock").is_file():
        raise InputError("a bundle is made from a checkout of this project: clone it and run `make bundle` there")
    locked = pins(root / "requirements.lock")
    if lost := [name for name in names if name not in locked]:
        raise InputError(f"requirements.lock pins no {', '.join(lost)}: run `make lock`, or leave them out")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    fetch = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(output)]
    fetch += ["--implementation", "cp", "--python-version", python]
    fetch += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    if names:
        _run([*fetch, *(f"{name}=={locked[name]}" for name in names)])
    with tempfile.TemporaryDirectory() as copy:  # setuptools leaves build/lib behind, which a later wheel would ship
        source = Path(copy) / "source"
        shutil.copytree(root, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "profiles", "__pycache__"))
        _run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(source)])
    known = {name: locked[name] for name in names}
    (output / "install.sh").write_text(_INSTALL, encoding="utf-8")
    text = _MISSING.format(pins=known, ranges=ranges(root))
    (output / "missing.py").write_text(text, encoding="utf-8")
    commit, modified = git_commit()
    (output / "commit").write_text(f"{commit or 'unknown'}{'+changes' if modified else ''}\n", encoding="utf-8")
    return sum(path.stat().st_size for path in output.iterdir())


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InputError(f"the bundle can't be made: {errors[-1] if errors else done.stderr.strip()[-300:]}")


def parser() -> argparse.ArgumentParser:
    """The flags of this module."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="example: make bundle BUNDLE='--python 3.12'"
    )
    made.add_argument("--python", default="3.12", metavar="X.Y", help="version of Python there (default: 3.12)")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these libraries alone, as missing.py prints them")
    made.add_argument("--with", nargs="+", default=[], dest="extra", metavar="NAME", help=", ".join(EXTRAS))
    made.add_argument("--output", type=Path, default=Path("build/bundle"), help="default: build/bundle")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module: 0 done, 2 bad input."""
    flags = parser()
    chosen = flags.parse_args(arguments)
    try:
        for name in chosen.extra:
            if name not in EXTRAS:
                raise unknown("addition to the bundle", name, EXTRAS)
        names = libraries(chosen.extra)
        for name in chosen.only or ():
            if name not in names:
                raise unknown("library of the bundle", name, names)
        if not re.fullmatch(r"3\.\d+", chosen.python):
            raise InputError(f"invalid --python {chosen.python!r}: expected a version such as 3.12")
        size = make(Path(__file__).resolve().parents[2], chosen.output, chosen.only or names, chosen.python)
    except InputError as error:
        flags.error(str(error))
    mib = size / 2**20
    log.info("%s: %.1f MiB", chosen.output, mib)
    if mib > _MAX_MIB:
        log.warning("the bundle is over %d MiB: give --only with what missing.py printed there", _MAX_MIB)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
