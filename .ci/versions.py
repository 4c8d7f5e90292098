"""Run the tests marked `versions` with the oldest or the newest dependencies that pyproject.toml admits.

    python .ci/versions.py lowest      (`make test-lowest`)
    python .ci/versions.py newest      (`make test-newest`)

`lowest` takes the lower bound of every dependency, on the oldest Python of the classifiers that is installed; `newest`
takes the newest release that the registry has, on the newest Python. Each has its own environment, build/venv-lowest
and build/venv-newest, which is brought up to date on every run: no lock, and this package as `pip install .` would put
it there. Where the registry can't be reached, nothing is tested and the last line says so, with exit code 0; any other
failure is a failure.

Runs on the Python of .venv, which has uv; other arguments go to pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "visionselector-eval"
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
UNREACHABLE = re.compile(r"error sending request|operation timed out|HTTP status server error|network was disabled")
"""What uv says where no server answers, as opposed to an answer that it can't use."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def supported() -> list[str]:
    """Versions of Python that pyproject.toml names, oldest first."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    found = [c.rpartition(" ")[2] for c in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)]
    return sorted(found, key=lambda version: int(version.partition(".")[2]))


def interpreter(version: str) -> str | None:
    """The executable of this Python, such as "3.13"; None where there is none that runs."""
    # A file on PATH need not run: pyenv's stands there for versions that are installed and not switched on.
    for environment in ({}, {"PYENV_VERSION": _pyenv(version)}):
        command, variables = shutil.which(f"python{version}"), {**os.environ, **environment}
        if command is None:
            return None
        ask = [command, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2], sys.executable)"]
        answer = subprocess.run(ask, env=variables, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.split(maxsplit=1)[0] == version:
            return answer.stdout.split(maxsplit=1)[1].strip()
    return None


def _pyenv(version: str) -> str:
    """The release that pyenv has of this version; the version itself where pyenv doesn't know."""
    if shutil.which("pyenv") is None:
        return version
    return subprocess.run(["pyenv", "latest", version], capture_output=True, text=True).stdout.strip() or version


def uv(*arguments: str, **options: str) -> str | None:
    """Run uv; what it said if it failed."""
    # The tool of the Python that runs this: no other one on PATH.
    command = [str(Path(sys.executable).parent / "uv"), *arguments]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)
    return done.stderr if done.returncode else None


def unreachable() -> str | None:
    """Why the registry can't be reached; None where it answers. Asks anew, whatever is in uv's cache."""
    said = uv("pip", "compile", "--quiet", "--no-cache", "-", input="packaging\n")
    if said is None or not UNREACHABLE.search(said):
        return None
    line = next(line for line in said.splitlines() if UNREACHABLE.search(line))
    return line.strip().removeprefix("cause: ").removeprefix("hint: ")


def environment(end: str, python: str) -> str | None:
    """Make build/venv-`end`, or bring it up to date; what uv said if it failed."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    folder, pins, wheels = build / f"venv-{end}", build / f"{end}.txt", build / f"wheel-{end}"
    shutil.rmtree(wheels, ignore_errors=True)
    target = ["--python", str(folder / "bin" / "python")]
    resolve = ["--resolution", RESOLUTION[end], "--upgrade", "--no-header", "--no-annotate", "--extra", "test"]
    steps = [
        ["venv", "--quiet", "--allow-existing", "--python", python, str(folder)],
        ["pip", "compile", "--quiet", str(ROOT / "pyproject.toml"), *resolve, *target, "--output-file", str(pins)],
        ["pip", "sync", "--quiet", *target, str(pins)],
        # By way of an sdist, so that building leaves nothing in the checkout that a later build would take.
        ["build", "--quiet", *target, "--out-dir", str(wheels), str(ROOT)],
        ["pip", "install", "--quiet", *target, "--no-deps", "--no-index", "--find-links", str(wheels), NAME],
    ]
    return next((said for step in steps if (said := uv(*step)) is not None), None)


def main(end: str, *arguments: str) -> int:
    versions = supported() if end == "lowest" else supported()[::-1]
    found = next(((version, path) for version in versions if (path := interpreter(version))), None)
    if found is None:
        say(f"test-{end}: no Python of {', '.join(versions)} runs here; install one")
        return 2
    version, python = found
    say(f"test-{end}: Python {version} with the {end} dependencies that pyproject.toml admits")
    said = environment(end, python)
    if said is not None:
        say(said)
        reason = unreachable()
        if reason is None:
            return 1
        say(f"test-{end}: skipped, since the registry can't be reached: {reason}")
        return 0
    test = [str(ROOT / "build" / f"venv-{end}" / "bin" / "python"), "-m", "pytest", "-m", "versions", *arguments]
    return subprocess.run(test, cwd=ROOT).returncode


if __name__ == "__main__":
    if sys.argv[1:2] not in [["lowest"], ["newest"]]:
        sys.exit("invalid arguments: expected 'lowest' or 'newest', then options of pytest")
    sys.exit(main(*sys.argv[1:]))
