"""`profile`: time, memory and tokens of methods."""

from __future__ import annotations

import argparse
import logging
import typing
from typing import TYPE_CHECKING, Any

from visionselector_eval.baselines.contract.errors import InputError

if TYPE_CHECKING:
    pass
from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    WEIGHTS,
    Parser,
    add_weight_flags,
    default_text,
    example,
    flag_type,
    method_of,
    show,
    with_weights,
)

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
    for name, info in ProfileSpec.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "" if default in (None, []) else f" (default: {default_text(default)})"
        many = typing.get_origin(info.annotation) is list
        metavar = {"methods": "NAME[:OPTION=VALUE,...]", "synthetic": "N", "random_weights": "SHAPE"}.get(
            name, name.upper()
        )
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            nargs="+" if many else None,
            metavar=metavar,
            type=int if name == "synthetic" else str if many else flag_type(info.annotation),
            help=f"{info.description}{shown}".replace("%", "%%"),
        )
    add_weight_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="forget what the folder holds first")
    return parser


def _profile_spec(arguments: argparse.Namespace) -> Any:
    from visionselector_eval.harness.profiler.spec import ProfileSpec, make_profile_spec

    given = {
        name: getattr(arguments, name) for name in ProfileSpec.model_fields if getattr(arguments, name) is not None
    }
    if "methods" in given:
        given["methods"] = [method_of(text) for text in given["methods"]]
    for option in [option for option in WEIGHTS if getattr(arguments, option)]:
        given.setdefault("methods", [WEIGHTS[option][0]])
        given["methods"] = with_weights(given["methods"], option, getattr(arguments, option))
    return make_profile_spec(given)


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
        done = run_profile(_profile_spec(arguments), overwrite=arguments.overwrite, progress=screen)
    show(done.text)
    show(f"profile: {done.folder} (table.md, table.csv, samples.parquet, plots)")
    if done.failed:
        log.error("%d cells could not be measured; run the same command again to retry them", len(done.failed))
        return EXIT_FAILED_CELLS
    return EXIT_OK
