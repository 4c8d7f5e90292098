"""Budgets, names, options and third-party compressors: what is accepted, and what every mistake is told."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass, fields
from types import ModuleType

import pytest
import torch

from visionselector_eval.baselines import (
    Compressor,
    InputError,
    ScoreCompressor,
    Selection,
    Share,
    Tokens,
    VisualTokens,
    available,
    build,
    parse_budget,
    top_k,
)
from visionselector_eval.baselines.contract import registry
from visionselector_eval.baselines.contract.base import checked_compressor

TOKENS = VisualTokens(features=torch.eye(8), grid=(1, 2, 4), key="a")


@pytest.fixture(autouse=True)
def _fresh_registry():
    registry.compressor_class.cache_clear()
    yield
    registry.compressor_class.cache_clear()


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.2, Share(0.2)),
        ("0.2", Share(0.2)),
        ("20%", Share(0.2)),
        (" 12.5% ", Share(0.125)),
        (1, Share(1.0)),
        ("1", Share(1.0)),
        ("100%", Share(1.0)),
        (1e-6, Share(1e-6)),
        ("64tok", Tokens(64)),
        ("64 TOK", Tokens(64)),
        ("1tok", Tokens(1)),
        (Tokens(7), Tokens(7)),
        (Share(0.3), Share(0.3)),
    ],
)
def test_budget_is_read(value, expected):
    assert parse_budget(value) == expected
    assert parse_budget(str(expected)) == expected


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1.5,
        2,
        float("nan"),
        float("inf"),
        "abc",
        "",
        True,
        False,
        None,
        "0tok",
        "-3tok",
        "1.5tok",
        "tok",
        "200%",
        "0%",
        "%",
        "nan",
        "nan%",
        [0.2],
    ],
)
def test_bad_budget_is_one_line(value):
    with pytest.raises(InputError) as error:
        parse_budget(value)
    assert "64tok" in one_line(error)
    assert "20%" in one_line(error)


@pytest.mark.parametrize("make", [lambda: Share(0.0), lambda: Share(1.01), lambda: Share(True), lambda: Tokens(0)])
def test_budget_objects_check_themselves(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize(
    ("ratio", "n", "kept"),
    [(0.29, 100, 29), (0.01, 5, 1), (0.1, 2048, 204), (0.2, 16, 3), (0.3, 10, 3), (0.07, 100, 7), (1.0, 17, 17)],
)
def test_share_counts_by_floor_with_slack(ratio, n, kept):
    assert Share(ratio).count(n) == kept


def test_absolute_budget_never_exceeds_what_there_is():
    assert [Tokens(64).count(n) for n in (1, 63, 64, 65)] == [1, 63, 64, 64]


def test_every_builtin_builds_and_describes_its_options():
    for name in available():
        compressor = build(name)
        assert compressor.name == name
        assert compressor.summary.endswith(".")
        assert hash(compressor) == hash(build(name))
        for option in fields(compressor):
            assert option.metadata.get("help"), f"{name}.{option.name} has no help"


@pytest.mark.parametrize(
    ("asked", "meant"), [("divprun", "divprune"), ("vision_zip", "visionzip"), ("visonselector", "visionselector")]
)
def test_unknown_method_names_the_near_match(asked, meant):
    with pytest.raises(InputError, match=f"did you mean '{meant}'") as error:
        build(asked)
    assert "available: " in one_line(error)


def test_unknown_option_names_the_near_match():
    with pytest.raises(InputError, match="did you mean 'contextual'") as error:
        build("visionzip", contextal=0.1)
    one_line(error)
    with pytest.raises(InputError, match="unknown option of method divprune 'seed'"):
        build("divprune", seed=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random", {"seed": "1"}),
        ("random", {"seed": 1.0}),
        ("random", {"seed": True}),
        ("divprune", {"upstream_exact": 1}),
        ("divprune", {"upstream_exact": "yes"}),
        ("visionzip", {"contextual": "0.1"}),
        ("visionzip", {"contextual": -0.1}),
        ("visionzip", {"contextual": 1.0}),
        ("visionzip", {"contextual": float("nan")}),
        ("visionselector", {"scorer": 7}),
        ("idpruner", {"scorer": 7}),
        ("idpruner", {"balance": 1.5}),
        ("vispruner", {"important": -0.1}),
        ("prumerge_plus", {"neighbours": -1}),
        ("holov", {"crops": -1}),
        ("id_selection", {"gamma": -1.0}),
        ("tome", {"metric": "values"}),
        ("fusion2x2", {"weights": "max"}),
        ("visionselector", {"scorer": ""}),
    ],
)
def test_unusable_option_is_one_line(name, options):
    with pytest.raises(InputError) as error:
        build(name, **options)
    assert next(iter(options)) in one_line(error)


def test_visionzip_says_what_its_trace_lacks():
    with pytest.raises(InputError, match="needs the encoder's cls/received and keys") as error:
        build("visionzip").compress(TOKENS, 3)
    one_line(error)


@dataclass(frozen=True, kw_only=True)
class Shortest(Compressor):
    """Keeps the tokens with the smallest norm."""

    name = "shortest"

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        return Selection(kept=top_k(-tokens.features.norm(dim=-1), count))


class Lookalike:
    """Has a compressor's methods and not its base class."""

    name = "lookalike"

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        return Selection(kept=torch.arange(count))


@dataclass(frozen=True, kw_only=True)
class Tallest(ScoreCompressor):
    """Keeps the tokens with the largest maximum."""

    name = "tallest"
    power: float = 1.0

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.amax(dim=-1) ** self.power


def test_a_subclass_has_the_defaults_of_the_contract():
    shortest = Shortest()
    assert (shortest.name, shortest.stage, shortest.needs) == ("shortest", "projector", frozenset())
    assert shortest.summary == "Keeps the tokens with the smallest norm."
    assert shortest.count(10, Share(0.5)) == 5
    assert checked_compressor(shortest) is shortest


@pytest.mark.parametrize("value", ["divprune", None, 3, object(), Shortest, Tallest, Lookalike()])
def test_what_is_no_compressor_is_refused(value):
    with pytest.raises(
        InputError, match=r"expected what build\('NAME'\) returns, or an instance of a subclass"
    ) as error:
        checked_compressor(value)
    one_line(error)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed third-party package, as importlib.metadata finds it: a module and its dist-info."""
    module = ModuleType("third_party_compressors")
    for kind in (Shortest, Tallest, Lookalike):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\n"
        "shortest = third_party_compressors:Shortest\n"
        "tallest = third_party_compressors:Tallest\n"
        "lookalike = third_party_compressors:Lookalike\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("plugin")
def test_third_party_package_appears_without_an_edit_here():
    assert {"shortest", "tallest"} <= set(available())
    assert available() == sorted(available())
    assert build("shortest").compress(TOKENS, 2).kept.tolist() == [0, 1]
    assert build("tallest", power=2).power == 2.0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="did you mean 'power'"):
        build("tallest", powr=2.0)
    with pytest.raises(InputError, match="did you mean 'shortest'"):
        build("shortes")
    with pytest.raises(InputError, match=r"Lookalike object .* is not a compressor") as error:
        build("lookalike")
    one_line(error)


def test_third_party_entry_that_is_broken_or_takes_a_builtin_name(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("broken", "no_such_module_here:Thing", registry.ENTRY_POINT_GROUP),
        importlib.metadata.EntryPoint("divprune", "no_such_module_here:Thing", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert "broken" in available()  # listing imports nothing
    with pytest.raises(InputError, match="no_such_module_here") as error:
        build("broken")
    one_line(error)
    assert type(build("divprune")).__module__ == "visionselector_eval.baselines.divprune"
