"""`smoke`: a small run compared with what is expected."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    Parser,
    example,
    show,
)
from visionselector_eval.harness.cli.flags import add_flags, read_flags

if TYPE_CHECKING:
    from visionselector_eval.harness.smoke.compare import Tolerance


_HELP = {
    "suite": "a named list of tasks",
    "tasks": "tasks, beside or instead of a suite",
    "limit": "first N documents of each task; an even number where mme is among them",
}


def parser() -> Parser:
    from visionselector_eval.harness.smoke.compare import OTHER_TORCH_SHARE
    from visionselector_eval.harness.smoke.expectation import DEFAULTS, EXPECTATION
    from visionselector_eval.harness.sweep.spec import SweepSpec

    parser = Parser(
        prog=f"{PROGRAM} smoke",
        description="Run a few documents of each embedded benchmark and compare scores, kept tokens and answers\n"
        "with a stored expectation: a check for CI. What is not given is as in the expectation, or else the\n"
        "default. Exit codes: 0 as expected, 2 bad input, 3 something moved or failed.",
        epilog=example(
            "smoke --update --methods divprune uniform --tasks tiny_chartqa tiny_pope --limit 2",
            "smoke --junit smoke.xml",
        ),
    )
    add_flags(parser, {"smoke": SweepSpec}, names=(*DEFAULTS, "tasks"), defaults={"tasks": [], **DEFAULTS}, about=_HELP)
    parser.add_argument("--expect", metavar="FILE", default=EXPECTATION, help="the expectation (default: %(default)s)")
    parser.add_argument("--update", action="store_true", help="write the expectation instead of comparing with it")
    parser.add_argument(
        "--score-tolerance",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="how far a score may move, as a share of the metric's largest value (default: 0)",
    )
    parser.add_argument(
        "--kept-tolerance",
        metavar="TOKENS",
        type=float,
        default=0.0,
        help="how far a cell's mean kept and total tokens may move (default: 0)",
    )
    parser.add_argument(
        "--answers",
        metavar="exact|ignore|SHARE",
        help="how many of all answers may differ (default: exact; "
        f"{OTHER_TORCH_SHARE:g} where another torch made the expectation)",
    )
    parser.add_argument("--junit", metavar="FILE", help="write a JUnit report, a test case for each cell")
    parser.add_argument("--output", metavar="FOLDER", help="keep the run folder here (default: thrown away)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.smoke.run import smoke
    from visionselector_eval.harness.sweep.screen import SweepScreen
    from visionselector_eval.harness.sweep.spec import SweepSpec

    tolerance = tolerance_of(arguments.score_tolerance, arguments.kept_tolerance, arguments.answers)
    with SweepScreen() as screen:
        report = smoke(
            read_flags(arguments, SweepSpec),
            expect=arguments.expect,
            update=arguments.update,
            tolerance=tolerance,
            junit=arguments.junit,
            output=arguments.output,
            progress=screen,
        )
    show(report.text)
    return EXIT_OK if report.as_expected else EXIT_FAILED_CELLS


def tolerance_of(score: float, kept: float, answers: str | None) -> Tolerance:
    """A tolerance from what the command line says; `answers` is exact, ignore, or a share (0.05, 5%).

    Raises:
        InputError: an invalid value.
    """
    from visionselector_eval.harness.smoke.compare import Tolerance

    for flag, value in (("--score-tolerance", score), ("--kept-tolerance", kept)):
        if not 0 <= value < math.inf:
            raise InputError(f"invalid {flag} {value:g}: expected 0 or more")
    share = {"exact": 0.0, "ignore": 1.0}.get(answers or "")
    if answers is not None and share is None:
        try:
            share = float(answers[:-1]) / 100 if answers.endswith("%") else float(answers)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise InputError(
                f"invalid --answers '{answers}': expected exact, ignore, or the share of answers that may differ, "
                "0.05 or 5%"
            )
    return Tolerance(score, kept, share)
