"""Flags from settings and settings from flags: one flag for each field, so that flags and YAML can't come to differ."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.terminal import free_text
from visionselector_eval.models.settings import Flag, Settings


def add_flags(
    parser: argparse.ArgumentParser,
    kinds: Mapping[str, type[Settings]],
    *,
    names: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for each field of settings; `read_flags` reads them back.

    Args:
        kinds: the settings that the command takes, each with the word that chooses it. A field that several have is one
            flag, and its help names the defaults that differ.
        names: only these fields.
        defaults: shown instead of the fields' own, where the command fills in others.
        about: help texts instead of the fields' own.
    """
    fields = dict.fromkeys(name for kind in kinds.values() for name in kind.model_fields)
    for name in fields if names is None else names:
        owners = {word: kind.model_fields[name] for word, kind in kinds.items() if name in kind.model_fields}
        info = next(iter(owners.values()))
        given = defaults or {}
        shown = {word: default_text(given.get(name, field)) for word, field in owners.items()}
        default = next(iter(shown.values()))
        if len(set(shown.values())) > 1:
            default = ", ".join(f"{text} for {word}" for word, text in shown.items())
        # A field that most kinds have is the rule; `read_flags` refuses it for the others.
        only = f"; {' and '.join(owners)} only" if 2 * len(owners) <= len(kinds) and len(kinds) > 1 else ""
        text = (about or {}).get(name, info.description or "")
        flag = flag_of(info)
        parser.add_argument(
            f"--{flag_name(name, info)}",
            dest=name,
            nargs="+" if takes_many(info) else None,
            metavar=flag.metavar or name.upper().rstrip("S" if takes_many(info) else ""),
            type=free_text if flag.free_text else _type_of(info.annotation),
            help=f"{text}{f' (default: {default})' if default else ''}{only}".replace("%", "%%"),
        )


def read_flags(arguments: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """The fields of settings that were given as flags, as plain data.

    Raises:
        InputError: words that are not what the field's flag takes.
    """
    given = {}
    for name, info in kind.model_fields.items():
        value = getattr(arguments, name, None)
        if value is not None:
            parse = flag_of(info).parse
            given[name] = value if parse is None else parse(value)
    return given


def refuse_flags_of_others(arguments: argparse.Namespace, word: str, kinds: Mapping[str, type[Settings]]) -> None:
    """Refuse a flag that `kinds[word]` has no field for.

    Raises:
        InputError: naming the flag.
    """
    for name, info in {n: i for kind in kinds.values() for n, i in kind.model_fields.items()}.items():
        if name not in kinds[word].model_fields and getattr(arguments, name) is not None:
            raise InputError(f"--{flag_name(name, info)} is no setting of `train {word}`")


def flag_of(info: FieldInfo) -> Flag:
    """How a field is written on the command line."""
    return next((item for item in info.metadata if isinstance(item, Flag)), Flag())


def flag_name(name: str, info: FieldInfo) -> str:
    """A field's flag, without its dashes."""
    return flag_of(info).name or name.replace("_", "-")


def takes_many(info: FieldInfo) -> bool:
    """Whether a field's flag takes several words."""
    return any(typing.get_origin(part) in (list, dict) for part in (info.annotation, *typing.get_args(info.annotation)))


def default_text(default: Any) -> str:
    """A default (or that of a field) as people write it; empty for none."""
    if isinstance(default, FieldInfo):
        default = default.get_default(call_default_factory=True)
    if default is None or default in ([], {}):
        return ""
    if isinstance(default, list):
        return " ".join(str(getattr(d, "pretrained", getattr(d, "name", d))) for d in default)
    return str(default)


def _type_of(annotation: Any) -> Callable[[str], Any]:
    """What makes a value of one word: the innermost int, float or str of the field's type."""
    if typing.get_origin(annotation) is list or isinstance(annotation, types.UnionType):
        options = [part for part in typing.get_args(annotation) if part is not type(None)]
        return _type_of(options[0])
    return annotation if annotation in (int, float) else str
