"""`data`: training data."""

from __future__ import annotations

import argparse
from pathlib import Path

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.cli.arguments import EXIT_FAILED_CELLS, EXIT_OK, PROGRAM, Parser, example, show

_ACTIONS = ("mirrors", "prepare-cambrian")
_MIRRORS = {"tasks", "documents"}
_CAMBRIAN = {"file", "image_root", "coco_share"}


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} data",
        description="Make training data. mirrors: conversations from the embedded benchmarks, never those that sweeps\n"
        "ask. prepare-cambrian: the published recipe's subsets of Cambrian737k.jsonl, images checked.",
        epilog=example(
            "data mirrors --tasks tiny_docvqa_val tiny_textvqa_val --documents 500 --output data",
            "data prepare-cambrian Cambrian737k.jsonl --image-root images --output cambrian",
        ),
    )
    parser.add_argument("action", metavar="|".join(_ACTIONS), help="one of these")
    parser.add_argument("file", nargs="?", help="prepare-cambrian: Cambrian737k.jsonl")
    parser.add_argument("--output", metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="prepare-cambrian: folder that the records' image paths start from"
    )
    parser.add_argument(
        "--coco-share", type=float, metavar="SHARE", help="prepare-cambrian: share of COCO's records (default: 0.1)"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="mirrors: embedded benchmarks (default: all of suite `tiny`)"
    )
    parser.add_argument(
        "--documents", type=int, metavar="N", help="mirrors: documents of each benchmark (default: 500)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="SEED", help="mirrors: not 0 (default: 1000003); prepare-cambrian: default 42"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    text, complete = _make(arguments)
    show(text)
    return EXIT_OK if complete else EXIT_FAILED_CELLS


def _make(arguments: argparse.Namespace) -> tuple[str, bool]:
    """Make training data; what to print, and whether everything asked for is there."""
    from visionselector_eval.harness.screen import Screen
    from visionselector_eval.harness.training import data as training_data

    if arguments.action not in _ACTIONS:
        raise unknown("action of data", arguments.action, _ACTIONS)
    foreign = _CAMBRIAN if arguments.action == "mirrors" else _MIRRORS
    for name in sorted(foreign):
        if getattr(arguments, name) is not None:
            shown = f"'{arguments.file}'" if name == "file" else f"--{name.replace('_', '-')}"
            raise InputError(f"data {arguments.action} takes no {shown}")
    if not arguments.output:
        raise InputError(f"data {arguments.action} where to? give --output FOLDER")
    if arguments.action == "mirrors":
        from visionselector_eval.tasks.suites import suite

        tasks = arguments.tasks or suite("tiny")
        documents = 500 if arguments.documents is None else arguments.documents
        with Screen("documents", "drawing") as screen:
            screen.begin(documents * len(tasks))
            made = training_data.write_mirrors(
                tasks,
                arguments.output,
                seed=1_000_003 if arguments.seed is None else arguments.seed,
                documents=documents,
                advance=screen.advance,
            )
        also = f"; {made.left_out} that sweeps show were left out" if made.left_out else ""
        return f"{made.samples} conversations: {made.file}{also}", True
    if not arguments.file or not arguments.image_root:
        raise InputError("data prepare-cambrian needs the file and its images: Cambrian737k.jsonl --image-root FOLDER")
    size = Path(arguments.file).stat().st_size if Path(arguments.file).is_file() else 0
    with Screen("bytes", "reading") as screen:
        screen.begin(size)
        report = training_data.prepare_cambrian(
            arguments.file,
            arguments.image_root,
            arguments.output,
            coco_share=0.1 if arguments.coco_share is None else arguments.coco_share,
            seed=42 if arguments.seed is None else arguments.seed,
            advance=screen.advance,
        )
    return report.render(), report.complete
