"""`check` says nothing about methods that keep their promises, and names the promise that another breaks."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from visionselector_eval.baselines import Compressor, InputError, Selection, build
from visionselector_eval.harness import cli
from visionselector_eval.models.checks import PROPERTIES, check


@pytest.mark.parametrize("name", ["visionselector", "visionzip", "fastv", "downsample", "full", "divprune+dart"])
def test_methods_that_keep_their_promises(name, tiny):
    assert check(build(name), tiny) == []
    assert check(build(name, upstream_exact=True), tiny) == []


@dataclass(frozen=True, kw_only=True)
class First(Compressor):
    """Keeps the first tokens; the others break one promise each."""

    name = "first"

    def compress(self, tokens: Any, count: int) -> Selection:
        return Selection(kept=torch.arange(count))


class Stateful(First):
    calls: ClassVar[Any] = itertools.count()

    def compress(self, tokens, count):
        shift = min(next(self.calls) % 7, len(tokens.features) - count)
        return Selection(kept=torch.arange(count) + shift)


class Greedy(First):
    def compress(self, tokens, count):
        return Selection(kept=torch.arange(min(count + 1, len(tokens.features))))


class Divides(First):
    def compress(self, tokens, count):
        rows = tokens.features[:count]
        return Selection(kept=torch.arange(count), features=rows / rows.norm(dim=1, keepdim=True))


class Single(First):
    def compress(self, tokens, count):
        return Selection(kept=torch.arange(count), features=tokens.features[:count].float().log())


class Breaks(First):
    def compress(self, tokens, count):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("method", "promise"),
    [
        (Stateful(), "the same prompt gives the same tokens"),
        (Greedy(), "exactly K tokens are left"),
        (Divides(), "few, equal and empty tokens are survived"),
        (Single(), "exactly K tokens are left"),
        (Breaks(), "bfloat16 runs"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_promise_is_named(method, promise, tiny):
    found = {problem.promise: str(problem) for problem in check(method, tiny)}
    assert promise in found
    assert set(found) < set(PROPERTIES)
    assert all("\n" not in text for text in found.values())
    assert check(First(), tiny) == []


def test_the_command(monkeypatch, capsys):
    assert cli.main(["check", "uniform"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1) for line in lines] == [["ok", promise] for promise in PROPERTIES]
    monkeypatch.setattr("visionselector_eval.baselines.build", lambda name, **options: Greedy())
    assert cli.main(["check", "uniform"]) == 3
    shown = capsys.readouterr().out
    assert re.search(r"^broken +exactly K tokens are left\n +any: method .first. returned .*\n", shown, re.M)
    assert cli.main(["check", "nothing"]) == 2
    assert cli.main(["check", "divprune", "--scorer", "x"]) == 2


def test_what_is_no_method_is_refused(tiny):
    with pytest.raises(InputError, match="is not a compressor"):
        check(3, tiny)
