"""Images of a profile: phases as stacked bars, and speed-up by budget with the ideal line."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from visionselector_eval.baselines.contract.budget import Share, parse_budget
from visionselector_eval.harness.profiler.phases import PHASES
from visionselector_eval.harness.profiler.spec import FULL, LIMIT

_COLOURS = dict(zip(PHASES, ("#bbbbbb", "#4477aa", "#ee6677", "#228833", "#dddddd", "#ccbb44"), strict=True))


def draw(lines: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `phases-<workload>.png` and `speedup-<workload>.png` for every workload that was timed.

    Args:
        lines: from `report.summary`.
    """
    folder.mkdir(exist_ok=True)
    written = []
    for workload, own in lines.groupby("workload", sort=False):
        timed = own[own["rounds"] > 0]
        if timed.empty:
            continue
        for name, make in (("phases", phases), ("speedup", speedups)):
            path = folder / f"{name}-{str(workload).replace('/', '-')}.png"
            make(timed, str(workload)).savefig(path, dpi=120, bbox_inches="tight")
            written.append(path)
    return written


def phases(lines: pd.DataFrame, title: str) -> Figure:
    """A bar for each cell, its phases side by side (medians; they need not sum to the median of the whole)."""
    shown = lines[lines["role"] != LIMIT].iloc[::-1]
    names = [str(r.label) if r.role == FULL else f"{r.label} @ {r.budget}" for r in shown.itertuples()]
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(names)))
    axes = figure.add_subplot()
    left = pd.Series(0.0, index=shown.index)
    for phase in PHASES:
        if phase == "preprocess":
            continue
        widths = shown[f"{phase}_ms"].fillna(0.0)
        axes.barh(names, widths, left=left, label=phase, color=_COLOURS[phase], height=0.75)
        left += widths
    axes.set_xlabel("ms an answer")
    axes.set_title(title)
    axes.margins(y=0.01)
    axes.legend(fontsize="small")
    return figure


def speedups(lines: pd.DataFrame, title: str) -> Figure:
    """Speed-up of the first token by share of visual tokens kept; the dashed line is what no method can beat."""
    figure = Figure(figsize=(8, 5.5))
    axes = figure.add_subplot()
    total = float(lines["visual_before"].max())

    def share(budget: str) -> float:
        parsed = parse_budget(budget)
        return parsed.ratio if isinstance(parsed, Share) else parsed.number / total if total else math.nan

    ideal = lines[lines["role"] == LIMIT]
    points = sorted([(1.0, 1.0), *((share(b), s) for b, s in zip(ideal["budget"], ideal["speedup"], strict=True))])
    axes.plot(*zip(*points, strict=True), "k--", label="ideal", linewidth=1.5)
    methods = lines[lines["role"] == "method"]
    for number, (label, own) in enumerate(methods.groupby("label", sort=False)):
        places = [share(b) for b in own["budget"]]
        low = (own["speedup"] - own["speedup_low"]).clip(lower=0).fillna(0.0)
        high = (own["speedup_high"] - own["speedup"]).clip(lower=0).fillna(0.0)
        style = f"{'osD^vP*X'[number % 8]}-"
        axes.errorbar(
            places,
            own["speedup"],
            yerr=[low, high],
            fmt=style,
            label=str(label),
            markersize=4,
            linewidth=0.8,
            capsize=2,
        )
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xlabel("share of visual tokens kept")
    axes.set_ylabel("speed-up of time to first token")
    axes.set_title(title)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure
