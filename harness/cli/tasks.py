"""`tasks`: the data of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    Parser,
    add_task_flags,
    example,
    say,
    show,
    task_names,
)

_TASK_ACTIONS = ("fetch", "list", "layout", "include", "check")


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} tasks",
        description="The data of the benchmarks. fetch: download what is missing to a folder that `sweep --data-root`\n"
        "reads, where a hub is reachable, else print the folder's layout; run it again to resume. list: the tasks.\n"
        "layout: which files a data root holds. include: write task files of the embedded benchmarks (or of those\n"
        "named) for the stock command, and print their folder: lmms-eval eval --include_path FOLDER. check: which\n"
        "tasks of lmms-eval (or of those named) have a headline metric that is a guess; `sweep --metric` chooses.",
        epilog=example(
            "tasks layout --tasks chartqa videomme --data-root /data/benchmarks",
            "tasks fetch --suite visionselector13 --data-root /data/benchmarks",
            "tasks list",
            "tasks include --tasks tiny_chartqa",
        ),
    )
    parser.add_argument("action", metavar="|".join(_TASK_ACTIONS), help="one of these")
    add_task_flags(parser, "folder of the data, one folder in it for each task")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines.contract.errors import unknown

    if arguments.action not in _TASK_ACTIONS:
        raise unknown("action of tasks", arguments.action, _TASK_ACTIONS)
    names = task_names(arguments)
    if arguments.action == "list":
        if names or arguments.data_root:
            raise InputError("tasks list takes no flags: it lists every task")
        from visionselector_eval.harness.cli.listing import render

        show(render(["tasks"]))
        return EXIT_OK
    if arguments.action == "include":
        show(_include_folder(names, arguments.data_root))
        return EXIT_OK
    if arguments.action == "check":
        if arguments.data_root:
            raise InputError("tasks check takes no --data-root: it reads task files, no data")
        from visionselector_eval.harness.cli.listing import headlines

        show(headlines(names))
        return EXIT_OK
    if not names:
        raise InputError(f"tasks {arguments.action} which? give --suite or --tasks, e.g. --tasks chartqa")
    from visionselector_eval.tasks.local import fetch

    if arguments.action == "layout":
        show(fetch.layouts(names, arguments.data_root or "DATA_ROOT"))
        return EXIT_OK
    if not arguments.data_root:
        raise InputError("tasks fetch where to? give --data-root FOLDER")
    try:
        results = fetch.fetch(names, arguments.data_root, say=say)
    except fetch.HubUnreachable as error:
        show(fetch.layouts(error.tasks, arguments.data_root))
        raise
    show(fetch.render(results))
    return EXIT_FAILED_CELLS if any(result.state == "failed" for result in results) else EXIT_OK


def _include_folder(names: Sequence[str], data_root: str | None) -> str:
    from visionselector_eval.tasks.suites import entry, suite
    from visionselector_eval.tasks.tiny import mirror
    from visionselector_eval.tasks.tiny.store import write_bindings

    if data_root:
        raise InputError("tasks include takes no --data-root: it is about the embedded benchmarks")
    if real := [name for name in names if entry(name).mirror_of is None]:
        raise InputError(
            f"tasks include is about the embedded benchmarks, and {real[0]} is lmms-eval's own: the stock command "
            "knows it already; to read it from local files use `sweep --data-root`"
        )
    if any(mirror(name).media == "clip" for name in names or suite("tiny")):
        from huggingface_hub.constants import HF_HOME

        # Standard error: the folder on standard output goes into a command line.
        say(
            "some of these tasks have videos, and lmms-eval reads HF_HOME while it loads such tasks (nextqa): "
            f"export HF_HOME={HF_HOME} (or another folder) before lmms-eval eval"
        )
    return str(write_bindings(names or suite("tiny")))
