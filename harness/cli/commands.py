"""The command: `visionselector-eval`, the same program as `python run_eval.py`."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli import (
    ask,
    check,
    data,
    doctor,
    export,
    profile,
    report,
    smoke,
    sweep,
    tasks,
    train,
)
from visionselector_eval.harness.cli import list as lists
from visionselector_eval.harness.cli.arguments import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    PROGRAM,
    Parser,
    example,
)
from visionselector_eval.harness.terminal import show_what_can_be_shown


@dataclass(frozen=True)
class Command:
    """One command: the parser of its flags, what runs it, and what the overview says about it."""

    parser: Callable[[], Parser]
    run: Callable[[argparse.Namespace], int]
    about: str


COMMANDS = {
    "sweep": Command(sweep.parser, sweep.run, "methods x budgets x benchmarks, and a leaderboard (the default)"),
    "ask": Command(ask.parser, ask.run, "one question about one image or video"),
    "report": Command(report.parser, report.run, "rebuild the leaderboard of a run folder"),
    "profile": Command(profile.parser, profile.run, "time, memory, tokens and energy of each method, measured"),
    "smoke": Command(smoke.parser, smoke.run, "a few documents of each benchmark against a stored expectation, for CI"),
    "train": Command(train.parser, train.run, "train a scorer, a predictor, or LLaVA's token fusion"),
    "data": Command(
        data.parser,
        data.run,
        "make training data: from the embedded benchmarks, or Cambrian-737K's subsets",
    ),
    "export": Command(export.parser, export.run, "trained weights into a full checkpoint, and back"),
    "list": Command(lists.parser, lists.run, "compressors, backbones, suites, tasks; numbers that papers print"),
    "check": Command(check.parser, check.run, "whether a method keeps the promises of a compressor"),
    "tasks": Command(tasks.parser, tasks.run, "download the data of benchmarks, or say where they belong"),
    "doctor": Command(doctor.parser, doctor.run, "check this machine and say what to do"),
}


def _overview() -> str:
    lines = "\n".join(f"  {name:<8} {command.about}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} [COMMAND] [FLAGS]\n\n"
        "Measure visual-token compression in multimodal LLMs. Without a command, flags are those of `sweep`.\n\n"
        f"commands:\n{lines}\n\n"
        f"`{PROGRAM} COMMAND --help` says more.\n"
        "Exit codes: 0 everything asked for was done, 2 bad input, 3 some cells failed.\n\n" + example("--limit 4")
    )


def _quiet_libraries(verbose: bool) -> None:
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are 20 lines; what failed is said once, by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a library's own switch: it warns about forks otherwise
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "PIL", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        # Read by these libraries when they are imported; in a log file a bar is a thousand lines.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A user's mistake is one line on stderr and code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_what_can_be_shown()
    try:
        if given[:1] in (["--help"], ["-h"], ["help"]):
            sys.stdout.write(_overview() + "\n")
            return EXIT_OK
        if given[:1] == ["--version"]:
            from importlib.metadata import version

            sys.stdout.write(f"{PROGRAM} {version(PROGRAM)}\n")
            return EXIT_OK
        name = given.pop(0) if given and not given[0].startswith("-") else "sweep"
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise InputError(f"unknown command '{name}': {hint}available: {', '.join(COMMANDS)}")
        command = COMMANDS[name]
        parser = command.parser()
        parser.add_argument(
            "-v", "--verbose", action="store_true", help="say more, tracebacks of failed cells included"
        )
        parsed = parser.parse_all(given)
        _quiet_libraries(parsed.verbose)
        return command.run(parsed)
    except InputError as error:
        sys.stderr.write(f"{PROGRAM}: {' '.join(str(error).split())}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted; run the same command again to resume\n")
        return EXIT_INTERRUPTED
