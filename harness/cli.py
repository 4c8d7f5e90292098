"""The command: `visionselector-eval`, the same program as `python run_eval.py`."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from visionselector_eval.baselines.errors import InputError

from .terminal import free_text, show_what_can_be_shown

if TYPE_CHECKING:
    from .spec import MethodSpec

PROGRAM = "visionselector-eval"
EXIT_OK, EXIT_BAD_INPUT, EXIT_FAILED_CELLS, EXIT_INTERRUPTED = 0, 2, 3, 130

log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(arguments)
        if rest:
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(rest[0].split("=")[0], known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise InputError(f"unknown argument '{rest[0]}': {hint}see {self.prog} --help")
        return parsed


def _example(*commands: str) -> str:
    return "example:\n" + "\n".join(f"  {PROGRAM} {command}" for command in commands)


# sweep ---------------------------------------------------------------------------------------------------------------


def _flag_type(annotation: Any) -> Callable[[str], Any]:
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if isinstance(annotation, types.UnionType) and options:
        annotation = options[0]
    return annotation if annotation in (int, float, str) else str


def _add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of the spec, so that flags and YAML can't come to differ."""
    from .spec import SweepSpec

    renamed = {"backbones": "pretrained"}
    for name, info in SweepSpec.model_fields.items():
        flag = "--" + renamed.get(name, name).replace("_", "-")
        default = info.get_default(call_default_factory=True)
        shown = "" if default in (None, [], {}) else f" (default: {_shown(default)})"
        text = f"{info.description}{shown}".replace("%", "%%")
        if typing.get_origin(info.annotation) in (list, dict):
            metavar = {"methods": "NAME[:OPTION=VALUE,...]", "generation": "KEY=VALUE", "metric": "TASK=NAME"}.get(
                name, name.upper().rstrip("S")
            )
            of_items = typing.get_args(info.annotation)[0]
            kind = int if of_items is int else str
            parser.add_argument(flag, dest=name, nargs="+", metavar=metavar, type=kind, help=text)
        else:
            of_one = free_text if name == "system_prompt" else _flag_type(info.annotation)
            parser.add_argument(flag, dest=name, metavar=name.upper(), type=of_one, help=text)


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return " ".join(str(getattr(d, "pretrained", getattr(d, "name", d))) for d in default)
    return str(default)


def _value(text: str) -> Any:
    """A value from the command line as YAML reads it: true, 3, 0.5, text."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _pairs(items: Sequence[str], what: str) -> dict[str, Any]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"{what} '{item}' is not KEY=VALUE")
        pairs[key] = _value(value)
    return pairs


def _method(text: str) -> Any:
    name, colon, options = text.partition(":")
    return {"name": name, "options": _pairs(options.split(","), f"option of method {name}")} if colon else name


def _spec_from(arguments: argparse.Namespace) -> Any:
    from .spec import SweepSpec, load_spec, make_spec

    given = {name: getattr(arguments, name) for name in SweepSpec.model_fields if getattr(arguments, name) is not None}
    if "methods" in given:
        given["methods"] = [_method(text) for text in given["methods"]]
    if "metric" in given:
        given["metric"] = {task: str(name) for task, name in _pairs(given["metric"], "metric").items()}
    if "generation" in given:
        given["generation"] = _pairs(given["generation"], "generation setting")
    if "tasks" in given and "suite" not in given:
        given["suite"] = None  # --tasks alone asks for those tasks, whatever suite a spec file names
    asked = [option for option in _WEIGHTS if getattr(arguments, option)]
    if asked and "methods" not in given:
        if arguments.spec:
            option, (name, _) = asked[0], _WEIGHTS[asked[0]]
            raise InputError(
                f"--{option} goes with --methods; in a spec file write methods: [{{name: {name}, {option}: ...}}]"
            )
        given["methods"] = [_WEIGHTS[option][0] for option in asked]
    for option in asked:
        given["methods"] = _with_weights(given["methods"], option, getattr(arguments, option))
    return load_spec(arguments.spec, given) if arguments.spec else make_spec(given)


# Flags for the weights of learned methods: the option they fill, the method that is asked for where none is named.
_WEIGHTS = {
    "scorer": ("visionselector", "scorer weights for visionselector, and for every other method with an option scorer"),
    "predictor": ("dynamic_qwen", "predictor weights for dynamic_qwen (every method with an option predictor)"),
}


def _add_weight_flags(parser: argparse.ArgumentParser) -> None:
    for option, (_, about) in _WEIGHTS.items():
        parser.add_argument(f"--{option}", metavar="PATH_OR_ID", help=f"{about}; default: those in the checkpoint")


def _with_weights(methods: Sequence[Any], option: str, source: str) -> list[Any]:
    """`methods` with `source` for each that has this option, also as a part of `A+B`; at least one must have it."""
    from visionselector_eval.baselines.registry import options_of

    from .spec import make_method

    plain: list[dict[str, Any]] = [{"name": m, "options": {}} if isinstance(m, str) else m for m in methods]
    taking = [[k for k in options_of(m["name"]) if k == option or k.endswith(f".{option}")] for m in plain]
    if not any(taking):
        raise InputError(
            f"--{option} is for {_WEIGHTS[option][0]} and other methods with an option {option}; "
            f"none is among the methods {', '.join(m['name'] for m in plain)}"
        )
    # The label says nothing about the weights: they are the same for all of this sweep, and the record names them.
    return [
        {
            **m,
            "label": m.get("label") or make_method(m).label,
            "options": {**dict.fromkeys(keys, source), **m["options"]},
        }
        if keys
        else m
        for m, keys in zip(plain, taking, strict=True)
    ]


def _chosen_method(arguments: argparse.Namespace) -> MethodSpec:
    """The one method of a command, with the weights that were given for it."""
    from .spec import make_method

    method = _method(arguments.method)
    for option in _WEIGHTS:
        if source := getattr(arguments, option):
            (method,) = _with_weights([method], option, source)
    return make_method(method)


def _sweep_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} sweep",
        description="Answer every benchmark with every method at every budget, and print a leaderboard.\n"
        "Without flags: the embedded checkpoint on the embedded benchmarks. Run it again to resume.",
        epilog=_example(
            "sweep --limit 4",
            "sweep --pretrained Qwen/Qwen2.5-VL-7B-Instruct --methods visionselector divprune visionzip "
            "--budgets 0.3 0.2 0.1 --suite visionselector13",
            "sweep --methods divprune:upstream_exact=true random --budgets 20% 64tok --tasks tiny_chartqa --dry-run",
        ),
    )
    parser.add_argument("--spec", metavar="FILE", help="YAML with the fields below; flags win over it")
    _add_spec_flags(parser)
    _add_weight_flags(parser)
    parser.add_argument(
        "--engine", default="local", metavar="NAME", help="local (this process) or ray (default: local)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="workers of engine ray (default: one for each GPU)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells, what they share and what is done; run nothing"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="then measure each cell's time, memory and tokens, alone, on up to 8 documents of its task",
    )
    for flag, what in (("repeats", "timed rounds of every cell"), ("warmup", "rounds before them")):
        help_text = f"with --profile: {what} (default: as for `profile`)"
        parser.add_argument(f"--profile-{flag}", type=int, metavar="N", help=help_text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--overwrite",
        action="store_true",
        help="forget this sweep's cells first (by default its finished cells are kept, and what is missing runs)",
    )
    which.add_argument(
        "--replace-stale",
        action="store_true",
        help="forget cells of the run folder that were made with other settings, such as an older version of this "
        "package or other weights, and keep the rest (by default such cells are refused)",
    )
    return parser


def _sweep(arguments: argparse.Namespace) -> int:
    from .engines import engine
    from .leaderboard import write
    from .screen import SweepScreen, render_plan
    from .store import Run
    from .sweep import plan, run_sweep

    spec = _spec_from(arguments)
    chosen, measuring = engine(arguments.engine, arguments.workers), _profile_plan(arguments)
    if arguments.dry_run:
        folder = spec.folder()
        run = Run(folder) if folder.is_dir() else None
        _print(render_plan(plan(spec, run, chosen.device(spec.device))))
        return EXIT_OK
    with SweepScreen() as screen:
        run, result = run_sweep(
            spec,
            engine=chosen,
            overwrite=arguments.overwrite,
            replace_stale=arguments.replace_stale,
            progress=screen,
        )
    _print(write(run.folder).to_terminal(_width()))
    _print(f"\nrun folder: {run.folder} (leaderboard.md, .csv, .tex, .html)")
    unmeasured = _profile_of_sweep(spec, run, measuring, arguments.overwrite) if measuring is not None else 0
    if result.failed:
        log.error(
            "%d of %d cells failed; run the same command again to retry them", len(result.failed), screen.total_cells
        )
    return EXIT_FAILED_CELLS if result.failed or unmeasured else EXIT_OK


def _profile_plan(arguments: argparse.Namespace) -> Any:
    """How `--profile` measures, None without it; a mistake shows before the sweep runs."""
    given = {name: getattr(arguments, f"profile_{name}") for name in ("repeats", "warmup")}
    given = {name: value for name, value in given.items() if value is not None}
    if not arguments.profile:
        if given:
            raise InputError(f"--profile-{next(iter(given))} goes with --profile")
        return None
    if arguments.engine != "local":
        raise InputError("--profile measures on this machine alone: leave --engine out, and profile a finished sweep")
    from .profiler.run import plan_of
    from .profiler.spec import make_profile_spec

    return plan_of(make_profile_spec(given))


def _profile_of_sweep(spec: Any, run: Any, measuring: Any, overwrite: bool) -> int:
    """Measure a sweep's cells and print the tables; returns how many could not be measured."""
    from .profiler.screen import ProfileScreen
    from .profiler.sweeps import profile_sweep

    with ProfileScreen() as screen:
        done = profile_sweep(spec, run, measuring, overwrite=overwrite, progress=screen)
    for one in done:
        _print(f"\n{one.text}\nprofile: {one.folder}")
    return sum(len(one.failed) for one in done)


def _print(text: str) -> None:
    """Write a result to stdout; everything else goes to stderr."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough (`| head`); what follows must not fail at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _width() -> int | None:
    """Columns of the terminal; none in a pipe, where lines may be as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


# ask -----------------------------------------------------------------------------------------------------------------


def _add_backbone_flags(parser: argparse.ArgumentParser) -> None:
    from .spec import SweepSpec

    parser.add_argument(
        "--pretrained", default="tiny", help="folder, hub id, or `tiny`, the embedded checkpoint (default)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    for name in ("device", "dtype", "attn_implementation"):
        info = SweepSpec.model_fields[name]
        parser.add_argument("--" + name.replace("_", "-"), default=info.default, help=info.description)


def _ask_parser() -> _Parser:
    from .spec import ASKING, SweepSpec

    parser = _Parser(
        prog=f"{PROGRAM} ask",
        description="Ask one question about one image or video, with any compressor and budget.",
        epilog=_example(
            "ask --image invoice.png 'What is the total?' --method divprune --budget 0.2",
            "ask --video clip.mp4 'What happens?' --method uniform --budget 64tok --max-num-frames 8",
        ),
    )
    parser.add_argument("question", type=free_text, help="the question, in quotes")
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--image", metavar="FILE", help="picture to ask about")
    media.add_argument("--video", metavar="FILE", help="video to ask about")
    _add_backbone_flags(parser)
    parser.add_argument(
        "--method", default="full", metavar="NAME[:OPTION=VALUE,...]", help="a compressor (default: full)"
    )
    parser.add_argument("--budget", default="1.0", help="share of visual tokens to keep (0.2, 20%%) or a count (64tok)")
    _add_weight_flags(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
    for name in ASKING:
        info = SweepSpec.model_fields[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            metavar=name.upper(),
            type=_flag_type(info.annotation),
            default=info.default,
            help=f"{info.description}".replace("%", "%%"),
        )
    return parser


def _ask(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines import build, parse_budget
    from visionselector_eval.baselines.registry import resolve_options
    from visionselector_eval.models import load_backbone
    from visionselector_eval.models.answering import Answerer, Request, Setting
    from visionselector_eval.models.inputs import MediaSettings, read_image, read_video

    from .spec import ASKING, make_spec

    chosen = _chosen_method(arguments)
    options = resolve_options(chosen.name, chosen.options, arguments.pretrained)
    compressor, budget = build(chosen.name, **options), parse_budget(arguments.budget)
    given = {name: value for name in ASKING if (value := getattr(arguments, name)) is not None}
    asked = make_spec({"backbones": {"pretrained": arguments.pretrained, "revision": arguments.revision}, **given})
    media = MediaSettings(**asked.media(asked.backbones[0]))
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {arguments.max_new_tokens} is not usable: give at least 1")
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
    setting = Setting(backbone.bind(compressor), budget)
    request = Request(
        key=arguments.question,
        messages=lambda: [{"role": "user", "content": parts}],
        generation={"max_new_tokens": arguments.max_new_tokens},
    )
    answerer = Answerer(backbone, media)
    answer = answerer.answer(answerer.prepare([request], [setting]), setting)[0]
    _print(answer.text)
    share = f" ({100 * answer.kept_tokens / answer.total_tokens:.1f} %)" if answer.total_tokens else ""
    _print(
        f"[{chosen.label} at budget {budget}: {answer.kept_tokens} of {answer.total_tokens} visual tokens kept{share}, "
        f"{answer.prompt_tokens} prompt tokens, {answer.new_tokens} new tokens]"
    )
    if remark := getattr(backbone, "remark", ""):
        _print(f"[{arguments.pretrained}: {remark}]")
    return EXIT_OK


# report, list, doctor ------------------------------------------------------------------------------------------------


def _report_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} report",
        description="Rebuild the leaderboard files of a run from its folder alone, and print the table.",
        epilog=_example(
            "report runs/sweep",
            "report runs/sweep --difficulty",
            "report runs/sweep --published",
            "report runs/sweep --against divprune",
        ),
    )
    parser.add_argument("run", help="run folder of a sweep")
    parser.add_argument(
        "--difficulty",
        action="store_true",
        help="also how methods fare on the documents that `downsample` loses; writes difficulty.md and .csv",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="also what papers print for the same backbones, tasks and methods, in tables of its own; writes "
        "published.md",
    )
    parser.add_argument(
        "--against",
        metavar="ROW[@BUDGET]",
        help="also how every row differs from this one, in points with paired intervals: a label of the leaderboard, "
        "at each budget its own or at the one given; writes against.md and .csv",
    )
    parser.add_argument(
        "--against-backbone", metavar="ID", help="with --against: the row of this backbone, for those of all others"
    )
    return parser


def _report(arguments: argparse.Namespace) -> int:
    from .leaderboard import write

    if arguments.against_backbone is not None and arguments.against is None:
        raise InputError("--against-backbone goes with --against")
    parts = [write(arguments.run).to_terminal(_width())]
    # Printed together at the end: what is asked for beside the leaderboard may refuse the run.
    if arguments.difficulty:
        from . import difficulty

        parts.append(difficulty.to_terminal(difficulty.write(arguments.run)))
    if arguments.published:
        from . import published

        parts.append(published.write(arguments.run))
    if arguments.against is not None:
        from . import against

        parts.append(against.write(arguments.run, arguments.against, arguments.against_backbone))
    _print("\n".join(parts))
    return EXIT_OK


def _smoke_parser() -> _Parser:
    from .smoke import add_flags

    parser = _Parser(
        prog=f"{PROGRAM} smoke",
        description="Run a few documents of each embedded benchmark and compare scores, kept tokens and answers\n"
        "with a stored expectation: a check for CI. What is not given is as in the expectation, or else the\n"
        "default. Exit codes: 0 as expected, 2 bad input, 3 something moved or failed.",
        epilog=_example(
            "smoke --update --methods divprune uniform --tasks tiny_chartqa tiny_pope --limit 2",
            "smoke --junit smoke.xml",
        ),
    )
    add_flags(parser)
    return parser


def _smoke(arguments: argparse.Namespace) -> int:
    from .screen import SweepScreen
    from .smoke import DEFAULTS, smoke, tolerance_of

    given = {name: value for name in (*DEFAULTS, "tasks") if (value := getattr(arguments, name)) is not None}
    if "methods" in given:
        given["methods"] = [_method(text) for text in given["methods"]]
    tolerance = tolerance_of(arguments.score_tolerance, arguments.kept_tolerance, arguments.answers)
    with SweepScreen() as screen:
        report = smoke(
            given,
            expect=arguments.expect,
            update=arguments.update,
            tolerance=tolerance,
            junit=arguments.junit,
            output=arguments.output,
            progress=screen,
        )
    _print(report.text)
    return EXIT_OK if report.as_expected else EXIT_FAILED_CELLS


# profile -------------------------------------------------------------------------------------------------------------

_PROFILE_ACTIONS = ("report FOLDER", "compare A B")


def _profile_parser() -> _Parser:
    from .profiler.spec import ProfileSpec

    parser = _Parser(
        prog=f"{PROGRAM} profile",
        description="Measure what compression saves and costs: time by phase, memory, tokens, FLOPs, energy.\n"
        "Run it again to resume. `profile report FOLDER` makes the tables of a profile again; `profile compare A B`\n"
        "says for how many cells a repetition lands in the intervals of the first run (exit code 3 below 9 of 10).",
        epilog=_example(
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
        shown = "" if default in (None, []) else f" (default: {_shown(default)})"
        many = typing.get_origin(info.annotation) is list
        metavar = {"methods": "NAME[:OPTION=VALUE,...]", "synthetic": "N", "random_weights": "SHAPE"}.get(
            name, name.upper()
        )
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            nargs="+" if many else None,
            metavar=metavar,
            type=int if name == "synthetic" else str if many else _flag_type(info.annotation),
            help=f"{info.description}{shown}".replace("%", "%%"),
        )
    _add_weight_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="forget what the folder holds first")
    return parser


def _profile_spec(arguments: argparse.Namespace) -> Any:
    from .profiler.spec import ProfileSpec, make_profile_spec

    given = {
        name: getattr(arguments, name) for name in ProfileSpec.model_fields if getattr(arguments, name) is not None
    }
    if "methods" in given:
        given["methods"] = [_method(text) for text in given["methods"]]
    for option in [option for option in _WEIGHTS if getattr(arguments, option)]:
        given.setdefault("methods", [_WEIGHTS[option][0]])
        given["methods"] = _with_weights(given["methods"], option, getattr(arguments, option))
    return make_profile_spec(given)


def _profile(arguments: argparse.Namespace) -> int:
    action = arguments.action
    if action and (action[0], len(action)) not in (("report", 2), ("compare", 3)):
        usable = " or ".join(_PROFILE_ACTIONS)
        raise InputError(f"'profile {' '.join(action)}' is not usable: give {usable}, or flags alone to measure")
    if action:
        from .profiler import report

        if action[0] == "report":
            _print(report.write(action[1]))
            return EXIT_OK
        agreement = report.compare(action[1], action[2])
        _print(agreement.text())
        return EXIT_OK if agreement.share >= 0.9 else EXIT_FAILED_CELLS
    from .profiler.run import run_profile
    from .profiler.screen import ProfileScreen

    with ProfileScreen() as screen:
        done = run_profile(_profile_spec(arguments), overwrite=arguments.overwrite, progress=screen)
    _print(done.text)
    _print(f"profile: {done.folder} (table.md, table.csv, samples.parquet, plots)")
    if done.failed:
        log.error("%d cells could not be measured; run the same command again to retry them", len(done.failed))
        return EXIT_FAILED_CELLS
    return EXIT_OK


_LISTS = ("compressors", "backbones", "suites", "tasks")
_PUBLISHED = "published"  # by its name alone: a few hundred numbers are no part of "everything that a sweep takes"


def _list_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} list",
        description="What can be named in a sweep: compressors with their options, backbones, suites, tasks.\n"
        "published: the numbers that papers print, with their sources; nothing among them was measured here.",
        epilog=_example(
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


def _list(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines.errors import unknown

    from .listing import render

    if arguments.what is not None and arguments.what not in (*_LISTS, _PUBLISHED):
        raise unknown("list", arguments.what, [*_LISTS, _PUBLISHED])
    only = {name: value for name in ("backbone", "method", "task") if (value := getattr(arguments, name)) is not None}
    if arguments.what == _PUBLISHED:
        from . import published

        _print(published.render(published.chosen(published.load_published(), **only)))
        return EXIT_OK
    if only:
        raise InputError(f"--{next(iter(only))} goes with list {_PUBLISHED}")
    _print(render([arguments.what] if arguments.what else list(_LISTS)))
    return EXIT_OK


def _check_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} check",
        description="Check that a method keeps the promises that every compressor makes, on the embedded checkpoint:\n"
        "for a method of your own, before its numbers are looked at. Exit code 3: it does not keep one.",
        epilog=_example("check divprune", "check fastv:layer=3,rows=all"),
    )
    parser.add_argument("method", metavar="NAME[:OPTION=VALUE,...]", help="a compressor of `list compressors`")
    _add_weight_flags(parser)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines import build
    from visionselector_eval.models.checks import PROPERTIES, check

    chosen = _chosen_method(arguments)
    problems = check(build(chosen.name, **chosen.options))
    for promise in PROPERTIES:
        found = [problem for problem in problems if problem.promise == promise]
        _print(f"{'broken' if found else 'ok    '}  {promise}")
        for problem in found[:3]:
            _print(f"        {problem.prompt}: {problem.found}")
        if found[3:]:
            _print(f"        and {len(found) - 3} more")
    return EXIT_FAILED_CELLS if problems else EXIT_OK


_TASK_ACTIONS = ("fetch", "list", "layout", "include", "check")


def _add_task_flags(parser: argparse.ArgumentParser, data_root: str) -> None:
    parser.add_argument("--suite", metavar="SUITE", help="a named list of tasks")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks, beside or instead of a suite")
    parser.add_argument("--data-root", metavar="FOLDER", help=data_root)


def _task_names(arguments: argparse.Namespace) -> list[str]:
    from visionselector_eval.tasks.suites import suite

    return list(dict.fromkeys([*(suite(arguments.suite) if arguments.suite else []), *(arguments.tasks or [])]))


def _tasks_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} tasks",
        description="The data of the benchmarks. fetch: download what is missing to a folder that `sweep --data-root`\n"
        "reads, where a hub is reachable, else print the folder's layout; run it again to go on. list: the tasks.\n"
        "layout: which files a data root wants. include: write task files of the embedded benchmarks (or of those\n"
        "named) for the stock command, and print their folder: lmms-eval eval --include_path FOLDER. check: which\n"
        "tasks of lmms-eval (or of those named) have a headline metric that is a guess; `sweep --metric` chooses.",
        epilog=_example(
            "tasks layout --tasks chartqa videomme --data-root /data/benchmarks",
            "tasks fetch --suite visionselector13 --data-root /data/benchmarks",
            "tasks list",
            "tasks include --tasks tiny_chartqa",
        ),
    )
    parser.add_argument("action", metavar="|".join(_TASK_ACTIONS), help="one of these")
    _add_task_flags(parser, "folder of the data, one folder in it for each task")
    return parser


def _tasks(arguments: argparse.Namespace) -> int:
    from visionselector_eval.baselines.errors import unknown

    if arguments.action not in _TASK_ACTIONS:
        raise unknown("action of tasks", arguments.action, _TASK_ACTIONS)
    names = _task_names(arguments)
    if arguments.action == "list":
        if names or arguments.data_root:
            raise InputError("tasks list takes no flags: it lists every task")
        from .listing import render

        _print(render(["tasks"]))
        return EXIT_OK
    if arguments.action == "include":
        _print(_include_folder(names, arguments.data_root))
        return EXIT_OK
    if arguments.action == "check":
        if arguments.data_root:
            raise InputError("tasks check takes no --data-root: it reads task files, no data")
        from .listing import headlines

        _print(headlines(names))
        return EXIT_OK
    if not names:
        raise InputError(f"tasks {arguments.action} which? give --suite or --tasks, e.g. --tasks chartqa")
    from . import fetch

    if arguments.action == "layout":
        _print(fetch.layouts(names, arguments.data_root or "DATA_ROOT"))
        return EXIT_OK
    if not arguments.data_root:
        raise InputError("tasks fetch where to? give --data-root FOLDER")
    try:
        results = fetch.fetch(names, arguments.data_root, say=_say)
    except fetch.HubUnreachable as error:
        _print(fetch.layouts(error.tasks, arguments.data_root))
        raise
    _print(fetch.render(results))
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
        _say(
            "some of these tasks have videos, and lmms-eval reads HF_HOME while it loads such tasks (nextqa): "
            f"export HF_HOME={HF_HOME} (or another folder) before lmms-eval eval"
        )
    return str(write_bindings(names or suite("tiny")))


def _doctor_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} doctor",
        description="Check versions, devices, attention back-ends, entry points, hub and video; say what to do.\n"
        "With --suite or --tasks: the data of these tasks instead, and what their code imports. Nothing is downloaded.",
        epilog=_example(
            "doctor", "doctor --suite tiny", "doctor --suite visionselector13 --data-root /data/benchmarks"
        ),
    )
    _add_task_flags(parser, "folder of local data, as for sweep; without it, what is in the caches counts")
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor
    from .data_checks import data_checks

    names = _task_names(arguments)
    if arguments.data_root and not names:
        raise InputError("doctor --data-root for which tasks? give --suite or --tasks")
    checks = data_checks(names, arguments.data_root) if names else doctor.checks()
    _print(doctor.render(checks))
    return doctor.exit_code(checks)


# train, data, export -------------------------------------------------------------------------------------------------


def _train_parser() -> _Parser:
    from .training import add_train_flags

    parser = _Parser(
        prog=f"{PROGRAM} train",
        description="Train what a learned compressor needs, beside a frozen backbone: `visionselector` its scorer,\n"
        "`dynamic-qwen` its predictor. `token-fusion` trains LLaVA-STF's projector, then with it the LLM. Run the\n"
        "same command again to go on where a killed one was. Defaults are the published settings. Several devices:\n"
        "`accelerate launch -m visionselector_eval.harness.cli train ...`.",
        epilog=_example(
            "train visionselector --pretrained Qwen/Qwen2.5-VL-7B-Instruct --data chartqa.jsonl ocr_vqa.jsonl "
            "--image-root images --output runs/scorer",
            "train visionselector --spec tiny.yaml --dry-run",
            "train tiny --output runs/tiny",
            "train dynamic-qwen --data train.jsonl --hidden 64 --batch-size 8 --accumulation 1 --max-steps 200",
            "train token-fusion --pretrained llava-hf/llava-1.5-7b-hf --data captions.jsonl --output runs/stf-1",
            "train token-fusion --stage 2 --pretrained runs/stf-1 --data instructions.jsonl --output runs/stf-2",
        ),
    )
    add_train_flags(parser, _flag_type)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from .training import run_train

    if text := run_train(arguments):
        _print(text)
    return EXIT_OK


def _data_parser() -> _Parser:
    from .training import add_data_flags

    parser = _Parser(
        prog=f"{PROGRAM} data",
        description="Make training data. mirrors: conversations from the embedded benchmarks, never those that sweeps\n"
        "ask. prepare-cambrian: the published recipe's subsets of Cambrian737k.jsonl, pictures checked.",
        epilog=_example(
            "data mirrors --tasks tiny_docvqa_val tiny_textvqa_val --documents 500 --output data",
            "data prepare-cambrian Cambrian737k.jsonl --image-root images --output cambrian",
        ),
    )
    add_data_flags(parser)
    return parser


def _data(arguments: argparse.Namespace) -> int:
    from .training import run_data

    text, complete = run_data(arguments)
    _print(text)
    return EXIT_OK if complete else EXIT_FAILED_CELLS


def _export_parser() -> _Parser:
    from .training import add_export_flags

    parser = _Parser(
        prog=f"{PROGRAM} export",
        description="Put trained weights into a full checkpoint in the released layout, or take them out of one.\n"
        "A LLaVA folder in the original code's layout is rewritten in transformers'.",
        epilog=_example(
            "export runs/visionselector full-checkpoint",
            "export --to scorer full-checkpoint scorer",
        ),
    )
    add_export_flags(parser)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from .training import run_export

    _print(run_export(arguments))
    return EXIT_OK


# -----------------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable[[], _Parser], Callable[[argparse.Namespace], int], str]] = {
    "sweep": (_sweep_parser, _sweep, "methods x budgets x benchmarks, and a leaderboard (the default)"),
    "ask": (_ask_parser, _ask, "one question about one image or video"),
    "report": (_report_parser, _report, "rebuild the leaderboard of a run folder"),
    "profile": (_profile_parser, _profile, "time, memory, tokens and energy of each method, measured"),
    "smoke": (_smoke_parser, _smoke, "a few documents of each benchmark against a stored expectation, for CI"),
    "train": (_train_parser, _train, "train a scorer, a predictor, or LLaVA's token fusion"),
    "data": (_data_parser, _data, "make training data: from the embedded benchmarks, or Cambrian-737K's subsets"),
    "export": (_export_parser, _export, "trained weights into a full checkpoint, and back"),
    "list": (_list_parser, _list, "compressors, backbones, suites, tasks; numbers that papers print"),
    "check": (_check_parser, _check, "whether a method keeps the promises of a compressor"),
    "tasks": (_tasks_parser, _tasks, "download the data of benchmarks, or say where they belong"),
    "doctor": (_doctor_parser, _doctor, "check this machine and say what to do"),
}


def _overview() -> str:
    lines = "\n".join(f"  {name:<8} {about}" for name, (_, _, about) in COMMANDS.items())
    return (
        f"usage: {PROGRAM} [COMMAND] [FLAGS]\n\n"
        "Measure visual-token compression in multimodal LLMs. Without a command, flags are those of `sweep`.\n\n"
        f"commands:\n{lines}\n\n"
        f"`{PROGRAM} COMMAND --help` says more.\n"
        "Exit codes: 0 everything asked for was done, 2 bad input, 3 some cells failed.\n\n" + _example("--limit 4")
    )


def _quiet_libraries(verbose: bool) -> None:
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are 20 lines; what failed is said once, by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a library's own switch: it warns about forks otherwise
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "PIL", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        # Read by these libraries when they are imported; in a log file a bar is a thousand lines.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A user's mistake is one line on stderr and code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_what_can_be_shown()
    try:
        if given[:1] in (["--help"], ["-h"], ["help"]):
            sys.stdout.write(_overview() + "\n")
            return EXIT_OK
        if given[:1] == ["--version"]:
            from importlib.metadata import version

            sys.stdout.write(f"{PROGRAM} {version(PROGRAM)}\n")
            return EXIT_OK
        command = given.pop(0) if given and not given[0].startswith("-") else "sweep"
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise InputError(f"unknown command '{command}': {hint}available: {', '.join(COMMANDS)}")
        make_parser, run, _ = COMMANDS[command]
        parser = make_parser()
        parser.add_argument(
            "-v", "--verbose", action="store_true", help="say more, tracebacks of failed cells included"
        )
        parsed = parser.parse_all(given)
        _quiet_libraries(parsed.verbose)
        return run(parsed)
    except InputError as error:
        sys.stderr.write(f"{PROGRAM}: {' '.join(str(error).split())}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: stopped; the same command goes on where this one was\n")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
