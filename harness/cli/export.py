"""`export`: trained weights into a full checkpoint, and back."""

from __future__ import annotations

import argparse

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.cli.arguments import EXIT_OK, PROGRAM, Parser, example, show


def parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} export",
        description="Put trained weights into a full checkpoint in the released layout, or take them out of one.\n"
        "A LLaVA folder in the original code's layout is rewritten in transformers'.",
        epilog=example(
            "export runs/visionselector full-checkpoint",
            "export --to scorer full-checkpoint scorer",
        ),
    )
    parser.add_argument(
        "source",
        help="result folder of a training, or a LLaVA folder in the original layout; with --to scorer, predictor or "
        "fusion: a full checkpoint",
    )
    parser.add_argument("output", help="new folder")
    parser.add_argument(
        "--to",
        default="checkpoint",
        metavar="checkpoint|scorer|predictor|fusion",
        help="checkpoint: the backbone's files with the trained weights among them, as released; scorer, predictor, "
        "fusion: these weights alone, out of a checkpoint (default: checkpoint)",
    )
    parser.add_argument(
        "--pretrained", metavar="FOLDER_OR_ID", help="backbone of the checkpoint (default: the one it was trained with)"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    show(_export(arguments))
    return EXIT_OK


def _export(arguments: argparse.Namespace) -> str:
    """Export; what to print."""
    from visionselector_eval.models.training import export

    ways = {kind.name: kind for kind in export.KINDS.values()}
    if arguments.to == "checkpoint":
        folder = export.export_checkpoint(arguments.source, arguments.output, arguments.pretrained)
        return f"full checkpoint: {folder}"
    if arguments.to not in ways:
        raise unknown("export --to", arguments.to, ["checkpoint", *ways])
    if arguments.pretrained:
        raise InputError(f"export --to {arguments.to} takes no --pretrained: the checkpoint is what is read")
    folder = export.extract_learned(arguments.source, arguments.output, ways[arguments.to])
    return f"{arguments.to}: {folder}"
