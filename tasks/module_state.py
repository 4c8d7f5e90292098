"""Tables that lmms-eval's task modules keep between evaluations: noted at loading, put back before each scoring."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from visionselector_eval.tasks import lmms


def module_state(tasks: Iterable[Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Plain tables (dict, list, set) in the modules of the tasks' scoring functions, with a copy of what they hold now.

    Some upstream modules count in such a table and never clear it (ocrbench), so that a second scoring in one
    process would start from the sums of the first.
    """
    modules: dict[int, dict[str, Any]] = {}
    for task in tasks:
        for function in (task.config.process_results, *task.aggregation().values()):
            module = getattr(function, "__globals__", {})
            if str(module.get("__file__", "")).startswith(str(lmms.lmms_eval().tasks_folder)):
                modules[id(module)] = module
    return [
        (
            module,
            {
                name: copy.deepcopy(value)
                for name, value in module.items()
                if not name.startswith("__") and isinstance(value, dict | list | set) and _plain(value)
            },
        )
        for module in modules.values()
    ]


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(v) for v in value.values())
    if isinstance(value, list | set | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float)


def restore(state: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for module, tables in state:
        for name, saved in tables.items():
            if module.get(name) == saved:
                continue
            current, fresh = module.get(name), copy.deepcopy(saved)
            # In place where possible: other functions of the module hold the same object.
            if isinstance(current, list) and isinstance(fresh, list):
                current[:] = fresh
            elif isinstance(current, dict | set) and type(current) is type(fresh):
                current.clear()
                current.update(fresh)
            else:
                module[name] = fresh
