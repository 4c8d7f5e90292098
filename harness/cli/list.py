"""`list`: compressors, backbones, suites, tasks, published numbers."""

from __future__ import annotations

import argparse

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import EXIT_OK, PROGRAM, Parser, example, show

_LISTS = ("compressors", "backbones", "suites", "tasks")


_PUBLISHED = "published"  # by its name alone: a few hundred numbers are no part of "everything that a sweep takes"


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} list",
        description="What can be named in a sweep: compressors with their options, backbones, suites, tasks.\n"
        "published: the numbers that papers print, with their sources; nothing among them was measured here.",
        epilog=example(
            "list", "list compressors", "list published", "list published --backbone LLaVA-1.5-7B --method divprune"
        ),
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="|".join([*_LISTS, _PUBLISHED]),
        help=f"one of these (default: all but {_PUBLISHED})",
    )
    for name, what in (("backbone", "its name there or an id"), ("method", "a compressor"), ("task", "a task")):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"with {_PUBLISHED}: only this {name}; {what}")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines.contract.errors import unknown
    from visionselector_eval.harness.cli.listing import render

    if arguments.what is not None and arguments.what not in (*_LISTS, _PUBLISHED):
        raise unknown("list", arguments.what, [*_LISTS, _PUBLISHED])
    only = {name: value for name in ("backbone", "method", "task") if (value := getattr(arguments, name)) is not None}
    if arguments.what == _PUBLISHED:
        from visionselector_eval.harness.report import published

        show(published.render(published.chosen(published.load_published(), **only)))
        return EXIT_OK
    if only:
        raise InputError(f"--{next(iter(only))} goes with list {_PUBLISHED}")
    show(render([arguments.what] if arguments.what else list(_LISTS)))
    return EXIT_OK
