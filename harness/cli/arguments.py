"""Flags and their values: what several commands share."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.terminal import free_text

if TYPE_CHECKING:
    from visionselector_eval.harness.sweep.spec import MethodSpec


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


def flag_type(annotation: Any) -> Callable[[str], Any]:
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if isinstance(annotation, types.UnionType) and options:
        annotation = options[0]
    return annotation if annotation in (int, float, str) else str


def add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of the spec, so that flags and YAML can't come to differ."""
    from visionselector_eval.harness.sweep.spec import SweepSpec

    renamed = {"backbones": "pretrained"}
    for name, info in SweepSpec.model_fields.items():
        flag = "--" + renamed.get(name, name).replace("_", "-")
        default = info.get_default(call_default_factory=True)
        shown = "" if default in (None, [], {}) else f" (default: {default_text(default)})"
        text = f"{info.description}{shown}".replace("%", "%%")
        if typing.get_origin(info.annotation) in (list, dict):
            metavar = {"methods": "NAME[:OPTION=VALUE,...]", "generation": "KEY=VALUE", "metric": "TASK=NAME"}.get(
                name, name.upper().rstrip("S")
            )
            of_items = typing.get_args(info.annotation)[0]
            kind = int if of_items is int else str
            parser.add_argument(flag, dest=name, nargs="+", metavar=metavar, type=kind, help=text)
        else:
            of_one = free_text if name == "system_prompt" else flag_type(info.annotation)
            parser.add_argument(flag, dest=name, metavar=name.upper(), type=of_one, help=text)


def default_text(default: Any) -> str:
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


def method_of(text: str) -> Any:
    name, colon, options = text.partition(":")
    return {"name": name, "options": _pairs(options.split(","), f"option of method {name}")} if colon else name


def spec_from(arguments: argparse.Namespace) -> Any:
    from visionselector_eval.harness.sweep.spec import SweepSpec, load_spec, make_spec

    given = {name: getattr(arguments, name) for name in SweepSpec.model_fields if getattr(arguments, name) is not None}
    if "methods" in given:
        given["methods"] = [method_of(text) for text in given["methods"]]
    if "metric" in given:
        given["metric"] = {task: str(name) for task, name in _pairs(given["metric"], "metric").items()}
    if "generation" in given:
        given["generation"] = _pairs(given["generation"], "generation setting")
    if "tasks" in given and "suite" not in given:
        given["suite"] = None  # --tasks alone asks for those tasks, whatever suite a spec file names
    asked = [option for option in WEIGHTS if getattr(arguments, option)]
    if asked and "methods" not in given:
        if arguments.spec:
            option, (name, _) = asked[0], WEIGHTS[asked[0]]
            raise InputError(
                f"--{option} goes with --methods; in a spec file write methods: [{{name: {name}, {option}: ...}}]"
            )
        given["methods"] = [WEIGHTS[option][0] for option in asked]
    for option in asked:
        given["methods"] = with_weights(given["methods"], option, getattr(arguments, option))
    return load_spec(arguments.spec, given) if arguments.spec else make_spec(given)


# Flags for the weights of learned methods: the option they fill, the method that is asked for where none is named.
WEIGHTS = {
    "scorer": ("visionselector", "scorer weights for visionselector, and for every other method with an option scorer"),
    "predictor": ("dynamic_qwen", "predictor weights for dynamic_qwen (every method with an option predictor)"),
}


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    for option, (_, about) in WEIGHTS.items():
        parser.add_argument(f"--{option}", metavar="PATH_OR_ID", help=f"{about}; default: those in the checkpoint")


def with_weights(methods: Sequence[Any], option: str, source: str) -> list[Any]:
    """`methods` with `source` for each that has this option, also as a part of `A+B`; at least one must have it."""
    from visionselector_eval.baselines.contract.registry import options_of
    from visionselector_eval.harness.sweep.spec import make_method

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
            "label": m.get("label") or make_method(m).label,
            "options": {**dict.fromkeys(keys, source), **m["options"]},
        }
        if keys
        else m
        for m, keys in zip(plain, taking, strict=True)
    ]


def chosen_method(arguments: argparse.Namespace) -> MethodSpec:
    """The one method of a command, with the weights that were given for it."""
    from visionselector_eval.harness.sweep.spec import make_method

    method = method_of(arguments.method)
    for option in WEIGHTS:
        if source := getattr(arguments, option):
            (method,) = with_weights([method], option, source)
    return make_method(method)


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
