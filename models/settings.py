"""Settings that are checked when they are made, whether they come from flags, a YAML file or plain data.

What a sweep, a profile, a training and a smoke run ask for are subclasses of `Settings`: an unknown name is refused
with the nearest existing one, an invalid value with what is expected, each in one line.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from visionselector_eval.baselines.contract.budget import Budget, parse_budget
from visionselector_eval.baselines.contract.errors import InputError, unknown

BudgetField = Annotated[Budget, BeforeValidator(parse_budget), PlainSerializer(str, return_type=str)]
"""A budget in settings: parsed when they are made, written as its text."""


@dataclass(frozen=True)
class Flag:
    """How a field is written on the command line where that is not simply its name and a value of its type.

    Attributes:
        name: of the flag, without dashes; the field's name when empty.
        metavar: what stands for the value in help texts.
        parse: makes the field's value of the words behind the flag.
        free_text: the words are text for people, not a path or a name: UTF-8 whatever the locale.
    """

    name: str = ""
    metavar: str = ""
    parse: Callable[[Sequence[str]], Any] | None = None
    free_text: bool = False


class Settings(BaseModel):
    """Base of all settings: strict, and every mistake is an `InputError` of one line."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    subject: ClassVar[str] = "settings"
    """What these are settings of, in errors."""

    @classmethod
    def make(cls, data: Mapping[str, Any] | str) -> Self:
        """Check plain data: a mapping of fields, or the short form where these settings have one.

        Raises:
            InputError: an unknown field (with the nearest existing one) or an invalid value.
        """
        try:
            return cls.model_validate(data if isinstance(data, str) else dict(data))
        except ValidationError as error:
            raise cls._one_line(error) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file; `overrides` (from flags) win.

        Raises:
            InputError: a missing file, no YAML, an unknown field, an invalid value.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"spec '{path}' can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"spec '{path}' is not YAML: it is not text in UTF-8") from error
        except yaml.YAMLError as error:
            raise InputError(f"spec '{path}' is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, Mapping):
            raise InputError(f"invalid spec '{path}': expected a mapping of fields, e.g. 'budgets: [0.2]'")
        return cls.make({**data, **(overrides or {})})

    def to_yaml(self, *, exclude_none: bool = True) -> str:
        """These settings as YAML that `load` reads back to the same.

        Args:
            exclude_none: leave out fields without a value; not where their default is a value.
        """
        return yaml.safe_dump(self.model_dump(exclude_none=exclude_none), sort_keys=False, allow_unicode=True)

    @classmethod
    def _one_line(cls, error: ValidationError) -> InputError:
        # A mistyped name first: that a needed field is missing is then only its consequence.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
            return cause
        location = first["loc"]
        if first["type"] == "extra_forbidden":
            return unknown(f"field of {cls.subject}", str(location[-1]), cls._model_at(location).model_fields)
        where = ".".join(map(str, location))
        expected = first["msg"].removeprefix("Input should be ")
        if expected == first["msg"]:
            return InputError(f"invalid {where} in {cls.subject}: {expected[0].lower()}{expected[1:]}")
        a_number = "a number " if expected.startswith(("greater", "less")) else ""
        return InputError(f"invalid {where} {first['input']!r} in {cls.subject}: expected {a_number}{expected}")

    @classmethod
    def _model_at(cls, location: Sequence[int | str]) -> type[BaseModel]:
        """The model whose field an error's location names last."""
        model: type[BaseModel] = cls
        for part in location[:-1]:
            if isinstance(part, str) and part in model.model_fields:
                model = next(_models_in(model.model_fields[part].annotation), model)
        return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)
