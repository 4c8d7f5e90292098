"""`list`: what can be named in a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.registry import available, compressor_class, options_of
from visionselector_eval.models.backbones import FAMILIES
from visionselector_eval.models.tiny import EMBEDDED
from visionselector_eval.tasks.suites import load_suites


def _compressors() -> str:
    rows = []
    for name in available():
        try:
            kind = compressor_class(name)
            about = (kind.__doc__ or "").strip().split("\n")[0]
            options = ", ".join(f"{key}={p.default!r}" for key, p in options_of(name).items())
            rows.append([name, getattr(kind, "stage", "projector"), about, options])
        except InputError as error:  # a third party's package that can't be imported
            rows.append([name, "-", str(error), ""])
    return "compressors (methods):\n" + tabulate(
        rows, ["name", "stage", "what it does", "options"], maxcolwidths=[None, None, 60, 40]
    )


def _backbones() -> str:
    families = tabulate(
        [
            [family.about, ", ".join(family.model_types), family.model_id, family.protocol, family.pretrained]
            for family in FAMILIES.values()
        ],
        ["family", "config.model_type", "lmms-eval model", "protocol", "for example"],
    )
    embedded = "\n".join(f"  {name}: {entry.about}" for name, entry in EMBEDDED.items())
    return f"backbones (a folder or hub id of these families):\n{families}\nembedded backbones:\n{embedded}"


def _suites() -> str:
    rows = [[name, len(tasks), " ".join(tasks)] for name, tasks in load_suites().suites.items()]
    return "suites:\n" + tabulate(rows, ["name", "tasks", ""], maxcolwidths=[None, None, 90])


def _tasks() -> str:
    rows = [[name, entry.metric, entry.scale, entry.about] for name, entry in load_suites().tasks.items()]
    return "tasks (any other generative lmms-eval task works by its name, too):\n" + tabulate(
        rows, ["name", "metric", "scale", "about"], maxcolwidths=[None, None, None, 60]
    )


def render(what: Sequence[str]) -> str:
    """The lists asked for: compressors, backbones, suites, tasks."""
    makers = {"compressors": _compressors, "backbones": _backbones, "suites": _suites, "tasks": _tasks}
    return "\n\n".join(makers[name]() for name in what)


def headlines(names: Sequence[str]) -> str:
    """The tasks (of those named, else of all of lmms-eval) whose headline metric is a guess, one a line."""
    from visionselector_eval.tasks.headline import guesses

    number, found = guesses(names)
    lines = [f"{task}: {made.note()}" for task, made in found.items()]
    return "\n".join([*lines, f"{len(found)} of {number} tasks have a headline metric that is a guess"])
