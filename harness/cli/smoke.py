"""`smoke`: a small run compared with what is expected."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    Parser,
    example,
    method_of,
    show,
)


def parser() -> Parser:
    from visionselector_eval.harness.smoke.run import add_flags

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
    add_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.smoke.expectation import DEFAULTS
    from visionselector_eval.harness.smoke.run import smoke, tolerance_of
    from visionselector_eval.harness.sweep.screen import SweepScreen

    given = {name: value for name in (*DEFAULTS, "tasks") if (value := getattr(arguments, name)) is not None}
    if "methods" in given:
        given["methods"] = [method_of(text) for text in given["methods"]]
    tolerance = tolerance_of(arguments.score_tolerance, arguments.kept_tolerance, arguments.answers)
    with SweepScreen() as screen:
        report = smoke(
            given,
            expect=arguments.expect,
            update=arguments.update,
            tolerance=tolerance,
            junit=arguments.junit,
            output=arguments.output,
            progress=screen,
        )
    show(report.text)
    return EXIT_OK if report.as_expected else EXIT_FAILED_CELLS
