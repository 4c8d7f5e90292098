"""`check`: a checkpoint or a method of one's own against the contract."""

from __future__ import annotations

import argparse

from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    Parser,
    add_weight_flags,
    chosen_method,
    example,
    show,
)


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} check",
        description="Check that a method keeps the promises that every compressor makes, on the embedded checkpoint:\n"
        "for a method of your own, before its numbers are looked at. Exit code 3: it does not keep one.",
        epilog=example("check divprune", "check fastv:layer=3,rows=all"),
    )
    parser.add_argument("method", metavar="NAME[:OPTION=VALUE,...]", help="a compressor of `list compressors`")
    add_weight_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines import build
    from visionselector_eval.models.checks import PROPERTIES, check

    chosen = chosen_method(arguments)
    problems = check(build(chosen.name, **chosen.options))
    for promise in PROPERTIES:
        found = [problem for problem in problems if problem.promise == promise]
        show(f"{'broken' if found else 'ok    '}  {promise}")
        for problem in found[:3]:
            show(f"        {problem.prompt}: {problem.found}")
        if found[3:]:
            show(f"        and {len(found) - 3} more")
    return EXIT_FAILED_CELLS if problems else EXIT_OK
