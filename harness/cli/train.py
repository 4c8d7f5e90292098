"""`train`: weights of learned methods."""

from __future__ import annotations

import argparse

from visionselector_eval.baselines.contract.errors import unknown
from visionselector_eval.harness.cli.arguments import EXIT_OK, PROGRAM, Parser, add_existing_flag, example, show
from visionselector_eval.harness.cli.flags import add_flags, read_flags, refuse_flags_of_others
from visionselector_eval.models.settings import Settings


def parser() -> Parser:
    from visionselector_eval.harness.training.run import KINDS

    parser = Parser(
        prog=f"{PROGRAM} train",
        description="Train what a learned compressor needs, beside a frozen backbone: `visionselector` its scorer,\n"
        "`dynamic-qwen` its predictor. `token-fusion` trains LLaVA-STF's projector, then with it the LLM. Run the\n"
        "same command again to resume a killed one. Defaults are the published settings. Several devices:\n"
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
    parser.add_argument("what", metavar="|".join(KINDS), help="what is trained")
    parser.add_argument("--spec", metavar="FILE", help="YAML with the fields below; flags win over it")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would run; train nothing")
    add_existing_flag(
        parser,
        {
            "keep": "resume the training that the output folder holds; one with other settings is refused",
            "overwrite": "forget the training that the output folder holds",
        },
    )
    add_flags(parser, KINDS)
    return parser


def training_from(arguments: argparse.Namespace) -> Settings:
    """The checked training that flags and a YAML file make together.

    Raises:
        InputError: an unknown kind, a flag of another kind, an invalid value.
    """
    from visionselector_eval.harness.training.run import KINDS

    if arguments.what not in KINDS:
        raise unknown("training", arguments.what, KINDS)
    refuse_flags_of_others(arguments, arguments.what, KINDS)
    kind = KINDS[arguments.what]
    given = read_flags(arguments, kind)
    return kind.load(arguments.spec, given) if arguments.spec else kind.make(given)


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.training.run import run_train

    spec = training_from(arguments)
    if text := run_train(spec, overwrite=arguments.existing == "overwrite", dry_run=arguments.dry_run):
        show(text)
    return EXIT_OK
