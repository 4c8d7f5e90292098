"""`profile`: time, memory and tokens of methods."""

from __future__ import annotations

import argparse
import logging

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    Parser,
    add_existing_flag,
    add_weight_flags,
    example,
    profile_from,
    show,
)
from visionselector_eval.harness.cli.flags import add_flags

log = logging.getLogger(__name__)


_PROFILE_ACTIONS = ("report FOLDER", "compare A B")


def parser() -> Parser:
    from visionselector_eval.harness.profiler.spec import ProfileSpec

    parser = Parser(
        prog=f"{PROGRAM} profile",
        description="Measure what compression saves and costs: time by phase, memory, tokens, FLOPs, energy.\n"
        "Run it again to resume. `profile report FOLDER` makes the tables of a profile again; `profile compare A B`\n"
        "says for how many cells a repetition lands in the intervals of the first run (exit code 3 below 9 of 10).",
        epilog=example(
            "profile --methods visionselector divprune --budgets 0.2 --synthetic 64 --repeats 10 --warmup 2",
            "profile --random-weights qwen2_5_vl_7b --synthetic 1024 4096 16384 --device cuda",
            "profile --pretrained Qwen/Qwen2.5-VL-7B-Instruct --task chartqa --limit 8",
            "profile compare profiles/first profiles/second",
        ),
    )
    actions = " or ".join(_PROFILE_ACTIONS)
    parser.add_argument("action", nargs="*", metavar="ACTION", help=f"{actions}; default: measure")
    add_flags(parser, {"profile": ProfileSpec})
    add_weight_flags(parser)
    add_existing_flag(
        parser,
        {
            "keep": "samples of the folder are kept and what is missing is measured",
            "overwrite": "forget what the folder holds first",
        },
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    action = arguments.action
    if action and (action[0], len(action)) not in (("report", 2), ("compare", 3)):
        usable = " or ".join(_PROFILE_ACTIONS)
        raise InputError(f"invalid 'profile {' '.join(action)}': expected {usable}, or flags alone to measure")
    if action:
        from visionselector_eval.harness.profiler import report

        if action[0] == "report":
            show(report.write(action[1]))
            return EXIT_OK
        agreement = report.compare(action[1], action[2])
        show(agreement.text())
        return EXIT_OK if agreement.share >= 0.9 else EXIT_FAILED_CELLS
    from visionselector_eval.harness.profiler.run import run_profile
    from visionselector_eval.harness.profiler.screen import ProfileScreen

    with ProfileScreen() as screen:
        done = run_profile(profile_from(arguments), overwrite=arguments.existing == "overwrite", progress=screen)
    show(done.text)
    show(f"profile: {done.folder} (table.md, table.csv, samples.parquet, plots)")
    if done.failed:
        log.error("%d cells could not be measured; run the same command again to retry them", len(done.failed))
        return EXIT_FAILED_CELLS
    return EXIT_OK
