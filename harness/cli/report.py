"""`report`: tables of a run."""

from __future__ import annotations

import argparse

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import EXIT_OK, PROGRAM, Parser, example, screen_width, show


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} report",
        description="Rebuild the leaderboard files of a run from its folder alone, and print the table.",
        epilog=example(
            "report runs/sweep",
            "report runs/sweep --difficulty",
            "report runs/sweep --published",
            "report runs/sweep --against divprune",
        ),
    )
    parser.add_argument("run", help="run folder of a sweep")
    parser.add_argument(
        "--difficulty",
        action="store_true",
        help="also how methods fare on the documents that `downsample` loses; writes difficulty.md and .csv",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="also what papers print for the same backbones, tasks and methods, in tables of its own; writes "
        "published.md",
    )
    parser.add_argument(
        "--against",
        metavar="ROW[@BUDGET]",
        help="also how every row differs from this one, in points with paired intervals: a label of the leaderboard, "
        "at each budget its own or at the one given; writes against.md and .csv",
    )
    parser.add_argument(
        "--against-backbone", metavar="ID", help="with --against: the row of this backbone, for those of all others"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.report.leaderboard import write
    from visionselector_eval.harness.report.render import terminal

    if arguments.against_backbone is not None and arguments.against is None:
        raise InputError("--against-backbone goes with --against")
    parts = [terminal(write(arguments.run), screen_width())]
    # Printed together at the end: what is asked for beside the leaderboard may refuse the run.
    if arguments.difficulty:
        from visionselector_eval.harness.report import difficulty

        parts.append(difficulty.to_terminal(difficulty.write(arguments.run)))
    if arguments.published:
        from visionselector_eval.harness.report import published

        parts.append(published.write(arguments.run))
    if arguments.against is not None:
        from visionselector_eval.harness.report import pairwise as against

        parts.append(against.write(arguments.run, arguments.against, arguments.against_backbone))
    show("\n".join(parts))
    return EXIT_OK
