"""`doctor`: what this machine lacks."""

from __future__ import annotations

import argparse

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import PROGRAM, Parser, add_task_flags, example, show, task_names


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} doctor",
        description="Check versions, devices, attention back-ends, entry points, hub and video; say what to do.\n"
        "With --suite or --tasks: the data of these tasks instead, and what their code imports. Nothing is downloaded.",
        epilog=example("doctor", "doctor --suite tiny", "doctor --suite visionselector13 --data-root /data/benchmarks"),
    )
    add_task_flags(parser, "folder of local data, as for sweep; without it, what is in the caches counts")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.doctor import machine as doctor
    from visionselector_eval.harness.doctor.data import data_checks

    names = task_names(arguments)
    if arguments.data_root and not names:
        raise InputError("doctor --data-root for which tasks? give --suite or --tasks")
    checks = data_checks(names, arguments.data_root) if names else doctor.checks()
    show(doctor.render(checks))
    return doctor.exit_code(checks)
