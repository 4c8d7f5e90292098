"""Flags and their values: what several commands share."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.flags import read_flags

if TYPE_CHECKING:
    from visionselector_eval.harness.profiler.spec import ProfileSpec
    from visionselector_eval.harness.sweep.spec import MethodSpec, SweepSpec


PROGRAM = "visionselector-eval"


EXIT_OK, EXIT_BAD_INPUT, EXIT_FAILED_CELLS, EXIT_INTERRUPTED = 0, 2, 3, 130


class Parser(argparse.ArgumentParser):
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


def example(*commands: str) -> str:
    return "example:\n" + "\n".join(f"  {PROGRAM} {command}" for command in commands)


class _Renamed(argparse.Action):
    """A flag of earlier versions: refused with the word that took its place."""

    def __init__(self, option_strings: Sequence[str], dest: str, word: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.word = word

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        raise InputError(f"{given[-1]} is now --existing {self.word} (see {parser.prog} --help)")


def add_existing_flag(parser: argparse.ArgumentParser, about: Mapping[str, str]) -> None:
    """Add `--existing`: what becomes of results that the output folder holds already.

    Args:
        about: its words, the default first, each with what it does.
    """
    default = next(iter(about))
    parser.add_argument(
        "--existing",
        choices=list(about),
        default=default,
        metavar="|".join(about),
        help="; ".join(f"{word}: {what}" for word, what in about.items()) + f" (default: {default})",
    )
    for flag, word in (("only-missing", "keep"), ("replace-stale", "replace-stale"), ("overwrite", "overwrite")):
        if word in about:
            parser.add_argument(f"--{flag}", dest="existing", action=_Renamed, word=word)


def spec_from(arguments: argparse.Namespace) -> SweepSpec:
    """The checked sweep that flags and a YAML file make together.

    Raises:
        InputError: a field, option or value that is invalid.
    """
    from visionselector_eval.harness.sweep.spec import SweepSpec

    given = read_flags(arguments, SweepSpec)
    if "tasks" in given and "suite" not in given:
        given["suite"] = None  # --tasks alone asks for those tasks, whatever suite a spec file names
    asked = [option for option in WEIGHTS if getattr(arguments, option)]
    if asked and arguments.spec and "methods" not in given:
        option, (name, _) = asked[0], WEIGHTS[asked[0]]
        raise InputError(
            f"--{option} goes with --methods; in a spec file write methods: [{{name: {name}, {option}: ...}}]"
        )
    _fill_in_weights(given, arguments)
    return SweepSpec.load(arguments.spec, given) if arguments.spec else SweepSpec.make(given)


def profile_from(arguments: argparse.Namespace) -> ProfileSpec:
    """The checked profile that flags make.

    Raises:
        InputError: a field, option or value that is invalid.
    """
    from visionselector_eval.harness.profiler.spec import ProfileSpec

    given = read_flags(arguments, ProfileSpec)
    _fill_in_weights(given, arguments)
    return ProfileSpec.make(given)


# Flags for the weights of learned methods: the option they fill, the method that is asked for where none is named.
WEIGHTS = {
    "scorer": ("visionselector", "scorer weights for visionselector, and for every other method with an option scorer"),
    "predictor": ("dynamic_qwen", "predictor weights for dynamic_qwen (every method with an option predictor)"),
}


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    for option, (_, about) in WEIGHTS.items():
        parser.add_argument(f"--{option}", metavar="PATH_OR_ID", help=f"{about}; default: those in the checkpoint")


def _fill_in_weights(given: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Give the methods of a spec the weights of the command line; without methods, those that the weights are for."""
    asked = [option for option in WEIGHTS if getattr(arguments, option)]
    if asked:
        given.setdefault("methods", [WEIGHTS[option][0] for option in asked])
    for option in asked:
        given["methods"] = with_weights(given["methods"], option, getattr(arguments, option))


def with_weights(methods: Sequence[Any], option: str, source: str) -> list[Any]:
    """`methods` with `source` for each that has this option, also as a part of `A+B`; at least one must have it."""
    from visionselector_eval.baselines.contract.registry import options_of
    from visionselector_eval.harness.sweep.spec import MethodSpec

    plain: list[dict[str, Any]] = [{"name": m, "options": {}} if isinstance(m, str) else m for m in methods]
    taking = [[k for k in options_of(m["name"]) if k == option or k.endswith(f".{option}")] for m in plain]
    if not any(taking):
        raise InputError(
            f"--{option} is for {WEIGHTS[option][0]} and other methods with an option {option}; "
            f"none is among the methods {', '.join(m['name'] for m in plain)}"
        )
    # The label says nothing about the weights: they are the same for all of this sweep, and the record names them.
    return [
        {
            **m,
            "label": m.get("label") or MethodSpec.make(m).label,
            "options": {**dict.fromkeys(keys, source), **m["options"]},
        }
        if keys
        else m
        for m, keys in zip(plain, taking, strict=True)
    ]


def chosen_method(arguments: argparse.Namespace) -> MethodSpec:
    """The one method of a command, with the weights that were given for it."""
    from visionselector_eval.harness.sweep.spec import MethodSpec, method_from_text

    method = method_from_text(arguments.method)
    for option in WEIGHTS:
        if source := getattr(arguments, option):
            (method,) = with_weights([method], option, source)
    return MethodSpec.make(method)


def show(text: str) -> None:
    """Write a result to stdout; everything else goes to stderr."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough (`| head`); what follows must not fail at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def screen_width() -> int | None:
    """Columns of the terminal; none in a pipe, where lines may be as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def add_backbone_flags(parser: argparse.ArgumentParser) -> None:
    from visionselector_eval.harness.sweep.spec import SweepSpec

    parser.add_argument(
        "--pretrained", default="tiny", help="folder, hub id, or `tiny`, the embedded checkpoint (default)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    for name in ("device", "dtype", "attn_implementation"):
        info = SweepSpec.model_fields[name]
        parser.add_argument("--" + name.replace("_", "-"), default=info.default, help=info.description)


def add_task_flags(parser: argparse.ArgumentParser, data_root: str) -> None:
    parser.add_argument("--suite", metavar="SUITE", help="a named list of tasks")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks, beside or instead of a suite")
    parser.add_argument("--data-root", metavar="FOLDER", help=data_root)


def task_names(arguments: argparse.Namespace) -> list[str]:
    from visionselector_eval.tasks.suites import suite

    return list(dict.fromkeys([*(suite(arguments.suite) if arguments.suite else []), *(arguments.tasks or [])]))
