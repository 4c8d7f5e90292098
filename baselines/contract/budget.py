"""Budgets: how many visual tokens are kept, as a share of all or as an absolute count."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from visionselector_eval.baselines.contract.errors import InputError

_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary: without the slack its floor would be 28


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the visual tokens, 0 < ratio <= 1. Ratio 1 is the backbone itself, exactly."""

    ratio: float

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise _wrong(self.ratio)

    def count(self, n: int) -> int:
        """Tokens kept of `n`: `min(n, max(1, floor(ratio * n + 1e-9)))` (canonical K)."""
        return min(n, max(1, math.floor(self.ratio * n + _SLACK)))

    def __str__(self) -> str:
        return f"{self.ratio:g}"


@dataclass(frozen=True, slots=True)
class Tokens:
    """An absolute number of visual tokens in each scope (canonical: each image or video), written `64tok`."""

    number: int

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 1:
            raise _wrong(f"{self.number}tok")

    def count(self, n: int) -> int:
        """Tokens kept of `n`: `min(n, number)`."""
        return min(n, self.number)

    def __str__(self) -> str:
        return f"{self.number}tok"


Budget = Share | Tokens


def _wrong(value: object) -> InputError:
    return InputError(
        f"invalid budget {value!r}: expected a ratio of visual tokens to keep, 0 < r <= 1 (0.2 or 20%), "
        "or an absolute count such as 64tok (in Python: Tokens(64))"
    )


def parse_budget(value: Budget | float | str) -> Budget:
    """Read a budget: `0.2`, `"0.2"`, `"20%"`, `"64tok"`, `Share(0.2)` or `Tokens(64)`.

    Raises:
        InputError: for anything else (0, -1, 1.5, nan, "abc", ...).
    """
    if isinstance(value, Share | Tokens):
        return value
    if isinstance(value, bool):
        raise _wrong(value)
    if isinstance(value, int | float):
        ratio = float(value)
        if not 0 < ratio <= 1:  # also false for nan
            raise _wrong(value)
        return Share(ratio)
    text = str(value).strip().lower()
    if match := re.fullmatch(r"(\d+)\s*tok(?:ens?)?", text):
        if int(match[1]) < 1:
            raise _wrong(value)
        return Tokens(int(match[1]))
    try:
        ratio = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise _wrong(value) from None
    if not 0 < ratio <= 1:
        raise _wrong(value)
    return Share(ratio)
