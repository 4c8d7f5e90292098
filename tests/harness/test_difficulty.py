"""The difficulty split: groups, intervals and what is left out, on frames worked out by hand and on a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeps import sweep

from visionselector_eval.baselines import InputError
from visionselector_eval.harness import cli
from visionselector_eval.harness.report.difficulty import (
    COLUMNS,
    MINIMUM,
    difficulty,
    proportion,
    to_csv,
    to_markdown,
    to_terminal,
)
from visionselector_eval.harness.store.run import load_run
from visionselector_eval.harness.sweep import worker
from visionselector_eval.harness.sweep.worker import Answered

# 20 documents: full is right on 0..15, downsample on 0..3 and 16. A = 4..15, B = 0..3. The method is right on 6 of A,
# 2 of B, and 17.
FULL = [1.0] * 16 + [0.0] * 4
LOW = [1.0] * 4 + [0.0] * 12 + [1.0] + [0.0] * 3
GOOD = [1.0] * 2 + [0.0] * 2 + [1.0] * 6 + [0.0] * 7 + [1.0] + [0.0] * 2


class Table:
    """Collects cells and samples as `load_run` gives them."""

    def __init__(self) -> None:
        self.cells: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []

    def add(
        self,
        method: str,
        scores: list[Any],
        budget: str = "0.2",
        task: str = "chartqa",
        clusters: list[str] | None = None,
        first: int = 0,
        **changes: Any,
    ) -> Table:
        cell = {
            "backbone": "tiny",
            "method": method,
            "label": method,
            "options": "{}",
            "budget": "1" if method == "full" else budget,
            "task": task,
            "seed": 0,
            "metric": "accuracy",
            "score": 0.25,
            "scale": 1.0,
            "mean_of_documents": True,
            "n_documents": len(scores),
            "kept_tokens": float(budget[:-3]) if budget.endswith("tok") else 100 * float(budget),
            "total_tokens": 100.0,
            "status": "done",
        } | changes
        cell["digest"] = f"cell {len(self.cells)}"
        self.cells.append(cell)
        for number, score in enumerate(scores):
            row = {"cell": cell["digest"], "doc_id": first + number, "score": score}
            self.samples.append(row | ({"cluster": clusters[number]} if clusters else {}))
        return self

    def split(self, order: int | None = None) -> pd.DataFrame:
        cells, samples = pd.DataFrame(self.cells), pd.DataFrame(self.samples)
        if order is not None:
            cells = cells.sample(frac=1, random_state=order)
            samples = samples.sample(frac=1, random_state=order)
        return difficulty(cells, samples)

    def row(self) -> pd.Series:
        table = self.split()
        assert len(table) == 1
        return table.iloc[0]


def plain(**changes: Any) -> Table:
    return Table().add("full", FULL, **changes).add("downsample", LOW, **changes).add("good", GOOD, **changes)


# groups --------------------------------------------------------------------------------------------------------------


def test_groups_and_intervals_worked_out_by_hand() -> None:
    row = plain().row()
    assert (row.n_documents, row.n_a, row.n_b) == (20, 12, 4)
    assert (row.accuracy_a, row.accuracy_b, row.share_right) == (0.5, 0.5, 9 / 20)
    assert (row.low_a, row.high_a) == pytest.approx((0.2538, 0.7462), abs=1e-4), "Wilson, 6 of 12"
    assert (row.low_b, row.high_b) == pytest.approx((0.1500, 0.8500), abs=1e-4), "Wilson, 2 of 4"
    assert (row.enough_a, row.enough_b) == (True, False)
    assert (row.control, row.control_budget, row.same_budget, row.note) == ("downsample", "0.2", True, "")
    assert (row.score, row.kept_tokens, row.control_kept_tokens) == (0.25, 20, 20)


def test_the_split_does_not_depend_on_the_order_of_rows() -> None:
    table = plain().add("good", GOOD[::-1], "0.1").add("downsample", LOW, "0.1").add("bad", LOW)
    first = table.split()
    assert list(first.columns) == list(COLUMNS)
    assert list(zip(first.label, first.budget, strict=True)) == [("bad", "0.2"), ("good", "0.2"), ("good", "0.1")]
    for order in range(3):
        again = table.split(order)
        assert (to_csv(again), to_markdown(again)) == (to_csv(first), to_markdown(first))


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({"scale": 100.0}, 100.0),
        ({"scale": 2000.0, "mean_of_documents": False}, 1.0),  # MME notes 0 and 1
        ({"scale": 100.0, "mean_of_documents": False}, 100.0),  # MVBench with an empty answer
        ({"scale": math.nan}, 1.0),  # a task without an entry
    ],
)
def test_right_is_half_of_what_a_document_can_score(changes: dict[str, Any], unit: float) -> None:
    graded = [0.5, 0.49, 0.6, 0.3, 1.0, 0.0]
    table = Table().add("full", [unit] * 6, **changes).add("downsample", [0.0] * 6, **changes)
    row = table.add("good", [unit * score for score in graded], **changes).row()
    assert (row.n_a, row.accuracy_a, row.n_b) == (6, 0.5, 0)


def test_several_seeds_are_held_against_the_one_run_of_the_controls() -> None:
    table = plain()
    for seed in (1, 2):
        table.add("random", LOW if seed == 1 else FULL, seed=seed, options=json.dumps({"seed": seed}))
    found = table.split()
    assert found[found.label == "random"][["seed", "accuracy_a"]].to_numpy().tolist() == [[1, 0.0], [2, 1.0]]
    assert "random (seed 2)" in to_terminal(found)


def test_sampled_answers_are_held_against_those_of_their_own_seed() -> None:
    table = plain().add("full", [1.0] * 20, seed=1).add("downsample", [0.0] * 20, seed=1).add("good", GOOD, seed=1)
    assert table.split()[["seed", "n_a", "n_b"]].to_numpy().tolist() == [[0, 12, 4], [1, 20, 0]]


# budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controls", "chosen"),
    [
        (["0.3", "0.2"], "0.2"),
        (["0.5", "0.3"], "0.3"),
        (["0.1", "0.3"], "0.1"),  # equally near: the smaller
        (["0.5", "19tok"], "19tok"),
    ],
)
def test_the_nearest_downsample_budget_is_taken_and_said(controls: list[str], chosen: str) -> None:
    table = Table().add("full", FULL).add("good", GOOD)
    for budget in controls:
        table.add("downsample", LOW if budget == chosen else GOOD, budget)
    row = table.row()
    assert (row.control_budget, row.same_budget, row.n_a) == (chosen, chosen == "0.2", 12)
    assert ("(nearest)" in to_terminal(table.split())) == (chosen != "0.2")


def test_a_count_without_measured_tokens_has_no_nearest_budget() -> None:
    table = Table().add("full", FULL).add("downsample", LOW).add("good", GOOD, "64tok", total_tokens=math.nan)
    assert table.row().note == "no finished downsample cell with the same settings"


# left out ------------------------------------------------------------------------------------------------------------


def test_no_downsample_is_one_line() -> None:
    with pytest.raises(InputError, match=r"`downsample`.*--methods") as caught:
        Table().add("full", FULL).add("good", GOOD).split()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="`full`"):
        Table().add("downsample", LOW).add("good", GOOD).split()
    with pytest.raises(InputError, match="`downsample`"):
        Table().add("full", FULL).add("good", GOOD).add("downsample", [], status="failed").split()
    with pytest.raises(InputError, match="no finished cell besides"):
        Table().add("full", FULL).add("downsample", LOW).split()


def test_an_empty_group_has_no_accuracy() -> None:
    table = Table().add("full", FULL).add("downsample", FULL).add("good", GOOD)
    row = table.row()
    assert (row.n_a, row.n_b, row.enough_a, row.enough_b) == (0, 16, False, True)
    assert math.isnan(row.accuracy_a)
    assert math.isnan(row.low_a)
    assert "too few" in to_terminal(table.split())
    assert f"fewer than {MINIMUM} documents" in to_terminal(table.split())


def test_a_task_without_document_scores_is_named() -> None:
    table = plain()
    for method in ("full", "downsample", "good"):
        table.add(method, [None] * 20, task="corpus")
    found = table.split()
    assert list(found.task) == ["chartqa", "corpus"]
    assert found.n_a.tolist()[0] == 12
    assert math.isnan(found.n_a.tolist()[1])
    for text in (to_terminal(found), to_markdown(found)):
        assert "left out: tiny, corpus: its documents have no scores of their own" in text


def test_documents_without_a_score_do_not_count() -> None:
    table = Table().add("full", [*FULL, None, None]).add("downsample", [*LOW, None, None])
    row = table.add("good", [*GOOD, None, None]).row()
    assert (row.n_unscored, row.n_a, row.share_right) == (2, 12, 9 / 20)
    assert "chartqa: 2 documents have no score" in to_markdown(table.split())


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"context": "other"}, "same settings"),
        ({"metric": "f1"}, "same settings"),
        ({"first": 1}, "did not answer the same documents"),
        ({"higher_is_better": False}, "lower is better"),
        ({"task": "ocrbench"}, "no finished full cell"),
    ],
)
def test_what_can_not_be_compared_is_left_out_and_named(changes: dict[str, Any], note: str) -> None:
    table = (
        Table().add("full", FULL, context="mine").add("downsample", LOW, context="mine").add("good", GOOD, **changes)
    )
    found = table.split()
    assert note in found.iloc[0].note
    assert note in to_markdown(found)
    assert "no task of this run can be split" in to_terminal(found)


def test_scores_whose_largest_is_not_known_are_left_out() -> None:
    table = Table()
    for method in ("full", "downsample", "good"):
        table.add(method, [55.0, 3.0], scale=math.nan)
    assert "not known" in table.row().note


# intervals -----------------------------------------------------------------------------------------------------------


def test_clusters_are_worth_fewer_documents() -> None:
    # Three images of four questions with 4, 2 and 0 right: se^2 = 3/2 * 8 / 144, worth .25 / se^2 = 3 documents;
    # t(2, .975) = 4.3027.
    right = [True] * 4 + [True, True, False, False] + [False] * 4
    clusters = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    found = proportion(right, clusters)
    assert found == pytest.approx((0.5, 0.0362, 0.9638), abs=1e-4)
    assert proportion(right, list(range(12))) == proportion(right)
    assert proportion([True] * 4, ["a"] * 4) == (1.0, 0.0, 1.0)
    assert proportion([True] * 8, ["a"] * 4 + ["b"] * 4).low < proportion([True] * 8).low
    assert all(map(math.isnan, proportion([])))


def test_clusters_of_the_run_are_used() -> None:
    clusters = [f"image {number // 4}" for number in range(20)]
    clustered, alone = plain(clusters=clusters).row(), plain().row()
    assert clustered.accuracy_a == alone.accuracy_a
    assert clustered.high_a - clustered.low_a > alone.high_a - alone.low_a


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
def test_an_interval_holds_its_share(documents: list[tuple[bool, int]]) -> None:
    right, clusters = [r for r, _ in documents], [c for _, c in documents]
    for found in (proportion(right), proportion(right, clusters)):
        assert 0 <= found.low <= found.share <= found.high <= 1
        assert found.low < found.high


# runs ----------------------------------------------------------------------------------------------------------------


def scripted(task: str, documents: int):
    """An `answer` that gives full right answers, downsample those to every third document, divprune to every other."""
    bound = worker.bound_task(task, "qwen2_5_vl", documents)
    rows = [bound.tasks[task].eval_docs_no_media[number] for number in range(documents)]

    def answer(unit):
        for work in unit.cells:
            step = {"full": 1, "downsample": 3, "divprune": 2}[work.method]
            answers = []
            for number, row in enumerate(rows):
                text = row["answer"] if number % step == 0 else "?"
                names = ("kept_tokens", "total_tokens", "layer_tokens", "prompt_tokens", "new_tokens")
                counts = dict.fromkeys(names, 1)
                answers.append({"task": task, "doc_id": number, "answer": text, "skipped": "", **counts})
            yield Answered(work.digest, 0, answers)

    return answer


def test_report_prints_and_writes_the_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores by upstream's own code: 36 documents, A = those not divisible by 3, B = those that are."""
    sweep(tmp_path, tasks=["tiny_pope"], limit=36, answer=scripted("tiny_pope", 36))
    row = difficulty(*load_run(tmp_path)).iloc[0]
    assert (row.n_a, row.accuracy_a, row.n_b, row.accuracy_b) == (24, 0.5, 12, 0.5)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert not (tmp_path / "difficulty.md").exists()
    assert "on A" not in capsys.readouterr().out
    written = []
    for _ in range(2):
        assert cli.main(["report", str(tmp_path), "--difficulty"]) == 0
        shown = capsys.readouterr().out
        assert "mean rel. %" in shown
        assert "0.500 [" in shown
        written.append([(tmp_path / name).read_bytes() for name in ("difficulty.md", "difficulty.csv")])
    assert written[0] == written[1]
    table = pd.read_csv(tmp_path / "difficulty.csv")
    assert list(table.columns) == list(COLUMNS)
    assert table.n_a.tolist() == [24]
    assert b"tiny_pope" in written[0][0]


def test_report_of_a_run_without_downsample_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, tasks=["tiny_pope"], methods=["divprune"], limit=2)
    capsys.readouterr()  # transformers' bar, where this test is the first of its process to load the backbone
    assert cli.main(["report", str(tmp_path), "--difficulty"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "downsample among --methods" in said.err


def test_the_embedded_checkpoint_has_a_split(tmp_path: Path) -> None:
    sweep(tmp_path)
    found = difficulty(*load_run(tmp_path))
    assert list(found.task) == ["tiny_chartqa", "tiny_pope"]
    assert (found.note == "").all()
    assert (found.n_a + found.n_b <= found.n_documents).all()
