"""Write the parts of the documents that come from the code: `make docs`.

With `--check` nothing is written; pages that are out of date are named, and the exit code is 1. A generated part stands
between two comments of its page, `<!-- NAME: written by make docs -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from visionselector_eval.baselines.contract.registry import BUILTIN, compressor_class
from visionselector_eval.harness.cli.flags import default_text
from visionselector_eval.harness.sweep.spec import SweepSpec
from visionselector_eval.models.training.spec import SPECS
from visionselector_eval.tasks import suites
from visionselector_eval.tasks.local import upstream
from visionselector_eval.tasks.tiny import MIRRORS, Document, gallery

DOCS = Path(__file__).resolve().parent


def row(*cells: str) -> str:
    """A row of a table in Markdown; a bar within a cell does not end it."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)]) + "\n"


def sweep_fields() -> str:
    """The fields of a sweep."""
    rows = []
    for name, info in SweepSpec.model_fields.items():
        default = default_text(info)
        rows.append((f"`{name}`", f"`{default}`" if default else "", info.description or ""))
    return table(("field", "default", "what it is"), rows)


def training_settings() -> str:
    """The fields of the trainings."""
    rows = []
    for name in dict.fromkeys(name for spec in SPECS.values() for name in spec.model_fields):
        owners = [spec.model_fields.get(name) for spec in SPECS.values()]
        texts = list(dict.fromkeys(info.description or "" for info in owners if info))
        defaults = ["-" if info is None else default_text(info) for info in owners]
        values = [f"`{text}`" if text not in ("", "-") else text for text in defaults]
        rows.append((f"`{name}`", *values, " / ".join(texts)))
    return table(("field", *SPECS, "what it is"), rows)


def methods() -> str:
    """The registry as a table of all compressors and a section for each, from their docstrings and options."""
    rows, sections = [], []
    for name in sorted(BUILTIN):
        method: Any = compressor_class(name)
        options = [f for f in dataclasses.fields(method) if f.name != "upstream_exact"]
        needs = ", ".join(sorted(method.needs)) or ("hidden states" if method.stage == "decoder" else "features")
        paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", method.paper)
        trained = "yes" if method.trained else "no"
        rows.append((f"[{name}](#{name})", method.stage, needs, trained, paper, method.deviations, method.cost))
        lines = [f"- `{f.name}` (default `{f.default!r}`): {f.metadata['help']}" for f in options]
        about = inspect.getdoc(method) or ""
        sections.append("\n".join([f"## {name}", "", about, *(["", "Options:", "", *lines] if lines else [])]))
    head = ("method", "stage", "needs", "trained", "paper", "deviations from it", "cost")
    return table(head, rows) + "\n" + "\n\n".join(sections) + "\n\n"


def tasks() -> str:
    """The real tasks of suites.yaml."""
    rows = []
    for name, entry in suites.load_suites().tasks.items():
        if entry.mirror_of is None:
            largest = "-" if entry.scale is None else f"{entry.scale:g}"
            columns = " ".join(f"`{c}`" for c in upstream.members(name)[0].columns) or "-"
            rows.append((f"`{name}`", entry.about, f"`{entry.key}`", largest, entry.published, columns))
    return table(("task", "about", "headline", "largest", "papers report", "columns"), rows)


def embedded_benchmarks() -> str:
    """Each embedded benchmark with its image, and what is asked about it."""
    parts = []
    for name in MIRRORS:
        about = suites.entry(name).about
        asked = [f"{_question(d)} `{d.answer}`" for d in gallery.shown(name)]
        numbered = "".join(f"{i + 1}. {text}\n" for i, text in enumerate(asked))
        image = f"![{name}](images/benchmarks/{name}.png)"
        parts.append(f"### {name}\n\n{about[0].upper()}{about[1:]}.\n\n{image}\n\n{numbered}")
    return "\n".join(parts)


def _question(document: Document) -> str:
    values: dict[str, Any] = document.row
    question = re.sub(r"<(image \d)>", r"\\<\1>", values["question"])
    choices = values.get("choices") or values.get("candidates") or values.get("options") or []
    if isinstance(choices, str):  # MMMU's are a list in text
        choices = json.loads(choices.replace("'", '"'))
    for keys in ("ABCD", ["choice_a", "choice_b", "choice_c", "choice_d"], ["a0", "a1", "a2", "a3", "a4"]):
        choices = choices or [values[k] for k in keys if k in values]
    listed = [c if re.match(r"[A-E]\. ", c) else f"{'ABCDE'[i]}. {c}" for i, c in enumerate(choices)]
    return f"{question} ({'; '.join(listed)})" if listed else question


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "fields": ("sweep.md", sweep_fields),
    "settings": ("training.md", training_settings),
    "methods": ("methods.md", methods),
    "tasks": ("benchmarks.md", tasks),
    "gallery": ("benchmarks.md", embedded_benchmarks),
}
"""The generated parts: the page that each stands in, and what writes it."""


def rebuilt(part: str, text: str) -> str:
    """A page with one of its parts written from the code."""
    start, end = f"<!-- {part}: written by make docs -->\n", f"<!-- end of {part} -->"
    before, _, rest = text.partition(start)
    return before + start + PARTS[part][1]() + end + rest.partition(end)[2]


def out_of_date() -> list[str]:
    """The parts that are not what the code says."""
    pages = {part: (DOCS / page).read_text(encoding="utf-8") for part, (page, _) in PARTS.items()}
    return [part for part, text in pages.items() if rebuilt(part, text) != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this file; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the parts of the documents that come from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a part is out of date")
    chosen = parser.parse_args(arguments)
    stale = out_of_date()
    for part in stale:
        page = DOCS / PARTS[part][0]
        if not chosen.check:
            page.write_text(rebuilt(part, page.read_text(encoding="utf-8")), encoding="utf-8")
        sys.stdout.write(f"docs/{page.name}: {part} {'is out of date: run make docs' if chosen.check else 'written'}\n")
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
