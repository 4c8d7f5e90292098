"""`smoke`: what it stores, what it notices, what it lets pass, and its JUnit report."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sweeps import contents, sweep

from visionselector_eval.baselines import InputError, Selection
from visionselector_eval.baselines.divprune import DivPrune
from visionselector_eval.baselines.downsample import Downsample
from visionselector_eval.baselines.random import Random
from visionselector_eval.harness import cli
from visionselector_eval.harness.cli.arguments import PROGRAM
from visionselector_eval.harness.cli.commands import COMMANDS
from visionselector_eval.harness.cli.smoke import tolerance_of
from visionselector_eval.harness.smoke.compare import Outcome, Tolerance, compare
from visionselector_eval.harness.smoke.expectation import DEFAULTS, EXPECTATION, Expectation, read
from visionselector_eval.harness.smoke.junit import to_junit
from visionselector_eval.harness.smoke.run import spec_of
from visionselector_eval.harness.sweep import worker

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--methods", "downsample", "random", "--tasks", "tiny_chartqa", "tiny_pope", "--limit", "2"]
METHODS = ("downsample @ 0.2", "full @ 1", "random @ 0.2")
TITLES = [f"tiny {method} on {task}" for task in ("tiny_chartqa", "tiny_pope") for method in METHODS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The expectation of a small run."""
    path = tmp_path_factory.mktemp("made") / EXPECTATION
    assert cli.main(["smoke", *SMALL, "--update", "--expect", str(path)]) == 0
    return path.read_text()


@pytest.fixture
def expectation(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the current folder, that a test may change."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / EXPECTATION
    path.write_text(made)
    return path


def smoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["smoke", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def outcome_of(path: Path) -> Outcome:
    """A run that came out as the file says."""
    observed = read(path)
    return Outcome(observed, {}, {cell.title: cell.task for cell in observed.cells})


# in a run ------------------------------------------------------------------------------------------------------------


def test_the_expectation_holds_what_is_compared(made: str) -> None:
    content = Expectation.model_validate_json(made)
    assert [cell.title for cell in content.cells] == TITLES
    for cell in content.cells:
        assert cell.metric
        assert cell.score is not None
        assert cell.kept_tokens is not None
        assert cell.total_tokens is not None
        assert (cell.kept_tokens < 0.21 * cell.total_tokens) == (cell.method != "full")
        assert list(cell.answers) == [f"{cell.task}/0", f"{cell.task}/1"]
    assert content.made_with["torch"].startswith(torch.__version__.split("+")[0])
    assert {"visionselector-eval", "lmms-eval", "transformers", "processor"} <= set(content.made_with)
    assert {"weights of tiny", "documents of tiny_pope", "prompts of tiny_chartqa"} <= set(content.inputs)
    assert (content.settings.limit, content.settings.device, content.settings.dtype) == (2, "cpu", "float32")


def test_the_same_again_is_as_expected(expectation: Path, made: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without flags: what is asked for stands in the expectation. Nothing is left behind but the report."""
    code, out, _ = smoke(capsys, "--junit", "smoke.xml")
    assert (code, out.count("\n")) == (0, 1)
    assert "6 cells, 12 answers" in out
    assert "as expected" in out
    assert sorted(p.name for p in expectation.parent.iterdir()) == [EXPECTATION, "smoke.xml"]
    suite = ET.parse("smoke.xml").getroot().find("testsuite")
    assert suite is not None
    assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "6",
        "failures": "0",
        "errors": "0",
    }
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == TITLES
    assert {case.get("classname") for case in cases} == {"smoke.tiny_chartqa", "smoke.tiny_pope"}
    assert all(len(case) == 0 for case in cases)
    assert smoke(capsys, "--update")[0] == 0
    assert expectation.read_text() == made, "the same run writes the same file"


def test_a_changed_method_is_noticed_and_named(
    expectation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells alone, also in a run folder that holds cells of the unchanged one; --update takes it over."""
    assert smoke(capsys, "--output", "run")[0] == 0
    monkeypatch.setattr(Downsample, "size", lambda self, height, width, count: (1, 1))
    code, out, _ = smoke(capsys, "--junit", "smoke.xml", "--output", "run")
    assert code == 3
    moved = [title for title in TITLES if re.search(rf"^{re.escape(title)}$", out, re.MULTILINE)]
    assert moved == [TITLES[0], TITLES[3]]
    assert re.search(r"^  kept_tokens: expected \d+, got 1$", out, re.MULTILINE)
    assert "2 cells are not as expected" in out
    assert "--update" in out
    cases = ET.parse("smoke.xml").getroot().findall("testsuite/testcase")
    assert [case.get("name") for case in cases if case.find("failure") is not None] == moved
    failure = next(case.find("failure") for case in cases if case.find("failure") is not None)
    assert failure is not None
    assert "kept_tokens: expected" in (failure.text or "")
    assert smoke(capsys, "--answers", "ignore", "--score-tolerance", "1", "--kept-tolerance", "64")[0] == 0
    assert smoke(capsys, "--update")[0] == 0
    assert smoke(capsys)[0] == 0


def test_a_changed_answer_is_shown(
    expectation: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = worker.Answerer.answer

    def other(self: Any, prepared: Any, setting: Any) -> Any:
        answers = given(self, prepared, setting)
        drawn = setting.compressor.name == "random"
        return [replace(answer, text=answer.text + "!") for answer in answers] if drawn else answers

    monkeypatch.setattr(worker.Answerer, "answer", other)
    code, out, _ = smoke(capsys, "--score-tolerance", "1")
    old = read(expectation).cells[2].answers["tiny_chartqa/0"]
    assert code == 3
    assert f"{TITLES[2]}\n  answers: 2 of 2 differ\n    tiny_chartqa/0: expected {old!r}, got {old + '!'!r}" in out
    assert "4 of 12 answers differ (allowed: 0 %)" in out
    assert smoke(capsys, "--score-tolerance", "1", "--answers", "34%")[0] == 0


def test_a_failed_cell_is_an_error_and_nothing_to_store(
    expectation: Path, made: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, tokens: Any, count: int) -> Selection:
        raise InputError("it is broken")

    monkeypatch.setattr(Random, "compress", broken)
    code, out, _ = smoke(capsys, "--junit", "smoke.xml", "--answers", "ignore")
    assert code == 3
    assert "tiny random @ 0.2 on tiny_pope\n  failed: it is broken" in out
    suite = ET.parse("smoke.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors")) == ("0", "2")
    assert len(suite.findall("testcase/error")) == 2
    code, out, _ = smoke(capsys, "--update", "--junit", "smoke.xml")
    assert code == 3
    assert "2 failed" in out
    assert expectation.read_text() == made
    assert len(ET.parse("smoke.xml").getroot().findall("testsuite/testcase/error")) == 2


def test_update_keeps_what_was_asked_for_before(expectation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke(capsys, "--update", "--methods", "uniform", "--tasks", "tiny_mme")[0] == 0
    settings = read(expectation).settings
    assert (settings.tasks, settings.limit) == (["tiny_mme"], 2)
    assert [method["label"] for method in settings.methods] == ["uniform"]


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--expect", "none.json"], "no expectation 'none.json'.*--update"),
        (["--expect", "."], "'.' can't be read"),
        (["--limit", "4"], r"other settings \(limit\): --limit 2; asked for here: --limit 4"),
        (["--methods", "random:seed=1"], r"\(methods\): --methods downsample random; .*random\[seed=1\]"),
        (["--suite", "tiny", "--budgets", "0.1"], r"\(budgets, tasks\)"),
        (["--limit", "3", "--tasks", "tiny_mme"], "groups of 2"),
        (["--methods", "divprun"], "did you mean 'divprune'"),
        (["--answers", "some"], "--answers 'some'"),
        (["--answers", "2"], "--answers '2'"),
        (["--score-tolerance", "-1"], "--score-tolerance -1"),
        (["--kept-tolerance", "nan"], "--kept-tolerance nan"),
        (["--kept-tolerance", "few"], "few"),
        (["--junit", "no/where.xml"], "cannot write 'no/where.xml'"),
        (["--update", "--expect", "no/where.json"], "cannot write 'no/where.json'"),
        (["--junt", "x.xml"], "did you mean --junit"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, expectation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = smoke(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(said, err), err


def test_the_run_folder_of_a_sweep_is_left_alone(expectation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(expectation.parent / "mine", tasks=["tiny_pope"], limit=2)
    before = contents(expectation.parent / "mine")
    code, _, err = smoke(capsys, "--output", "mine")
    assert (code, err.count("\n")) == (2, 1)
    assert "'mine' is the run folder of a sweep" in err
    assert contents(expectation.parent / "mine") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=2),
        lambda content: content["cells"][0].pop("score"),
        lambda content: content.update(settings=None),
    ],
)
def test_another_file_is_no_expectation(
    change: Callable[[dict[str, Any]], Any], expectation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(expectation, change)
    for update in ([], ["--update"]):  # its settings would be lost without a word
        code, _, err = smoke(capsys, *update)
        assert (code, err.count("\n")) == (2, 1)
        assert "is not an expectation" in err
    expectation.write_text("<<<<<<< ours")
    assert smoke(capsys)[0] == 2


# comparing -----------------------------------------------------------------------------------------------------------


def test_numbers_may_move_within_their_tolerance(expectation: Path) -> None:
    outcome = outcome_of(expectation)
    cells = outcome.observed.cells

    def move(content: dict[str, Any]) -> None:
        content["cells"][1].update(score=cells[1].score + 0.5, scale=1.0)
        content["cells"][2].update(score=cells[2].score + 40.0, scale=800.0)
        content["cells"][4].update(kept_tokens=cells[4].kept_tokens + 1)
        content["cells"][5].update(total_tokens=cells[5].total_tokens + 2)

    expected = read(edited(expectation, move))
    exact = compare(expected, outcome, Tolerance()).moved
    names = {1: "score", 2: "score", 4: "kept_tokens", 5: "total_tokens"}
    assert list(exact) == [TITLES[number] for number in names]
    for number, name in names.items():
        old, new = (getattr(content.cells[number], name) for content in (expected, outcome.observed))
        assert exact[TITLES[number]] == [f"{name}: expected {old:g}, got {new:g}"]
    assert list(compare(expected, outcome, Tolerance(score=0.05, kept=1)).moved) == [TITLES[1], TITLES[5]]
    assert compare(expected, outcome, Tolerance(score=0.5, kept=2)).moved == {}


def test_a_share_of_all_answers_may_differ(expectation: Path) -> None:
    outcome = outcome_of(expectation)
    expected = read(edited(expectation, lambda c: c["cells"][1]["answers"].update({"tiny_chartqa/1": "other"})))
    found = compare(expected, outcome, Tolerance())
    assert (found.answers, found.differing, found.allowed) == (12, 1, 0)
    assert list(found.moved) == [TITLES[1]]
    assert found.moved[TITLES[1]][0] == "answers: 1 of 2 differ"
    assert compare(expected, outcome, Tolerance(answers=1 / 12)).moved == {}
    assert compare(expected, outcome, Tolerance(answers=0.08)).moved


def test_another_torch_may_answer_a_little_differently(expectation: Path) -> None:
    outcome = outcome_of(expectation)

    def older(content: dict[str, Any]) -> None:
        content["made_with"]["torch"] = "1.13.1"
        content["inputs"]["prompts of tiny_pope"] = "other"
        content["cells"][1]["answers"]["tiny_chartqa/1"] = "other"

    expected = read(edited(expectation, older))
    found = compare(expected, outcome, Tolerance())
    assert (found.allowed, found.moved) == (0.1, {})
    assert any(line.startswith("torch: 1.13.1 when") for line in found.remarks)
    assert "prompts of tiny_pope changed" in found.remarks
    assert list(compare(expected, outcome, tolerance_of(0, 0, "exact")).moved) == [TITLES[1]]
    same = edited(expectation, lambda c: c["made_with"].update(torch=torch.__version__.split("+")[0] + "+else"))
    assert compare(read(same), outcome, Tolerance()).allowed == 0, "how torch was built does not count"


def test_cells_and_documents_that_are_not_on_both_sides(expectation: Path) -> None:
    outcome, expected = outcome_of(expectation), read(expectation)
    short = expected.model_copy(update={"cells": expected.cells[1:]})
    assert compare(short, outcome, Tolerance()).moved == {TITLES[0]: ["it is not in the expectation"]}
    less = replace(outcome, observed=short, tasks={cell.title: cell.task for cell in short.cells})
    gone = compare(expected, less, Tolerance())
    assert gone.moved == {TITLES[0]: ["expected, but it was not run"]}
    assert to_junit(less, gone).count("<testcase") == 6
    fewer = read(edited(expectation, lambda c: c["cells"][0]["answers"].pop("tiny_chartqa/1")))
    assert compare(fewer, outcome, Tolerance()).moved == {TITLES[0]: ["documents: more than expected"]}
    more = read(edited(expectation, lambda c: c["cells"][0]["answers"].update({"x/7": "", "tiny_chartqa/1": "?"})))
    assert any(
        "x/7: expected '', got no such document" in line
        for line in compare(more, outcome, Tolerance()).moved[TITLES[0]]
    )


def test_any_answer_can_stand_in_the_report(expectation: Path) -> None:
    """Control characters, which XML can't hold; brackets, which it must escape."""
    outcome = outcome_of(expectation)
    odd = "\x00\x1b<b>&\ufffe]]>\U0001f600"
    expected = read(edited(expectation, lambda c: c["cells"][0]["answers"].update({"tiny_chartqa/0": odd})))
    failing = replace(outcome, failed={TITLES[5]: "no \x07 such < thing"})
    report = ET.fromstring(to_junit(failing, compare(expected, failing, Tolerance())))
    failure = report.find("testsuite/testcase/failure")
    assert failure is not None
    assert "<b>&" in (failure.text or "")
    error = report.find("testsuite/testcase/error")
    assert error is not None
    assert error.get("message") == "failed: no \ufffd such < thing"


# settings ------------------------------------------------------------------------------------------------------------


def test_the_default_is_every_built_in_method_on_every_mirror() -> None:
    from visionselector_eval.baselines.contract.registry import BUILTIN
    from visionselector_eval.tasks.suites import load_suites

    spec, settings = spec_of({})
    assert {method.name for method in spec.methods} | {"full"} == set(BUILTIN)
    assert settings.tasks == load_suites().suites[DEFAULTS["suite"]]
    assert all(load_suites().tasks[task].mirror_of for task in settings.tasks), "no data are downloaded"
    assert settings.limit == 4


def test_the_order_of_lists_and_full_do_not_matter() -> None:
    one = spec_of({"methods": ["divprune", "random"], "budgets": ["0.2", "20tok"], "tasks": ["tiny_pope", "tiny_mme"]})[
        1
    ]
    same = {"methods": ["random", "full", "divprune"], "budgets": ["20tok", "20%"], "tasks": ["tiny_mme", "tiny_pope"]}
    assert one.differing(spec_of(same)[1]) == []
    labelled = [{"name": "random", "label": "mine", "options": {"seed": seed}} for seed in (1, 2)]
    one, two = (spec_of({"methods": [method]})[1] for method in labelled)
    assert one.differing(two) == ["methods"]
    assert one.shown("methods") != two.shown("methods")


def test_the_workflow_of_the_documentation_is_one() -> None:
    """It is YAML, and every command of ours in it is one that the program takes."""
    text = (ROOT / "docs" / "ci.md").read_text()
    flows = [
        yaml.safe_load(block) for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    assert flows
    commands = []
    for flow in flows:
        assert {"name", "jobs"} <= set(flow)
        for job in flow["jobs"].values():
            steps = job["steps"]
            assert {"actions/checkout", "actions/setup-python"} <= {
                s["uses"].split("@")[0] for s in steps if "uses" in s
            }
            lines = [line for step in steps for line in step.get("run", "").splitlines()]
            commands += [line for line in lines if line.startswith(PROGRAM)]
    assert commands
    for command in commands:
        _, name, *flags = shlex.split(command)
        COMMANDS[name].parser().parse_all(flags)


def test_the_methods_are_really_those_that_are_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where tokens are chosen: two images, one task."""
    calls = []
    compress = DivPrune.compress
    monkeypatch.setattr(
        DivPrune, "compress", lambda self, tokens, count: calls.append(count) or compress(self, tokens, count)
    )
    monkeypatch.chdir(tmp_path)
    assert smoke(capsys, "--update", "--methods", "divprune", "--tasks", "tiny_pope", "--limit", "2")[0] == 0
    cell = read(tmp_path / EXPECTATION).cells[0]
    assert (cell.method, len(calls), sum(calls) / 2) == ("divprune", 2, cell.kept_tokens)
