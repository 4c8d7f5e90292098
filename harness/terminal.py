"""What people see where their terminal can't show every character."""

from __future__ import annotations

import codecs
import io
import os
import sys

from visionselector_eval.baselines.contract.errors import InputError

_HANDLER = "visionselector_eval.ascii"
_LOOK_ALIKES = {
    "\N{ALMOST EQUAL TO}": "~",
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MIDDLE DOT}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}


def show_what_can_be_shown() -> None:
    r"""From here on a character that stdout or stderr has no code for is shown in ASCII and ends nothing.

    The signs of our tables get look-alikes, anything else (a letter of an answer, say) its escape, `\xfc`. Files are
    UTF-8 whatever the locale.
    """
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    shown = (_LOOK_ALIKES.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in unknown)
    return "".join(shown), error.end


def free_text(argument: str) -> str:
    """A question or another text of the command line as it was typed: its bytes are UTF-8 whatever the locale.

    Paths stay as Python gives them, which opens the file that was named.

    Raises:
        InputError: bytes that are no UTF-8.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeEncodeError:
        return argument  # not from the command line: text that its encoding has no code for
    except UnicodeDecodeError:
        shown = argument.encode("ascii", "backslashreplace").decode("ascii")
        raise InputError(f"invalid text '{shown}': expected UTF-8") from None
