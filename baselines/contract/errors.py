"""Errors that are the user's to mend: one line that says what arrived, what would have worked, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what was asked for. The command line prints its message alone and exits with code 2."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> InputError:
    """An `InputError` for a name that does not exist, with the nearest existing one.

    Args:
        kind: what the name should have been, e.g. "method".
        name: what arrived.
        choices: all names that exist.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return InputError(f"unknown {kind} '{name}': {hint}available: {', '.join(known) if known else 'none'}")


def one_line(error: BaseException | str, *, kind: bool = False, longest: int = 300) -> str:
    """An error's message on one line; where it has none, its class's name.

    Args:
        error: any exception (libraries' messages often have several lines), or a recorded message.
        kind: put the class's name before the message of an error that is not an `InputError`.
        longest: characters after which it is cut off; the messages of an `InputError` never are.
    """
    text, name = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, InputError):
        return text or name
    if not text or not kind:
        return (text or name)[:longest]
    return f"{name}: {text}"[:longest]
