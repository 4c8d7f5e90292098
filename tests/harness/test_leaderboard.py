"""Leaderboards: what is compared with what, what is marked, and that the same run gives the same bytes."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from visionselector_eval.baselines import InputError
from visionselector_eval.harness.report import stats
from visionselector_eval.harness.report.leaderboard import build_leaderboard, write
from visionselector_eval.harness.report.pairwise import MEAN, _cell, against
from visionselector_eval.harness.report.render import csv, html, latex, main_table, markdown, terminal
from visionselector_eval.harness.report.rows import Leaderboard
from visionselector_eval.harness.store.files import digest_of
from visionselector_eval.harness.store.record import CellRecord
from visionselector_eval.harness.store.run import Run

RIGHT = [1.0] * 15 + [0.0] * 5


class Table:
    """Collects cells and samples."""

    def __init__(self) -> None:
        self.cells: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []

    def add(
        self,
        method: str,
        budget: str,
        task: str,
        scores: list[float],
        *,
        clusters: list[str] | None = None,
        doc_ids: list[int] | None = None,
        **changes: Any,
    ) -> Table:
        scale = changes.get("scale", 1.0) or 1.0
        cell = {
            "backbone": "tiny",
            "method": method,
            "label": method,
            "options": '{"upstream_exact":false}',
            "budget": budget,
            "task": task,
            "seed": 0,
            "metric": "accuracy",
            "scale": 1.0,
            "score": scale * sum(scores) / len(scores) if scores else None,
            "n_documents": len(scores),
            "kept_tokens": 100 * float(budget) if "tok" not in budget else float(budget[:-3]),
            "total_tokens": 100.0,
            "status": "done",
            "error": None,
            "finished_at": "2026-01-02T03:04:05Z",
        } | changes
        cell["digest"] = digest_of({name: value for name, value in cell.items() if name != "error"})
        self.cells.append(cell)
        for number, score in enumerate(scores if cell["status"] == "done" else []):
            row = {"cell": cell["digest"], "doc_id": doc_ids[number] if doc_ids else number, "score": score}
            self.samples.append(row | ({"cluster": clusters[number]} if clusters else {}))
        return self

    def board(self, order: int | None = None) -> Leaderboard:
        cells, samples = pd.DataFrame(self.cells), pd.DataFrame(self.samples)
        if order is not None:
            cells = cells.sample(frac=1, random_state=order)
            samples = samples.sample(frac=1, random_state=order)
        return build_leaderboard(cells, samples, {"packages": {"torch": "2.11"}, "commit": "abc", "device": "cpu"})


def flipped(count: int, scores: list[float] = RIGHT) -> list[float]:
    """`scores` with the first `count` wrong."""
    return [0.0] * count + scores[count:]


def grid() -> Table:
    table = Table()
    for task in ("chartqa", "docvqa_val"):
        table.add("full", "1", task, RIGHT)
        for budget, worse in (("0.1", 2), ("0.3", 1), ("64tok", 1)):
            table.add("good", budget, task, flipped(worse))
            table.add("random", budget, task, flipped(5 * worse))
            table.add("bad", budget, task, flipped(7 * worse))
    return table


def summary(board: Leaderboard) -> pd.DataFrame:
    derived = ("kind", "complete", "share_kept")
    return pd.DataFrame([{**vars(row), **{name: getattr(row, name) for name in derived}} for row in board.summary])


def tidy(board: Leaderboard) -> pd.DataFrame:
    return pd.DataFrame([vars(line) for row in board.summary for line in row.by_task.values()])


def display(board: Leaderboard) -> pd.DataFrame:
    tables = {backbone: main_table(board, backbone) for backbone in board.backbones}
    frames = [pd.DataFrame(table.rows, columns=table.head).assign(backbone=name) for name, table in tables.items()]
    return pd.concat(frames, ignore_index=True)


def row(board: Leaderboard, label: str, budget: str) -> Any:
    (found,) = [row for row in board.summary if (row.label, row.budget) == (label, budget)]
    return {**vars(found), **{name: getattr(found, name) for name in ("kind", "complete", "share_kept")}}


def shown(board: Leaderboard, label: str, budget: str) -> pd.Series:
    table = display(board)
    found = table[(table["method"] == label) & (table["budget"] == budget)]
    assert len(found) == 1
    return found.iloc[0]


# ---------------------------------------------------------------- numbers


def test_rows_are_grouped_and_sorted() -> None:
    board = grid().board()
    assert list(zip(summary(board)["label"], summary(board)["budget"], strict=True)) == [
        ("full", "1"),
        *((label, budget) for budget in ("0.3", "0.1", "64tok") for label in ("good", "random", "bad")),
    ]
    assert display(board)["budget"].tolist()[:2] == ["-", "30%"]
    assert shown(board, "random", "30%")["remark"].startswith("control")


def test_relative_and_its_mean() -> None:
    table = grid()
    table.add("full", "1", "mme", RIGHT, scale=2000.0, mean_of_documents=False)
    for budget in ("0.1", "0.3", "64tok"):
        for label in ("good", "random", "bad"):
            table.add(label, budget, "mme", flipped(3), scale=2000.0, mean_of_documents=False)
    board = table.board()
    good = row(board, "good", "0.1")
    assert good["mean_relative"] == pytest.approx((100 * 13 / 15 * 2 + 100 * 12 / 15) / 3)
    assert good["complete"]
    assert (good["kept_tokens"], good["share_kept"]) == (10, pytest.approx(0.1))
    assert row(board, "full", "1")["mean_relative"] == 100
    line = shown(board, "good", "10%")
    assert line["mme"] == "1200.0 (80.0%) ≈"
    assert line["chartqa"] == "0.6500 (86.7%) ≈"
    assert "per-document scores" in markdown(board)


def test_intervals_are_paired_over_the_same_documents() -> None:
    board = grid().board()
    line = tidy(board)[(tidy(board)["label"] == "random") & (tidy(board)["budget"] == "0.3")].iloc[0]
    interval = stats.paired_difference(flipped(5), RIGHT)
    assert (line["difference"], line["low"], line["high"]) == (interval.difference, interval.low, interval.high)
    assert line["distinguishable"] is True
    part = stats.scaled(interval, 100 / 0.75)
    both = stats.mean_of_differences([part, part])
    random = row(board, "random", "0.3")
    assert (random["low"], random["high"]) == pytest.approx((both.low, both.high))
    assert random["distinguishable_from_full"] is True
    good = row(board, "good", "0.3")
    assert good["low"] < 0 < good["high"]
    assert good["distinguishable_from_full"] is False
    assert shown(board, "good", "30%")["remark"] == "best; not distinguishable from full"
    assert shown(board, "full", "-")["95 % vs full"] == "-"


def test_within_a_budget_rows_are_compared_with_the_best() -> None:
    table = grid()
    for task in ("chartqa", "docvqa_val"):
        table.add("near", "0.1", task, flipped(3))
    board = table.board()
    assert row(board, "good", "0.1")["best_of_budget"]
    assert row(board, "near", "0.1")["distinguishable_from_best"] is False
    assert row(board, "bad", "0.1")["distinguishable_from_best"] is True
    assert row(board, "good", "0.1")["distinguishable_from_best"] is None
    assert "not distinguishable from best" in shown(board, "near", "10%")["remark"]


def test_clusters_widen_the_interval() -> None:
    alone, together = Table(), Table()
    clusters = [f"video {min(number // 2, 7)}" for number in range(20)]
    alone.add("full", "1", "video", RIGHT).add("good", "0.1", "video", flipped(5))
    together.add("full", "1", "video", RIGHT, clusters=clusters)
    together.add("good", "0.1", "video", flipped(5), clusters=clusters)
    assert row(alone.board(), "good", "0.1")["distinguishable_from_full"] is True
    wide, narrow = row(together.board(), "good", "0.1"), row(alone.board(), "good", "0.1")
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]


@pytest.mark.parametrize(
    ("documents", "videos", "enough"), [(2, 2, False), (7, 7, False), (8, 8, True), (20, 7, False)]
)
def test_too_few_documents_have_no_interval_anywhere(documents: int, videos: int, enough: bool) -> None:
    table = Table()
    right = [float(number != 3) for number in range(documents)]
    clusters = [f"video {number % videos}" for number in range(documents)]
    for label, budget, scores in (("full", "1", right), ("good", "0.1", right), ("bad", "0.1", flipped(1, right))):
        table.add(label, budget, "few", scores, clusters=clusters)
        table.add(label, budget, "many", RIGHT)
    board = table.board()
    text = shown(board, "bad", "10%")["95 % vs full"]
    assert (text == "too few documents") is not enough
    assert ("too few documents" in row(board, "bad", "0.1")["interval_note"]) is not enough
    line = tidy(board)[(tidy(board)["label"] == "bad") & (tidy(board)["task"] == "few")].iloc[0]
    assert math.isnan(line["low"]) is not enough
    assert (line["distinguishable"] is None) is not enough
    assert (row(board, "bad", "0.1")["distinguishable_from_best"] is None) is not enough
    assert line["difference"] == pytest.approx(-1 / documents)
    renderings = (markdown(board), html(board), latex(board), terminal(board), terminal(board, 60))
    for rendering in renderings:
        table_alone = rendering.partition("\n- Relative")[0].partition("<ul>")[0].partition("\n% Relative")[0]
        assert ("too few" in table_alone) is not enough
    written = pd.read_csv(io.StringIO(csv(board))).set_index("label")
    assert math.isnan(written.loc["bad", "low"]) is not enough
    found = differences(table, "good")
    for task in ("few", MEAN):
        held = found["tiny", "bad", "0.1", task]
        assert held["difference"] < 0
        assert math.isnan(held["low"]) is not enough
        assert held["note"] == ("" if enough else "too few documents")
        assert (_cell(held).endswith("(too few documents)")) is not enough
    assert math.isfinite(found["tiny", "bad", "0.1", "many"]["low"])


def test_lower_is_better() -> None:
    table = Table().add("full", "1", "wer", [0.2] * 10 + [0.4] * 10, higher_is_better=False)
    table.add("good", "0.1", "wer", [0.4] * 10 + [0.8] * 10, higher_is_better=False)
    board = table.board()
    good = row(board, "good", "0.1")
    assert good["mean_relative"] == pytest.approx(50)
    assert good["high"] < 0
    assert good["distinguishable_from_full"] is True


def test_seeds_are_averaged_and_their_spread_shown() -> None:
    table = Table().add("full", "1", "chartqa", RIGHT)
    for seed, worse in enumerate((2, 4, 6)):
        options = json.dumps({"upstream_exact": False, "seed": seed})
        table.add("random", "0.1", "chartqa", flipped(worse), seed=seed, options=options)
    board = table.board()
    assert shown(board, "random", "10%")["chartqa"].startswith("0.5500 ±0.1000 (73.3%)")
    random = row(board, "random", "0.1")
    assert random["seeds"] == 3
    mean = np.mean([flipped(worse) for worse in (2, 4, 6)], axis=0)
    expected = stats.scaled(stats.paired_difference(mean, RIGHT), 100 / 0.75)
    assert (random["low"], random["high"]) == pytest.approx((expected.low, expected.high))


def test_equal_seeds_differ_from_full_by_nothing() -> None:
    third = [0.1, 0.7, 1 / 3, 0.9, 0.3, 0.6, 0.2, 0.8]
    table = Table().add("full", "1", "docvqa_val", third)
    for seed in range(3):
        table.add("random", "0.1", "docvqa_val", third, seed=seed)
    random = row(table.board(), "random", "0.1")
    assert (random["low"], random["high"]) == (0, 0)
    assert random["distinguishable_from_full"] is False


# ---------------------------------------------------------------- what must not be compared


def test_missing_and_failed_tasks_mark_the_mean() -> None:
    table = grid().add("late", "0.1", "chartqa", flipped(0))
    table.add("late", "0.1", "docvqa_val", [], status="failed", error="OutOfMemoryError: <b>no</b> | room\nmore")
    table.add("half", "0.1", "chartqa", flipped(0))
    board = table.board()
    assert shown(board, "late", "10%")["docvqa_val"] == "failed"
    assert shown(board, "half", "10%")["docvqa_val"] == "-"
    for label in ("late", "half"):
        assert shown(board, label, "10%")["mean rel. %"] == "100.0 (1/2)"
        assert not row(board, label, "0.1")["complete"]
        assert not row(board, label, "0.1")["best_of_budget"]
    # an incomplete mean of 100 stands below complete ones of its budget and is not compared with their best
    order = [
        label
        for label, budget in zip(summary(board)["label"], summary(board)["budget"], strict=True)
        if budget == "0.1"
    ]
    assert order == ["good", "random", "bad", "half", "late"]
    assert row(board, "late", "0.1")["distinguishable_from_best"] is None
    assert any("OutOfMemoryError" in note and "\n" not in note for note in board.notes)


def test_a_failed_seed_is_shown() -> None:
    table = grid().add("good", "0.1", "chartqa", [], seed=1, status="failed", error="boom")
    board = table.board()
    assert shown(board, "good", "10%")["chartqa"].endswith("1/2 seeds")
    assert "boom" in terminal(board)


def test_full_of_zero_leaves_relative_open_for_all_alike() -> None:
    table = grid().add("full", "1", "pope", [0.0] * 20)
    for label in ("good", "random", "bad"):
        for budget in ("0.1", "0.3", "64tok"):
            table.add(label, budget, "pope", [0.0] * 19 + [1.0])
    board = table.board()
    assert shown(board, "good", "10%")["pope"] == "0.0500 (-) ≈"
    assert shown(board, "full", "-")["mean rel. %"] == "100.0 (2/3)"
    assert shown(board, "good", "10%")["mean rel. %"] == "86.7 (2/3)"
    assert row(board, "good", "0.1")["best_of_budget"]


def test_nothing_is_relative_without_a_full_row() -> None:
    table = Table().add("good", "0.1", "chartqa", RIGHT)
    board = table.board()
    assert math.isnan(row(board, "good", "0.1")["mean_relative"])
    assert shown(board, "good", "10%")["chartqa"] == "0.7500 (-)"
    assert any("no `full` row" in note for note in board.notes)


def test_a_failed_full_row_is_no_reference() -> None:
    table = Table().add("full", "1", "chartqa", [], status="failed", error="x").add("good", "0.1", "chartqa", RIGHT)
    board = table.board()
    assert shown(board, "full", "-")["chartqa"] == "failed"
    assert shown(board, "good", "10%")["mean rel. %"] == "- (0/1)"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"doc_ids": list(range(1, 21))}, "documents"),
        ({"scores": RIGHT[:10]}, "documents"),
        ({"metric": "f1"}, "metric"),
        ({"context": "b"}, "settings"),
    ],
)
def test_other_documents_metrics_or_settings_are_not_compared(changes: dict[str, Any], why: str) -> None:
    table = Table().add("full", "1", "chartqa", RIGHT, context="a")
    table.add("good", "0.1", "chartqa", **{"scores": RIGHT, **changes})
    board = table.board()
    line = tidy(board)[tidy(board)["label"] == "good"].iloc[0]
    assert why in line["note"]
    assert math.isnan(line["relative"])
    assert line["distinguishable"] is None


def test_another_backbone_is_another_table() -> None:
    table = grid()
    table.add("full", "1", "chartqa", [1.0] * 20, backbone="other").add("good", "0.1", "pope", RIGHT, backbone="other")
    board = table.board()
    text = markdown(board)
    assert text.index("## other") < text.index("## tiny")
    assert "pope" not in text[text.index("## tiny") : text.index("- Relative")]
    other = tidy(board)[(tidy(board)["backbone"] == "other") & (tidy(board)["label"] == "good")]
    assert other.set_index("task")["note"]["pope"] == "no full row"


def test_each_backbone_has_its_own_full_row_and_its_own_best() -> None:
    """The same scores relative to another `full`; the better backbone takes nothing from the other."""
    table = Table()
    for backbone, scores in (("a/strong", [1.0] * 20), ("b/weak", RIGHT)):
        table.add("full", "1", "chartqa", scores, backbone=backbone)
        for label, worse in (("good", 3), ("bad", 9)):
            table.add(label, "0.1", "chartqa", flipped(worse, scores), backbone=backbone)
    board = table.board()
    rows = summary(board).set_index(["backbone", "label"])
    assert rows["mean_relative"].to_dict() == {
        ("a/strong", "full"): 100,
        ("a/strong", "good"): pytest.approx(85),
        ("a/strong", "bad"): pytest.approx(55),
        ("b/weak", "full"): 100,
        ("b/weak", "good"): pytest.approx(80),
        ("b/weak", "bad"): pytest.approx(40),
    }
    assert list(rows.index) == [(b, label) for b in ("a/strong", "b/weak") for label in ("full", "good", "bad")]
    assert rows["best_of_budget"].to_dict() == {key: key[1] == "good" for key in rows.index}


def test_tasks_of_one_backbone_alone_are_columns_of_its_table_alone() -> None:
    table = Table()
    for backbone, tasks in (("a", ("chartqa", "pope")), ("b", ("ai2d", "pope"))):
        for task in tasks:
            table.add("full", "1", task, RIGHT, backbone=backbone)
            table.add("good", "0.1", task, flipped(3), backbone=backbone)
    board = table.board()
    headers = [line for line in markdown(board).splitlines() if line.startswith("| method")]
    assert [[part.strip() for part in line.split("|")][3:5] for line in headers] == [
        ["chartqa", "pope"],
        ["ai2d", "pope"],
    ]
    assert summary(board)["complete"].all(), "a task that only the other backbone has is not missing"
    assert "-" not in display(board)[display(board)["backbone"] == "b"][["ai2d", "pope"]].to_numpy()


def test_options_that_differ_between_backbones_are_no_two_methods() -> None:
    """Each backbone may bring weights of its own for one method."""
    table = Table()
    for backbone, weights in (("a", "scorer-7b"), ("b", "scorer-3b")):
        table.add("full", "1", "chartqa", RIGHT, backbone=backbone)
        table.add("good", "0.1", "chartqa", RIGHT, backbone=backbone, options=json.dumps({"scorer": weights}))
    table.add("good", "0.1", "chartqa", flipped(2), backbone="b", options=json.dumps({"scorer": "other"}))
    rows = summary(table.board())
    assert rows[rows["backbone"] == "a"]["label"].tolist() == ["full", "good"]
    assert set(rows[rows["backbone"] == "b"]["label"]) == {"full", "good (scorer=scorer-3b)", "good (scorer=other)"}


def test_the_remark_of_a_backbone_is_in_every_heading() -> None:
    table = grid()
    remark = "trained fusion, LLM retrained & <more>"
    for task in ("chartqa", "docvqa_val"):
        table.add("full", "1", task, RIGHT, backbone="stf_7b", remark=remark)
    table.add("good", "0.1", "chartqa", [], backbone="stf_7b", status="failed", error="x")  # before it was loaded
    board = table.board()
    assert board.remarks == {"stf_7b": remark}
    assert "## stf_7b (trained fusion, LLM retrained & &lt;more>)\n" in markdown(board)
    assert "<h2>stf_7b (trained fusion, LLM retrained &amp; &lt;more&gt;)</h2>" in html(board)
    assert r"\caption{stf\_7b (trained fusion, LLM retrained \& \ensuremath{<}more\ensuremath{>}): score" in latex(
        board
    )
    assert f"stf_7b ({remark})\n" in terminal(board)
    assert "## tiny\n" in markdown(board)
    frame = pd.read_csv(io.StringIO(csv(board)), keep_default_na=False).groupby("backbone")["backbone_remark"]
    assert frame.unique().map(list).to_dict() == {"stf_7b": [remark], "tiny": [""]}
    assert set(summary(board)["backbone"]) == {"stf_7b", "tiny"}, "the remark is no part of the name"


def test_a_backbone_that_failed_as_a_whole_is_one_note() -> None:
    table = grid()
    for label, budget in (("full", "1"), ("good", "0.1"), ("bad", "0.1")):
        table.add(label, budget, "chartqa", [], backbone="broken", status="failed", error="incomplete\nweights")
    board = table.board()
    notes = [note for note in board.notes if "broken" in note]
    assert notes == ["failed: broken, all 3 cells: incomplete weights"]
    rows = display(board)[display(board)["backbone"] == "broken"]
    assert rows["chartqa"].tolist() == ["failed"] * 3
    assert row(board, "good", "0.3")["complete"], "the other backbone's rows are as they were"

    table.add("late", "0.1", "chartqa", [], backbone="broken", status="failed", error="another reason")
    assert sum("broken" in note for note in table.board().notes) == 4
    alone = grid()
    for budget in ("0.1", "0.3"):
        alone.add("late", budget, "chartqa", [], status="failed", error="x")
    assert sum("late" in note for note in alone.board().notes) == 2, "other cells of that backbone are done"


def test_two_revisions_are_two_backbones() -> None:
    table = Table()
    for revision, worse in (("aaa", 0), ("bbb", 5)):
        table.add("full", "1", "chartqa", flipped(worse), revision=revision)
        table.add("good", "0.1", "chartqa", flipped(worse), revision=revision)
    board = table.board()
    assert set(summary(board)["backbone"]) == {"tiny @ aaa", "tiny @ bbb"}
    assert summary(board)["mean_relative"].tolist() == [100] * 4


def test_one_label_for_two_options_is_told_apart() -> None:
    table = Table().add("full", "1", "chartqa", RIGHT).add("good", "0.1", "chartqa", RIGHT)
    table.add("good", "0.1", "chartqa", flipped(5), options='{"upstream_exact":true}')
    labels = set(summary(table.board())["label"])
    assert labels == {"full", "good (upstream_exact=True)", "good (upstream_exact=False)"}


def test_an_older_cell_of_other_settings_is_left_out() -> None:
    table = grid()
    table.add("good", "0.1", "chartqa", flipped(9), finished_at="2025-01-01T00:00:00Z", version="0.0.1")
    board = table.board()
    assert shown(board, "good", "10%")["chartqa"].startswith("0.6500")
    assert any(note.startswith("1 older cells") for note in board.notes)


def test_subtasks_number_their_documents_apart() -> None:
    table = Table().add("full", "1", "mvbench", RIGHT).add("good", "0.1", "mvbench", flipped(5))
    samples = pd.DataFrame(table.samples)
    whole = row(build_leaderboard(pd.DataFrame(table.cells), samples), "good", "0.1")
    samples["subtask"] = ["a" if number < 10 else "b" for number in samples["doc_id"]]
    samples["doc_id"] %= 10
    split = row(build_leaderboard(pd.DataFrame(table.cells), samples), "good", "0.1")
    assert (split["low"], split["high"]) == (whole["low"], whole["high"])
    assert split["distinguishable_from_full"] is True


def test_a_score_of_unknown_scale() -> None:
    table = Table().add("full", "1", "x", RIGHT, scale=None, score=123.456789)
    board = build_leaderboard(pd.DataFrame(table.cells), pd.DataFrame(table.samples))
    assert shown(board, "full", "-")["x"] == "123.46"
    assert all(math.isnan(task.scale) for task in board.tasks)


def test_without_samples_there_are_scores_but_no_intervals() -> None:
    table = grid()
    board = build_leaderboard(pd.DataFrame(table.cells), pd.DataFrame())
    good = row(board, "good", "0.1")
    assert good["mean_relative"] == pytest.approx(100 * 13 / 15)
    assert math.isnan(good["low"])
    assert good["distinguishable_from_full"] is None
    bare = pd.DataFrame({"backbone": ["m"], "method": ["full"], "budget": [1.0], "task": ["t"], "score": [0.5]})
    assert "0.5000" in terminal(build_leaderboard(bare, pd.DataFrame()))


# ---------------------------------------------------------------- renderings


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)
        assert not any(name in ("src", "href") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def awkward() -> Leaderboard:
    table = grid()
    for task in ("chartqa", "docvqa_val"):
        table.add("odd", "0.1", task, flipped(2), label="a|b_c <i>&#36;{x}% \\ @BODY@")
    return table.board()


def test_markdown_is_one_table_with_escaped_text() -> None:
    lines = markdown(awkward()).splitlines()
    board = lines[lines.index("## tiny") + 2 :]
    board = board[: board.index("")]
    assert len(board) == 2 + 11
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in board}) == 1
    assert any("a\\|b_c &lt;i>" in line for line in board)


def test_csv_is_plain() -> None:
    board = awkward()
    frame = pd.read_csv(io.StringIO(csv(board)))
    assert frame["label"].tolist() == summary(board)["label"].tolist()
    assert frame["chartqa"].iloc[0] == 0.75
    assert frame["chartqa relative %"].iloc[0] == 100
    assert frame["environment"].str.contains("torch 2.11").all()
    assert frame["run_date"].eq("2026-01-02").all()


def test_html_is_self_contained_and_balanced() -> None:
    page = html(awkward())
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "a|b_c <i>&#36;{x}% \\ @BODY@" in parser.text
    assert "<script" not in page


def test_latex_escapes_and_has_even_rows() -> None:
    text = latex(awkward())
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 1 + 11
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows}) == 1
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any(re.search(r"(?<!\\)[_#]", line) for line in body)
    assert r"a|b\_c \ensuremath{<}i\ensuremath{>}\&\#36;\{x\}\% \textbackslash{} @BODY@" in text


def test_terminal_fits_a_width() -> None:
    table = grid()
    for number in range(8):
        for label, budget in (("full", "1"), ("good", "0.1")):
            table.add(label, budget, f"a_rather_long_task_name_{number}", RIGHT)
    board = table.board()
    narrow = terminal(board, 100)
    tables = narrow[: narrow.index("relative % to")]
    assert max(len(line) for line in tables.splitlines()) <= 100
    assert narrow.count("method ") > 1
    assert max(len(line) for line in terminal(board).splitlines()) > 100


def test_every_rendering_names_environment_and_meaning() -> None:
    board = grid().board()
    for text in (markdown(board), latex(board), html(board)):
        for part in ("torch 2.11", "commit abc", "device cpu", "Run of 2026-01-02", "score of the full model"):
            assert part in text
        assert "not distinguishable" in text


def test_order_of_the_input_changes_nothing() -> None:
    board = grid().board()
    for order in range(3):
        other = grid().board(order)
        assert markdown(other) == markdown(board)
        assert csv(other) == csv(board)


def test_write_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", create=True)
    for method, budget, worse in (("full", "1", 0), ("divprune", "0.2", 2)):
        digest = digest_of({"method": method})
        scores = flipped(worse)
        record = CellRecord(
            digest=digest,
            backbone="tiny",
            method=method,
            budget=budget,
            task="chartqa",
            metric="relaxed_overall",
            score=sum(scores) / 20,
            n_documents=20,
            kept_tokens=20 * float(budget),
            total_tokens=20,
            finished_at="2026-01-02T03:04:05Z",
        )
        table = pd.DataFrame({"doc_id": range(20), "score": scores}).assign(answer="a", target="b")
        run.finish(digest, record, table.assign(kept_tokens=4, total_tokens=20))
    run.write_environment({"packages": {"torch": "2.11"}, "commit": "0123456789abcdef", "modified": True})
    run.write_environment({"packages": {"torch": "2.12"}, "cuda": {"devices": [{"name": "H200"}]}})
    names = [f"leaderboard.{ending}" for ending in ("csv", "md", "tex", "html")]
    board = write(run.folder)
    first = [(run.folder / name).read_bytes() for name in names]
    again = write(str(run.folder))
    assert [(run.folder / name).read_bytes() for name in names] == first
    assert terminal(again) == terminal(board)
    text = first[1].decode()
    assert "commit 0123456789ab with changes" in text
    assert "GPUs H200" in text
    assert sorted(path.name for path in run.folder.iterdir()) == sorted([*names, "cells", "environment.json"])


def test_write_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished or failed cell"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- against one row


def differences(table: Table, *reference: str) -> dict[tuple[str, str, str, str], pd.Series]:
    found = against(pd.DataFrame(table.cells), pd.DataFrame(table.samples), *reference)
    return {tuple(row[["backbone", "label", "budget", "task"]]): row for _, row in found.iterrows()}  # type: ignore[misc]


def test_rows_are_held_against_the_row_of_their_budget() -> None:
    found = differences(grid(), "random")
    assert {key[1] for key in found} == {"good", "bad"}  # full is at another budget, and random itself
    for budget, worse in (("0.1", 2), ("0.3", 1), ("64tok", 1)):
        row = found["tiny", "good", budget, "docvqa_val"]
        plain = stats.paired_difference(flipped(worse), flipped(5 * worse))
        assert row["difference"] == pytest.approx(100 * plain.difference) == pytest.approx(20 * worse)
        assert (row["low"], row["high"]) == pytest.approx((100 * plain.low, 100 * plain.high))
        assert row["distinguishable"]
        mean = found["tiny", "good", budget, MEAN]
        assert mean["difference"] == pytest.approx(20 * worse)
        assert mean["high"] - mean["low"] < row["high"] - row["low"]  # two benchmarks say more than one
        assert found["tiny", "bad", budget, MEAN]["difference"] < 0


def test_rows_are_held_against_one_row_of_any_budget() -> None:
    found = differences(grid(), "good@30%")
    assert found["tiny", "good", "0.1", MEAN]["difference"] == pytest.approx(-5)
    assert found["tiny", "full", "1", MEAN]["difference"] == pytest.approx(5)
    assert ("tiny", "good", "0.3", MEAN) not in found
    assert differences(grid(), "full").keys() == differences(grid(), "full@1").keys()


def test_points_are_of_the_largest_score_and_positive_where_better() -> None:
    table = Table()
    table.add("one", "0.1", "ocrbench", [500.0, 0.0, 1000.0], scale=1000.0)
    table.add("two", "0.1", "ocrbench", [0.0, 0.0, 1000.0], scale=1000.0)
    table.add("one", "0.1", "wer", [0.5, 0.0, 1.0], higher_is_better=False)
    table.add("two", "0.1", "wer", [0.0, 0.0, 1.0], higher_is_better=False)
    table.add("one", "0.1", "unknown", [0.5, 0.0, 1.0], scale=None)
    table.add("two", "0.1", "unknown", [0.0, 0.0, 1.0], scale=None)
    table.add("one", "0.1", "mme", [1.0, 0.0, 1.0], scale=2000.0, mean_of_documents=False)
    table.add("two", "0.1", "mme", [0.0, 0.0, 1.0], scale=2000.0, mean_of_documents=False)
    found = differences(table, "two")
    assert found["tiny", "one", "0.1", "ocrbench"]["difference"] == pytest.approx(50 / 3)
    assert found["tiny", "one", "0.1", "wer"]["difference"] == pytest.approx(-50 / 3)
    assert found["tiny", "one", "0.1", "mme"]["difference"] == pytest.approx(100 / 3)
    assert found["tiny", "one", "0.1", "unknown"]["note"] == "the largest score is not known"
    assert math.isnan(found["tiny", "one", "0.1", MEAN]["difference"])


def test_a_row_of_another_backbone_can_be_the_one() -> None:
    table = grid()
    for task in ("chartqa", "docvqa_val"):
        table.add("full", "1", task, flipped(3), backbone="fused")
    found = differences(table, "random@0.1", "tiny")
    assert found["fused", "full", "1", MEAN]["difference"] == pytest.approx(35)
    assert found["tiny", "bad", "0.1", MEAN]["difference"] == pytest.approx(-20)
    assert not [key for key in differences(table, "random") if key[0] == "fused"]


def test_what_can_not_be_compared_says_why() -> None:
    table = grid()
    table.add("other", "0.1", "chartqa", RIGHT, doc_ids=list(range(1, 21)))
    table.add("other", "0.1", "docvqa_val", [], status="failed", error="boom")
    table.add("more", "0.1", "pope", RIGHT)
    found = differences(table, "good")
    assert found["tiny", "other", "0.1", "chartqa"]["note"] == "other documents than the good row"
    assert found["tiny", "other", "0.1", "docvqa_val"]["note"] == "failed"
    assert found["tiny", "more", "0.1", "pope"]["note"] == "no good row"
    assert math.isnan(found["tiny", "more", "0.1", MEAN]["difference"])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (("god",), "unknown row of this run 'god': did you mean 'good'"),
        (("good@0.5",), "no row 'good@0.5': 'good' was run at 0.3, 0.1, 64tok"),
        (("good@much",), "budget"),
        (("good", "tine"), "unknown backbone of this run 'tine': did you mean 'tiny'"),
    ],
)
def test_a_row_that_is_not_there_is_bad_input(reference, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        differences(grid(), *reference)
