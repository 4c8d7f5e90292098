"""`ask`: one image or video and a question."""

from __future__ import annotations

import argparse
from typing import Any

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import (
    EXIT_OK,
    PROGRAM,
    Parser,
    add_backbone_flags,
    add_weight_flags,
    chosen_method,
    example,
    show,
)
from visionselector_eval.harness.cli.flags import add_flags, read_flags
from visionselector_eval.harness.terminal import free_text


def parser() -> Parser:
    from visionselector_eval.harness.sweep.spec import ASKING, SweepSpec

    parser = Parser(
        prog=f"{PROGRAM} ask",
        description="Ask one question about one image or video, with any compressor and budget.",
        epilog=example(
            "ask --image invoice.png 'What is the total?' --method divprune --budget 0.2",
            "ask --video clip.mp4 'What happens?' --method uniform --budget 64tok --max-num-frames 8",
        ),
    )
    parser.add_argument("question", type=free_text, help="the question, in quotes")
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--image", metavar="FILE", help="image to ask about")
    media.add_argument("--video", metavar="FILE", help="video to ask about")
    add_backbone_flags(parser)
    parser.add_argument(
        "--method", default="full", metavar="NAME[:OPTION=VALUE,...]", help="a compressor (default: full)"
    )
    parser.add_argument("--budget", default="1.0", help="share of visual tokens to keep (0.2, 20%%) or a count (64tok)")
    add_weight_flags(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    add_flags(parser, {"ask": SweepSpec}, names=ASKING)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines import build, parse_budget
    from visionselector_eval.baselines.contract.registry import resolve_options
    from visionselector_eval.harness.sweep.spec import ASKING, SweepSpec
    from visionselector_eval.models import load_backbone
    from visionselector_eval.models.answering import Answerer, CompressorAtBudget, Request
    from visionselector_eval.models.inputs import MediaSettings, read_image, read_video

    chosen = chosen_method(arguments)
    options = resolve_options(chosen.name, chosen.options, arguments.pretrained)
    compressor, budget = build(chosen.name, **options), parse_budget(arguments.budget)
    given = {name: value for name, value in read_flags(arguments, SweepSpec).items() if name in ASKING}
    asked = SweepSpec.make({"backbones": {"pretrained": arguments.pretrained, "revision": arguments.revision}, **given})
    media = MediaSettings(**asked.media(asked.backbones[0]))
    if arguments.max_new_tokens < 1:
        raise InputError(f"invalid --max-new-tokens {arguments.max_new_tokens}: expected at least 1")
    parts: list[dict[str, Any]] = []
    if arguments.image:
        parts.append({"type": "image", "image": read_image(arguments.image)})
    elif arguments.video:
        parts.append({"type": "video", "video": read_video(arguments.video, media)})
    parts.append({"type": "text", "text": arguments.question})
    backbone = load_backbone(
        arguments.pretrained,
        arguments.device,
        arguments.dtype,
        arguments.attn_implementation,
        revision=arguments.revision,
    )
    setting = CompressorAtBudget(backbone.bind(compressor), budget)
    request = Request(
        key=arguments.question,
        messages=lambda: [{"role": "user", "content": parts}],
        generation={"max_new_tokens": arguments.max_new_tokens},
    )
    answerer = Answerer(backbone, media)
    answer = answerer.answer(answerer.prepare([request], [setting]), setting)[0]
    show(answer.text)
    share = f" ({100 * answer.kept_tokens / answer.total_tokens:.1f} %)" if answer.total_tokens else ""
    show(
        f"[{chosen.label} at budget {budget}: {answer.kept_tokens} of {answer.total_tokens} visual tokens kept{share}, "
        f"{answer.prompt_tokens} prompt tokens, {answer.new_tokens} new tokens]"
    )
    if remark := getattr(backbone, "remark", ""):
        show(f"[{arguments.pretrained}: {remark}]")
    return EXIT_OK
