"""Tables from rows: ratios with intervals, order, remarks, refusals, and two profiles compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler import report
from visionselector_eval.harness.profiler.metrics import peak
from visionselector_eval.harness.profiler.plots import draw
from visionselector_eval.harness.profiler.ratios import paired_ratio
from visionselector_eval.harness.profiler.spec import FULL, LIMIT, ProfileCell, cell_of
from visionselector_eval.harness.profiler.store import ProfileFolder, load_profile

SETTINGS = {
    "backbone": "tiny",
    "device": "a processor",
    "dtype": "float32",
    "attention": "sdpa",
    "threads": 1,
    "new_tokens": 4,
    "torch": "2",
    "transformers": "5",
    "version": "0",
}
ABOUT = {
    "settings": SETTINGS,
    "warmup": 1,
    "repeats": 20,
    "parameters": 10**6,
    "weight_bytes": 2**22,
    "ceiling_flops": 1e11,
    "clock": "perf_counter",
    "energy": "none: device is cpu",
}
CELLS = [
    cell_of(FULL, "full", "full", {}, "1"),
    cell_of("method", "visionselector", "visionselector", {}, "0.2"),
    cell_of("method", "fastv", "fastv", {}, "0.2"),
    cell_of(LIMIT, "uniform", "limit", {}, "0.2"),
]
# vision, compressor, prefill in ms: known medians for each cell
COSTS = {
    "full": (10.0, 0.0, 90.0),
    "visionselector": (10.0, 1.0, 19.0),
    "fastv": (10.0, 5.0, 35.0),
    "limit": (10.0, 4.0, 18.0),
}


def rows(seed: int, cells: list[ProfileCell] = CELLS, noise: float = 0.01, rounds: int = 20) -> list[dict[str, Any]]:
    """What a run would have written: drift that all cells share, and noise of their own."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(rounds):
        drift = 1 + 0.5 * rng.random()
        for place, cell in enumerate(reversed(cells)):
            vision, compressor, prefill = (x * drift * math.exp(noise * rng.normal()) for x in COSTS[cell.label])
            first = vision + compressor + prefill
            made.append(
                {
                    **base(cell, "time", number),
                    "place": place,
                    "preprocess_ms": 5.0,
                    "vision_ms": vision,
                    "compressor_ms": compressor,
                    "prefill_ms": prefill,
                    "setup_ms": 1.0,
                    "decode_ms": 30.0,
                    "ttft_ms": first,
                    "latency_ms": first + 31.0,
                    "decode_token_ms": 10.0,
                    "new_tokens": 4,
                    "visual_before": 100,
                    "visual_after": 100 if cell.label == "full" else 20,
                    "visual_layers": 100.0 if cell.label == "full" else 20.0,
                    "text_tokens": 30,
                    "layer_lengths": [130, 130, 50, 50] if cell.label == "fastv" else [50] * 4,
                }
            )
        made.append({**base(cells[0], "plain", number), "latency_ms": 0.98 * made[-1]["latency_ms"]})
    for cell in cells:
        size = 2**20 * (100 if cell.label == "full" else 20)
        made.append(
            {
                **base(cell, "memory", 0),
                "rss_bytes": size,
                "rss_vision_bytes": 2**20,
                "rss_prefill_bytes": size,
                "kv_bytes": size // 4,
                "whole_bytes": 2**31,
                "memory_method": "VmHWM",
            }
        )
        made.append({**base(cell, "published", 0), "published_prefill_ms": 2 * sum(COSTS[cell.label])})
        kernel = "aten.other" if cell.label == "fastv" else "aten.flash"
        made.append({**base(cell, "flops", 0), "prefill_flops": 9e8, "attention_kernels": [kernel]})
    return made


def base(cell: ProfileCell, kind: str, number: int) -> dict[str, Any]:
    return {
        "workload": "synthetic-100",
        "item": "synthetic/100",
        "cell": cell.digest,
        "role": cell.role,
        "method": cell.method,
        "label": cell.label,
        "options": "{}",
        "budget": cell.budget,
        "kind": kind,
        "round": number,
        "number": CELLS.index(cell) if cell in CELLS else 9,
        "at": 1000.0 + number,
        "attention": "sdpa",
    }


def folder_with(path: Path, made: list[dict[str, Any]], about: dict[str, Any] = ABOUT) -> Path:
    folder = ProfileFolder(path)
    folder.settle(about)
    for row in made:
        folder.append(row)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return folder_with(tmp_path_factory.mktemp("profile") / "one", rows(0))


def test_the_table_has_full_first_and_the_truth(written) -> None:
    lines = report.summary(load_profile(written))
    assert list(lines["label"]) == ["full", "visionselector", "fastv", "limit"]
    own = lines.set_index("label")
    assert own.loc["visionselector", "speedup"] == pytest.approx(100 / 30, rel=0.02)
    assert own.loc["limit", "speedup"] == pytest.approx(100 / 28, rel=0.02), "its compressor costs nothing"
    assert own.loc["limit", "compressor_ms"] == 0
    assert own.loc["visionselector", "of_ideal"] == pytest.approx(28 / 30, rel=0.02)
    assert own.loc["fastv", "of_ideal"] == pytest.approx(28 / 50, rel=0.02)
    assert own.loc["visionselector", "compressor_share"] == pytest.approx(1 / 90, rel=0.1)
    assert own.loc["visionselector", "speedup_low"] < 100 / 30 < own.loc["visionselector", "speedup_high"]
    assert own.loc["visionselector", "memory_saved"] == pytest.approx(0.8)
    assert own.loc["visionselector", "llm_saved"] == pytest.approx(0.8)
    assert own.loc["visionselector", "kv_mib"] == 5
    assert own.loc["visionselector", "published_prefill_ms"] == 60
    assert own.loc["full", "ttft_p10"] < own.loc["full", "ttft_p50"] < own.loc["full", "ttft_p99"]
    share = 9e8 / (own.loc["full", "prefill_ms"] / 1000) / 1e11
    assert own.loc["full", "prefill_of_ceiling"] == pytest.approx(share)


def test_the_text_says_what_one_must_know(written) -> None:
    text = report.write(written)
    assert text == (written / "table.md").read_text()
    for needed in ("full", "speed-up", "of ideal", "energy", "none: device is cpu", "VmHWM", "own marks: +2.0 %"):
        assert needed.lower() in text.lower(), needed
    assert "layers: 130 x2, 50 x2" in text
    assert "attention kernel other, full has flash" in text
    assert "Max memory (GB)" in text
    assert "Visual tokens" in text
    assert len(pd.read_csv(written / "table.csv")) == 4
    assert {path.name for path in (written / "plots").iterdir()} == {
        "phases-synthetic-100.png",
        "speedup-synthetic-100.png",
    }


def test_a_failed_cell_is_a_line_with_its_reason(tmp_path) -> None:
    made = [row for row in rows(0) if row["label"] != "fastv"]
    made.append({**base(CELLS[2], "failed", 0), "error": "out of memory at N=100"})
    lines = report.summary(load_profile(folder_with(tmp_path / "p", made)))
    assert lines.set_index("label").loc["fastv", "error"] == "out of memory at N=100"
    assert "out of memory at N=100" in report.markdown(load_profile(tmp_path / "p"), lines)
    assert draw(lines, tmp_path / "plots")


def test_a_failure_that_a_later_run_mended_does_not_count(tmp_path) -> None:
    made = [{**base(CELLS[2], "failed", 0), "error": "out of memory", "at": 1.0}, *rows(0)]
    lines = report.summary(load_profile(folder_with(tmp_path / "p", made)))
    assert lines.set_index("label").loc["fastv", "error"] == ""


def test_the_scaling_table_has_a_column_for_each_size(tmp_path) -> None:
    made = rows(0) + [{**row, "workload": "synthetic-400"} for row in rows(1)]
    lines = report.summary(load_profile(folder_with(tmp_path / "p", made)))
    table = report.scaling_table(lines)
    assert [list(row) for row in table] == [["method", "budget", "N=100", "N=400"]] * 4
    assert table[0]["N=100"].endswith(" ms")
    assert table[1]["N=400"].startswith("3.3")
    assert report.scaling_table(lines[lines["workload"] == "synthetic-100"]) == []


def test_rows_of_two_attention_back_ends_make_no_table(tmp_path) -> None:
    made = rows(0)
    made[3]["attention"] = "eager"
    with pytest.raises(InputError, match=r"several attention back-ends \(eager, sdpa\)"):
        load_profile(folder_with(tmp_path / "p", made))


# ratios ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=40), st.floats(0.5, 4))
def test_drift_that_both_share_leaves_the_ratio_alone(drift, factor) -> None:
    full = pd.Series(drift, dtype="float64")
    ratio = paired_ratio(full * factor, full)
    assert ratio.estimate == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


def test_a_repetition_lands_in_the_interval_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        one, two = (pd.Series(np.exp(0.1 * rng.normal(size=50))) for _ in range(2))
        a, b = (paired_ratio(s, pd.Series(np.exp(0.1 * rng.normal(size=50)))) for s in (one, two))
        inside += a.low <= b.estimate <= a.high
    assert 180 <= inside <= 199


def test_few_rounds_have_no_interval_and_lonely_rounds_no_pair() -> None:
    few = paired_ratio(pd.Series([2.0, 4.0, 6.0]), pd.Series([1.0, 2.0, 3.0]))
    assert (few.estimate, few.rounds) == (2.0, 3)
    assert math.isnan(few.low)
    assert str(few) == "2.00x"
    lonely = paired_ratio(pd.Series({0: 1.0}), pd.Series({1: 1.0}))
    assert (lonely.rounds, str(lonely)) == (0, "-")


# two profiles ---------------------------------------------------------------------------------------------------------


def test_two_runs_of_the_same_agree_and_a_changed_one_does_not(written, tmp_path) -> None:
    again = folder_with(tmp_path / "again", rows(7))
    agreement = report.compare(written, again)
    assert (agreement.inside, len(agreement.cells)) == (2, 2)
    assert "2 of 2 cells" in agreement.text()
    slower = [
        {**r, "ttft_ms": 1.2 * r["ttft_ms"]} if r.get("label") == "fastv" and "ttft_ms" in r else r for r in rows(7)
    ]
    changed = report.compare(written, folder_with(tmp_path / "slower", slower))
    assert changed.inside == 1
    assert "fastv" in changed.text()


def test_what_cannot_be_compared_is_refused(written, tmp_path) -> None:
    eager = {**ABOUT, "settings": {**SETTINGS, "attention": "eager"}}
    made = [{**row, "attention": "eager"} for row in rows(0)]
    with pytest.raises(InputError, match=r"different attention can't be compared: sdpa in .* eager in"):
        report.compare(written, folder_with(tmp_path / "eager", made, eager))
    with pytest.raises(InputError, match="at least 6 repeats"):
        report.compare(folder_with(tmp_path / "few", rows(0, rounds=3)), written)
    with pytest.raises(InputError, match="there is no folder"):
        report.compare(written, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing is measured"):
        load_profile(tmp_path / "empty")


def test_a_profile_of_other_settings_is_not_mixed_in(written) -> None:
    with pytest.raises(InputError, match=r"made with other settings \(dtype: 'float32' then, 'bfloat16' now\)"):
        ProfileFolder(written).settle({**ABOUT, "settings": {**SETTINGS, "dtype": "bfloat16"}})
    assert ProfileFolder(written).settle({**ABOUT, "repeats": 1})["repeats"] == 20


def test_rows_survive_the_table_and_the_journal_both_being_there(tmp_path) -> None:
    """Killed after the table was written, before the journal was removed."""
    path = folder_with(tmp_path / "p", rows(0))
    journal = (path / "samples.jsonl").read_bytes()
    folder = ProfileFolder(path)
    before = len(folder.rows())
    folder.finish()
    assert not (path / "samples.jsonl").exists()
    (path / "samples.jsonl").write_bytes(journal)
    assert len(ProfileFolder(path).rows()) == before
    assert json.loads((path / "profile.json").read_text())["settings"] == SETTINGS


def test_what_an_allocator_holds_beside_an_answer_is_no_part_of_its_peak():
    """Of each phase the smallest round, of the phases the largest, of several items the median."""
    memory = pd.DataFrame(
        {
            "item": ["a", "a", "a", "b", "b"],
            "memory_method": "VmHWM, reset at each border",
            "rss_vision_bytes": [42.0, 49.0, 45.0, 60.0, 62.0],
            "rss_prefill_bytes": [38.0, 93.0, 90.0, 99.0, 64.0],
            "rss_decode_bytes": [20.0, 20.0, 26.0, 10.0, 10.0],
        }
    )
    assert peak(memory, "rss", ("vision", "prefill", "decode")) == (42 + 64) / 2
    assert peak(memory, "rss", ("prefill", "decode")) == (38 + 64) / 2
    sampled = memory.assign(memory_method="resident memory sampled every 2 ms")
    assert peak(sampled, "rss", ("vision", "prefill")) == (90 + 81.5) / 2
    assert math.isnan(peak(memory, "allocated", ("vision",)))
    assert math.isnan(peak(memory[:0], "rss", ("vision",)))
