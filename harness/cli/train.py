"""`train`, `data` and `export`: weights of learned methods."""

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
    flag_type,
    show,
)


def parser() -> Parser:
    from visionselector_eval.harness.training.run import add_train_flags

    parser = Parser(
        prog=f"{PROGRAM} train",
        description="Train what a learned compressor needs, beside a frozen backbone: `visionselector` its scorer,\n"
        "`dynamic-qwen` its predictor. `token-fusion` trains LLaVA-STF's projector, then with it the LLM. Run the\n"
        "same command again to go on where a killed one was. Defaults are the published settings. Several devices:\n"
        "`accelerate launch -m visionselector_eval.harness.cli train ...`.",
        epilog=example(
            "train visionselector --pretrained Qwen/Qwen2.5-VL-7B-Instruct --data chartqa.jsonl ocr_vqa.jsonl "
            "--image-root images --output runs/scorer",
            "train visionselector --spec tiny.yaml --dry-run",
            "train tiny --output runs/tiny",
            "train dynamic-qwen --data train.jsonl --hidden 64 --batch-size 8 --accumulation 1 --max-steps 200",
            "train token-fusion --pretrained llava-hf/llava-1.5-7b-hf --data captions.jsonl --output runs/stf-1",
            "train token-fusion --stage 2 --pretrained runs/stf-1 --data instructions.jsonl --output runs/stf-2",
        ),
    )
    add_train_flags(parser, flag_type)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.training.run import run_train

    if text := run_train(arguments):
        show(text)
    return EXIT_OK


def data_parser() -> Parser:
    from visionselector_eval.harness.training.run import add_data_flags

    parser = Parser(
        prog=f"{PROGRAM} data",
        description="Make training data. mirrors: conversations from the embedded benchmarks, never those that sweeps\n"
        "ask. prepare-cambrian: the published recipe's subsets of Cambrian737k.jsonl, pictures checked.",
        epilog=example(
            "data mirrors --tasks tiny_docvqa_val tiny_textvqa_val --documents 500 --output data",
            "data prepare-cambrian Cambrian737k.jsonl --image-root images --output cambrian",
        ),
    )
    add_data_flags(parser)
    return parser


def run_data(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.training.run import run_data

    text, complete = run_data(arguments)
    show(text)
    return EXIT_OK if complete else EXIT_FAILED_CELLS


def export_parser() -> Parser:
    from visionselector_eval.harness.training.run import add_export_flags

    parser = Parser(
        prog=f"{PROGRAM} export",
        description="Put trained weights into a full checkpoint in the released layout, or take them out of one.\n"
        "A LLaVA folder in the original code's layout is rewritten in transformers'.",
        epilog=example(
            "export runs/visionselector full-checkpoint",
            "export --to scorer full-checkpoint scorer",
        ),
    )
    add_export_flags(parser)
    return parser


def run_export(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.training.run import run_export

    show(run_export(arguments))
    return EXIT_OK
