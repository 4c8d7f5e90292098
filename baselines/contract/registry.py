"""Names of compressors, and how to build one from a name and options.

Built-in methods stand in `BUILTIN`, one line each. A third party's package appears here by an entry point in the group
`visionselector_eval.compressors` (name -> "module:Class"); nothing in this repository has to change for it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from visionselector_eval.baselines.contract.errors import InputError, unknown

if TYPE_CHECKING:
    from visionselector_eval.baselines.contract.base import Compressor

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "visionselector_eval.compressors"
_OF_CHAIN = ("split", "upstream_exact")  # options of a combination itself

_HERE = "visionselector_eval.baselines"
BUILTIN: dict[str, str] = {
    "full": f"{_HERE}.full:Full",
    "random": f"{_HERE}.random:Random",
    "uniform": f"{_HERE}.uniform:Uniform",
    "downsample": f"{_HERE}.downsample:Downsample",
    "divprune": f"{_HERE}.divprune:DivPrune",
    "visionzip": f"{_HERE}.visionzip:VisionZip",
    "prumerge_plus": f"{_HERE}.prumerge_plus:PruMergePlus",
    "holov": f"{_HERE}.holov:HoloV",
    "cdpruner": f"{_HERE}.cdpruner:CDPruner",
    "vispruner": f"{_HERE}.vispruner:VisPruner",
    "id_selection": f"{_HERE}.id_selection:IDSelection",
    "tome": f"{_HERE}.tome:ToMe",
    "fusion2x2": f"{_HERE}.fusion2x2:Fusion2x2",
    "pooling": f"{_HERE}.pooling:Pooling",
    "fastv": f"{_HERE}.fastv:FastV",
    "dart": f"{_HERE}.dart:DART",
    "sparsevlm": f"{_HERE}.sparsevlm:SparseVLM",
    "pyramiddrop": f"{_HERE}.pyramiddrop:PyramidDrop",
    "dynamic_qwen": "visionselector_eval.models.dynamic_qwen.compressor:DynamicQwen",
    "visionselector": "visionselector_eval.models.visionselector.compressor:VisionSelector",
    "idpruner": "visionselector_eval.models.visionselector.idpruner:IDPruner",
}


def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in BUILTIN:
            log.warning("%s:%s is ignored: a built-in compressor has that name", ENTRY_POINT_GROUP, point.name)
        else:
            found[point.name] = point
    return found


def available() -> list[str]:
    """Sorted names of all compressors, third-party ones included. Imports none of them."""
    return sorted({*BUILTIN, *_third_party()})


@cache
def compressor_class(name: str) -> type:
    """The class registered under `name`.

    Raises:
        InputError: for an unknown name (with the nearest existing one), or a third-party entry that cannot be imported.
    """
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(import_module(module), attribute)
    third_party = _third_party()
    if name not in third_party:
        raise unknown("method", name, available())
    try:
        return third_party[name].load()
    except Exception as error:
        raise InputError(
            f"method '{name}' of entry point '{third_party[name].value}' cannot be imported: {error!r}"
        ) from error


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that `build(name, ...)` takes, by name; those of a part of `A+B` as `A.option`."""
    if parts := chained(name):
        shared = {key: p for key, p in options_of_class(_chain().BeforeLLM).items() if key in _OF_CHAIN}
        own = {f"{part}.{key}": p for part in parts for key, p in options_of(part).items() if key not in _OF_CHAIN}
        return {**shared, **own}
    return options_of_class(compressor_class(name))


def chained(name: str) -> tuple[str, ...]:
    """The two methods of a combination `A+B`; nothing for a plain name.

    Raises:
        InputError: where it is neither one name nor two different ones.
    """
    if "+" not in name:
        return ()
    parts = tuple(part.strip() for part in name.split("+"))
    if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
        raise InputError(f"invalid method '{name}': expected one name, or two different ones such as divprune+fastv")
    return parts


def _chain() -> Any:
    return import_module(".chain", __package__)


def options_of_class(kind: type) -> dict[str, inspect.Parameter]:
    """The keyword options of a compressor's class."""
    parameters = inspect.signature(kind).parameters
    return {
        key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and key != "self"
    }


def resolve_options(name: str, options: Mapping[str, Any], backbone: str | None = None) -> dict[str, Any]:
    """`options` checked against the method's own, completed with the defaults (`backbone`'s own first, where given).

    Raises:
        InputError: unknown method, unknown option (names the near match), missing option, or a value of another type.
    """
    known = options_of(name)
    if backbone is not None:
        options = {**_defaults_for(name, backbone), **options}
    for key in options:
        if key not in known:
            raise unknown(f"option of method {name}", key, known)
    resolved: dict[str, Any] = {}
    for key, parameter in known.items():
        default = parameter.default
        if key in options:
            resolved[key] = _checked(name, key, options[key], default)
        elif default is inspect.Parameter.empty:
            raise InputError(f"method '{name}' needs its option '{key}': give {key}=VALUE")
        else:
            resolved[key] = default
    return resolved


def _defaults_for(name: str, backbone: str) -> dict[str, Any]:
    if parts := chained(name):
        return {f"{part}.{key}": value for part in parts for key, value in _defaults_for(part, backbone).items()}
    own = getattr(compressor_class(name), "defaults_for", None)
    return dict(own(backbone)) if callable(own) else {}


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """`value` where it has the default's type; int becomes float where the default is a float."""
    if default is None or default is inspect.Parameter.empty:
        return value
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif isinstance(default, int):
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, str):
        fits = isinstance(value, str)
    else:
        fits = True
    if not fits:
        raise InputError(
            f"option {key}={value!r} of method '{name}' has the wrong type: give a {type(default).__name__}, "
            f"for example {key}={default!r}"
        )
    return value


def build(name: str, **options: Any) -> Compressor:
    """Build a compressor by name: `build("divprune", upstream_exact=True)`.

    `build("visionselector+fastv", split=0.5, **{"fastv.layer": 3})` is two in a row with one budget (`chain.py`);
    `upstream_exact` then goes to both.

    Raises:
        InputError: unknown method or option (the message names the near match), or an option's value that cannot be
            used.
    """
    from visionselector_eval.baselines.contract.base import (
        checked_compressor,  # brings torch, which names alone do not need
    )

    resolved = resolve_options(name, options)
    if parts := chained(name):
        made = []
        for part in parts:
            own = {key: resolved.get(f"{part}.{key}", resolved.get(key)) for key in options_of(part)}
            made.append(build(part, **own))
        return _chain().chain(*made, resolved["split"])
    return checked_compressor(compressor_class(name)(**resolved))
