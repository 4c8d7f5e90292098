"""From raw rows to tables: medians, intervals of the ratio to `full`, the ideal, the published harness's summary."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler.metrics import METRICS, CellRows, number_text, speedup_text
from visionselector_eval.harness.profiler.ratios import MIN_ROUNDS, Ratio, paired_ratio
from visionselector_eval.harness.profiler.spec import FULL, LIMIT
from visionselector_eval.harness.profiler.store import Profile, load_profile
from visionselector_eval.harness.store.files import write_atomic

log = logging.getLogger(__name__)


def overhead(rows: pd.DataFrame) -> Ratio:
    """Latency with marks over latency without, of the same cell in the same round, over all cells."""
    keys = ["workload", "cell", "round"]
    if not len(rows):
        return Ratio(math.nan, math.nan, math.nan, 0)
    pair = rows[rows["kind"] == "time"].merge(rows[rows["kind"] == "plain"], on=keys, suffixes=("", "_plain"))
    if not len(pair):
        return Ratio(math.nan, math.nan, math.nan, 0)
    return paired_ratio(pair["latency_ms"].reset_index(drop=True), pair["latency_ms_plain"].reset_index(drop=True))


def summary(profile: Profile) -> pd.DataFrame:
    """One row for each workload and cell, `full` first, then methods as given, then the limits.

    Columns: workload, cell, role, method, label, options, budget, error, rounds; `<phase>_ms` medians; `ttft_p10` ...
    `ttft_p99` and the same for `latency` and `decode_token`, in ms; `speedup`, `speedup_low`, `speedup_high` of time to
    first token and `latency_speedup...`; `of_ideal`; token counts; `kv_mib`, `memory_mib`, `reserved_mib`,
    `memory_saved`, and `llm_mib`, `llm_saved` of the LLM's phases alone; `joules`, `energy_saved`; `<phase>_gflop`,
    `theory_<phase>_gflop`, `<phase>_of_ceiling`; `compressor_share` of the full prefill; `published_prefill_ms`,
    `whole_gib`.
    """
    found: list[dict[str, Any]] = []
    for workload, rows in profile.rows.groupby("workload", sort=False):
        cells = rows.drop_duplicates("cell")
        cells = cells.assign(rank=cells["role"].map({FULL: 0, "method": 1, LIMIT: 2}))
        cells = cells.sort_values(["rank", "number"], kind="stable")
        full = rows[rows["role"] == FULL]
        made = [_cell(str(workload), cell, rows, full, profile) for _, cell in cells.iterrows()]
        found += made
    return pd.DataFrame(found)


def _cell(workload: str, cell: Any, rows: pd.DataFrame, full: pd.DataFrame, profile: Profile) -> dict[str, Any]:
    own = rows[rows["cell"] == cell["cell"]]
    time = own[own["kind"] == "time"]
    line: dict[str, Any] = {"workload": workload, **{k: cell[k] for k in ("cell", "role", "method", "label")}}
    line |= {"options": cell["options"], "budget": cell["budget"], "rounds": len(time)}
    broken = own[own["kind"] == "failed"]
    # A failure of an earlier call does not count once a later one has measured the cell.
    failed = len(broken) and (time.empty or broken["at"].max() > own[own["kind"] != "failed"]["at"].max())
    line["error"] = str(broken["error"].iloc[-1]) if failed else ""
    limit = rows[(rows["role"] == LIMIT) & (rows["budget"] == cell["budget"])]
    of_cell = CellRows(cell, own, full, limit, profile)
    for metric in METRICS:
        line |= metric().summarise(of_cell, line)
    return line


# Tables ---------------------------------------------------------------------------------------------------------------


def _remark(line: Mapping[str, Any], full: Mapping[str, Any] | None) -> str:
    remarks = [line["error"]] if line["error"] else []
    if line["role"] == LIMIT:
        remarks.append("ideal: choosing costs nothing")
    if line["role"] == "method" and "," in line["layer_lengths"]:
        remarks.append(f"layers: {line['layer_lengths']}")
    other = line["attention_kernels"]
    if full is not None and other and full["attention_kernels"] and other != full["attention_kernels"]:
        remarks.append(f"attention kernel {other}, full has {full['attention_kernels']}")
    return "; ".join(remarks)


def main_table(lines: pd.DataFrame) -> list[dict[str, str]]:
    """The table of one workload, cells as text."""
    records = [{str(k): v for k, v in r.items()} for r in lines.to_dict("records")]
    full = next((r for r in records if r["role"] == FULL), None)
    return [
        {
            "method": r["label"],
            "budget": "-" if r["role"] == FULL else r["budget"],
            **{column.head: column.text(r) for metric in METRICS for column in metric.columns},
            "remark": _remark(r, full),
        }
        for r in records
    ]


def reference_table(lines: pd.DataFrame) -> list[dict[str, str]]:
    """Memory, prefill, latency and tokens as the published harness prints them: plain means, weights included."""
    return [
        {
            "method": r["label"],
            "budget": "-" if r["role"] == FULL else r["budget"],
            "Max memory (GB)": number_text(r["whole_gib"], ".2f"),
            "Prefill (ms)": number_text(r["published_prefill_ms"]),
            "Latency (ms)": number_text(r["published_latency_ms"]),
            "Visual tokens": number_text(r["visual_before"], ".0f"),
            "kept (measured)": number_text(r["visual_after"], ".1f"),
        }
        for r in ({str(k): v for k, v in r.items()} for r in lines[lines["role"] != LIMIT].to_dict("records"))
    ]


def scaling_table(lines: pd.DataFrame) -> list[dict[str, str]]:
    """Speed-up of time to first token by number of visual tokens; empty for fewer than two synthetic workloads."""
    synthetic = lines[lines["workload"].str.startswith("synthetic-")]
    sizes = sorted({int(name.rpartition("-")[2]) for name in synthetic["workload"]})
    if len(sizes) < 2:
        return []
    table = []
    for _, group in synthetic.groupby("cell", sort=False):
        first = group.iloc[0]
        row = {"method": first["label"], "budget": "-" if first["role"] == FULL else first["budget"]}
        for n in sizes:
            of_size = group[group["workload"] == f"synthetic-{n}"]
            if of_size.empty:
                row[f"N={n}"] = "-"
            elif of_size.iloc[0]["error"]:
                row[f"N={n}"] = str(of_size.iloc[0]["error"])
            elif first["role"] == FULL:
                row[f"N={n}"] = f"{number_text(of_size.iloc[0]['ttft_p50'])} ms"
            else:
                row[f"N={n}"] = speedup_text({str(k): v for k, v in of_size.iloc[0].items()})
        table.append(row)
    return table


def _text(table: Sequence[Mapping[str, str]]) -> str:
    return tabulate([dict(row) for row in table], headers="keys", tablefmt="github", disable_numparse=True)


def notes(profile: Profile) -> list[str]:
    """What one must know to read the numbers: device, settings, rounds, how memory and energy were read, overhead."""
    about = profile.about
    s = about["settings"]
    cost = overhead(profile.rows)
    methods = profile.rows["memory_method"].dropna() if "memory_method" in profile.rows else pd.Series(dtype=object)
    timed = profile.rows[profile.rows["kind"] == "time"].groupby(["workload", "cell"]).size()
    rounds = int(timed.max()) if len(timed) else 0
    marks = "not measured" if not cost.rounds else _overhead(cost)
    return [
        f"{s['backbone']} ({about['parameters'] / 1e9:.2f} G parameters, {about['weight_bytes'] / 2**30:.2f} GiB), "
        f"{s['dtype']}, attention {s['attention']}, on {s['device']}, {s['threads']} CPU threads; "
        f"torch {s['torch']}, transformers {s['transformers']}, this package {s['version']}.",
        f"{rounds} timed rounds after {about['warmup']} of warm-up, cells in random order within a round, "
        f"{s['new_tokens']} new tokens forced, clock: {about['clock']}.",
        "First token = vision + compressor + prefill, medians in ms; speed-up: median over rounds of the ratio to "
        "`full` in the same round, with the interval that a repetition falls into 19 times of 20 (from six rounds on).",
        f"Peak: above what stood before the answer ({methods.iloc[-1] if len(methods) else 'not measured'}), weights "
        "not counted, of each phase the smallest of the rounds; LLM's: of prefill and decode alone, without the vision "
        "encoder. KV: the real cache after the prompt.",
        f"Energy: {about['energy']}. Largest matrix product seen: {about['ceiling_flops'] / 1e9:.0f} GFLOP/s.",
        f"The profiler's own marks: {marks}.",
    ]


def _overhead(cost: Ratio) -> str:
    percent = [f"{100 * (x - 1):+.1f} %" for x in (cost.estimate, cost.low, cost.high) if not math.isnan(x)]
    interval = f" [{percent[1]}, {percent[2]}]" if len(percent) == 3 else ""
    return f"{percent[0]}{interval} of the latency, from {cost.rounds} answers with and without them"


def markdown(profile: Profile, lines: pd.DataFrame) -> str:
    """The whole report as text."""
    parts = ["# Profile", "", *(f"- {note}" for note in notes(profile)), ""]
    for workload, of_workload in lines.groupby("workload", sort=False):
        parts += [f"## {workload}", "", _text(main_table(of_workload)), ""]
        parts += [
            "As the published harness reports it (plain means, weights in the memory, tokens before compression):"
        ]
        parts += ["", _text(reference_table(of_workload)), ""]
    if scaling := scaling_table(lines):
        parts += ["## Speed-up of the first token by visual tokens", "", _text(scaling), ""]
    return "\n".join(parts)


def write(folder: str | Path) -> str:
    """Make table.md, table.csv and, with matplotlib, the plots from a profile's rows; returns the text of table.md.

    Raises:
        InputError: nothing measured there.
    """
    profile = load_profile(folder)
    lines = summary(profile)
    text = markdown(profile, lines)
    write_atomic(profile.folder / "table.md", text)
    write_atomic(profile.folder / "table.csv", lines.to_csv(index=False))
    if find_spec("matplotlib") is None:
        log.info("matplotlib is not installed: no plots")
        return text
    from visionselector_eval.harness.profiler.plots import draw

    draw(lines, profile.folder / "plots")
    return text


# Comparing two runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How two profiles of the same cells agree.

    Attributes:
        cells: one row a cell: workload, label, budget, ratio_a, low, high, ratio_b, inside.
        inside: how many are.
        different: settings that differ.
    """

    cells: pd.DataFrame
    inside: int
    different: list[str]

    @property
    def share(self) -> float:
        """Share of cells whose ratio in B lies in A's interval."""
        return self.inside / len(self.cells)

    def text(self) -> str:
        """For people: the cells outside, then the count."""
        out = self.cells[~self.cells["inside"]]
        shown = [
            {
                "workload": str(r.workload),
                "method": str(r.label),
                "budget": str(r.budget),
                "A": f"{r.ratio_a:.3f}x [{r.low:.3f}, {r.high:.3f}]",
                "B": f"{r.ratio_b:.3f}x",
            }
            for r in out.itertuples()
        ]
        parts = [_text(shown), ""] if shown else []
        if self.different:
            parts.append(f"the two differ in: {', '.join(self.different)}")
        parts.append(
            f"{self.inside} of {len(self.cells)} cells: the ratio to full in B lies in A's interval "
            f"({100 * self.share:.0f} %)"
        )
        return "\n".join(parts)


def compare(a: str | Path, b: str | Path) -> Agreement:
    """For how many cells the speed-up of the first token in B lies within its interval in A.

    Raises:
        InputError: nothing measured, no cell in common, no intervals (too few rounds), or another backbone or
            attention.
    """
    one, two = load_profile(a), load_profile(b)
    mine, theirs = one.about["settings"], two.about["settings"]
    for key in ("backbone", "attention", "dtype"):
        if mine.get(key) != theirs.get(key):
            raise InputError(
                f"profiles with different {key} can't be compared: {mine.get(key)} in '{a}', {theirs.get(key)} in '{b}'"
            )
    columns = ["workload", "cell", "label", "budget", "speedup", "speedup_low", "speedup_high"]
    first = summary(one).query("role == 'method'")[columns]
    second = summary(two).query("role == 'method'")[["workload", "cell", "speedup"]]
    both = first.merge(second, on=["workload", "cell"], suffixes=("_a", "_b")).rename(
        columns={"speedup_a": "ratio_a", "speedup_b": "ratio_b", "speedup_low": "low", "speedup_high": "high"}
    )
    both = both.dropna(subset=["ratio_a", "ratio_b", "low", "high"]).reset_index(drop=True)
    if both.empty:
        raise InputError(
            f"'{a}' and '{b}' have no measured cell in common that has an interval: measure the same cells, "
            f"with at least {MIN_ROUNDS} repeats"
        )
    both["inside"] = (both["ratio_b"] >= both["low"]) & (both["ratio_b"] <= both["high"])
    different = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
    return Agreement(both, int(both["inside"].sum()), different)
