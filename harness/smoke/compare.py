"""Compares what a smoke run gave with what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visionselector_eval.harness.smoke.expectation import Cell, Expectation

OTHER_TORCH_SHARE = 0.1
"""Answers that may differ by default where another torch made the expectation: other kernels add in another order, and
where two tokens are all but equally likely the other one is then chosen."""


_SHOWN_ANSWERS = 3


_EPSILON = 1e-9


@dataclass(frozen=True)
class Tolerance:
    """How far a run may move.

    Attributes:
        score: in shares of the metric's largest value (0.01: one point of 100).
        kept: in tokens, for the means of kept and of all visual tokens.
        answers: share of all answers that may differ; None: none, or `OTHER_TORCH_SHARE` where another torch made the
            expectation.
    """

    score: float = 0.0
    kept: float = 0.0
    answers: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished smoke run.

    Attributes:
        observed: what came, in the form of the expectation.
        failed: reasons of failed cells, by title.
        tasks, seconds: of every cell, by title.
        wall_seconds: of the whole run.
    """

    observed: Expectation
    failed: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What moved.

    Attributes:
        moved: lines that say what was expected and what came, by the cell's title; cells as expected are not in it.
        remarks: what else is not as it was when the expectation was made; no difference by itself.
        answers: number of answers compared.
        differing: how many differ.
        allowed: the share that may.
    """

    moved: Mapping[str, list[str]]
    remarks: list[str]
    answers: int
    differing: int
    allowed: float


def compare(expected: Expectation, outcome: Outcome, tolerance: Tolerance) -> Comparison:
    """Hold a run against an expectation with the same settings."""
    observed = outcome.observed
    required, came = ({cell.title: cell for cell in e.cells} for e in (expected, observed))
    remarks = [
        f"{name}: {old} when the expectation was made, {new} now"
        for name, old, new in _changed(expected.made_with, observed.made_with)
    ]
    remarks += [f"{name} changed" for name, _, _ in _changed(expected.inputs, observed.inputs)]
    same_torch = _release(expected.made_with.get("torch")) == _release(observed.made_with.get("torch"))
    allowed = tolerance.answers
    if allowed is None:
        allowed = 0.0 if same_torch else OTHER_TORCH_SHARE
    other = {
        title: [key for key, text in cell.answers.items() if came[title].answers.get(key) != text]
        for title, cell in required.items()
        if title in came
    }
    total = sum(len(required[title].answers) for title in other)
    differing = sum(map(len, other.values()))
    beyond = differing > allowed * total + _EPSILON
    moved: dict[str, list[str]] = {title: [f"failed: {reason}"] for title, reason in outcome.failed.items()}
    for title in [*required, *(title for title in came if title not in required)]:
        if title in moved:
            continue
        if title not in came or title not in required:
            moved[title] = ["expected, but it was not run" if title in required else "it is not in the expectation"]
            continue
        lines = _moved_numbers(required[title], came[title], tolerance)
        if set(came[title].answers) - set(required[title].answers):
            lines.append("documents: more than expected")
        if beyond and other[title]:
            lines += _moved_answers(required[title], came[title], other[title])
        if lines:
            moved[title] = lines
    return Comparison(moved, remarks, total, differing, allowed)


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = sorted({*old, *new})
    return [(n, old.get(n, "-"), new.get(n, "-")) for n in names if old.get(n) != new.get(n)]


def _release(version: str | None) -> str:
    # what follows the plus says how torch was built (cpu, cu128), not which kernels a CPU runs
    return (version or "").partition("+")[0]


def _moved_numbers(wanted: Cell, came: Cell, tolerance: Tolerance) -> list[str]:
    lines = []
    if wanted.metric != came.metric:
        lines.append(f"metric: expected {wanted.metric}, got {came.metric}")
    bounds = {"score": tolerance.score * (wanted.scale or 1.0), "kept_tokens": tolerance.kept}
    for name in ("score", "kept_tokens", "total_tokens"):
        old, new, bound = getattr(wanted, name), getattr(came, name), bounds.get(name, tolerance.kept)
        if old is None or new is None:
            same = old is new
        else:
            same = abs(new - old) <= bound + _EPSILON * max(1.0, abs(old))
        if not same:
            within = f" (allowed: {bound:g} more or less)" if bound else ""
            lines.append(f"{name}: expected {_text(old)}, got {_text(new)}{within}")
    return lines


def _text(value: float | None) -> str:
    return "no number" if value is None else f"{value:.6g}"


def _moved_answers(wanted: Cell, came: Cell, keys: Sequence[str]) -> list[str]:
    lines = [f"answers: {len(keys)} of {len(wanted.answers)} differ"]
    for key in keys[:_SHOWN_ANSWERS]:
        got = repr(came.answers[key]) if key in came.answers else "no such document"
        lines.append(f"  {key}: expected {wanted.answers[key]!r}, got {got}")
    if len(keys) > _SHOWN_ANSWERS:
        lines.append(f"  and {len(keys) - _SHOWN_ANSWERS} more")
    return lines
