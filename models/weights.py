"""Tensors of learned modules, found by their names in the files of a folder or of a hub repository."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.errors import InputError, one_line

log = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".bin")
"""Of files that hold weights: safetensors, and torch's own, of which nothing but tensors is read."""
_INDEX = ".index.json"
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)((?:/[\w-][\w.-]*)*)")


def hub_parts(source: str) -> tuple[str, str] | None:
    """("owner/name", "sub/folder") of a hub id with or without a folder in the repository; None for anything else."""
    match = _HUB_ID.fullmatch(source)
    return (match[1], match[2].lstrip("/")) if match else None


@dataclass(frozen=True)
class _Place:
    """File names of one folder, and how each becomes a local file."""

    names: list[str]
    fetch: Callable[[str], Path]
    remote: bool


def find_tensors(source: str, wanted: Callable[[Iterable[str]], list[str]], own: str, what: str) -> dict[str, Tensor]:
    """The tensors of a learned module, from a file, a folder or the Hugging Face hub, and from there only these.

    In a folder all `*.safetensors` and `*.bin` are looked through, whatever their names; of shards with an index only
    those that it names. On the hub torch's files are fetched only where no safetensors file has the tensors.

    Long because the kinds of places are searched in one order.

    Args:
        source: a file, a folder, or a hub id `owner/name`, also with a folder of the repository behind it.
        wanted: of the tensor names of one file (or index) those that belong to the module.
        own: the file that our own trainings write: where it is, nothing else is read.
        what: what to call the module.

    Raises:
        InputError: nothing there, no such tensor, a damaged file, or a tensor that two files hold with different
            values.
    """
    path = Path(source).expanduser()
    found: dict[str, tuple[str, Tensor]] = {}
    seen: dict[str, list[str]] = {}
    unreadable: dict[str, str] = {}

    def take(place: _Place, file: str) -> None:
        """Read the wanted tensors of one file."""
        with _readable(f"{what} '{source}'", file):
            names, tensor_of = _opened(place.fetch(file))
            seen[file] = names
            for name in wanted(names):
                tensor = tensor_of(name)
                earlier, same = found.setdefault(name, (file, tensor))
                if not _equal(same, tensor):
                    raise InputError(
                        f"{what} '{source}' is ambiguous: {name} has other values in {file} than in {earlier}: "
                        "give the file of one of them"
                    )

    if path.is_file():
        take(_Place([path.name], lambda _: path, False), path.name)
        return _result(found, seen, unreadable, source, what)
    place = _listing(path, source, what)
    if own in place.names:
        take(place, own)
        return _result(found, seen, unreadable, source, what)
    if not any(name.removesuffix(_INDEX).endswith(ENDINGS) for name in place.names):
        kept = ", ".join(place.names[:6]) or "nothing"
        raise InputError(f"{what} folder '{source}' holds no {' or '.join(ENDINGS)} file (found {kept})")
    for ending in ENDINGS:
        if place.remote and found:
            break
        covered: set[str] = set()
        for index in [name for name in place.names if name.endswith(ending + _INDEX)]:
            weight_map = _weight_map(place.fetch(index), source)
            covered.update(weight_map.values())
            seen[index] = list(weight_map)
            for shard in sorted({weight_map[name] for name in wanted(weight_map)}):
                take(place, shard)
        for file in [name for name in place.names if name.endswith(ending) and name not in covered]:
            try:
                take(place, file)
            except _NoTensors as error:  # a trainer's arguments, say
                unreadable[file] = str(error)
                log.debug("%s of %s holds more than tensors", file, source)
    return _result(found, seen, unreadable, source, what)


def _result(
    found: Mapping[str, tuple[str, Tensor]],
    seen: Mapping[str, list[str]],
    unreadable: Mapping[str, str],
    source: str,
    what: str,
) -> dict[str, Tensor]:
    if not found:
        if unreadable and not seen:
            raise InputError(next(iter(unreadable.values())))
        names = list(dict.fromkeys(name for listed in seen.values() for name in listed))
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") or "no tensors"
        raise InputError(f"{what} '{source}' holds no {what}: found {shown} in {', '.join([*seen, *unreadable][:4])}")
    return {name: tensor for name, (_, tensor) in found.items()}


class _NoTensors(InputError):
    """A file of torch's that holds something else than tensors, or is damaged."""


@contextmanager
def _readable(whose: str, file: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"{whose}: cannot read {file} ({one_line(error)}): fetch it again") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise _NoTensors(f"{whose}: {file} can't be read as tensors alone ({one_line(error)})") from error


def _opened(file: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Names of a file's tensors, and how one of them is read."""
    from safetensors import safe_open

    if file.suffix == ".safetensors":

        def read(name: str) -> Tensor:
            with safe_open(file, framework="pt", device="cpu") as opened:
                return opened.get_tensor(name)

        with safe_open(file, framework="pt", device="cpu") as opened:
            return list(opened.keys()), read
    held = _unpickled(file)
    if not isinstance(held, Mapping):
        raise ValueError(f"it holds a {type(held).__name__}, not named tensors")
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    return list(tensors), tensors.__getitem__


def _unpickled(file: Path) -> Any:
    """What torch stored, tensors and plain containers alone; from the disk as it is asked for, where it can be."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # written before torch 1.6: such a file is read whole
        return torch.load(file, map_location="cpu", weights_only=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two copies hold the same values; NaN equals itself."""
    if one.shape != other.shape:
        return False
    return bool(torch.allclose(one.double(), other.double(), rtol=0.0, atol=0.0, equal_nan=True))


def _weight_map(index: Path, source: str) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{source}: {index.name} is damaged ({one_line(error)}): fetch the checkpoint again"
        ) from error


def _listing(path: Path, source: str, what: str) -> _Place:
    """The files of a local folder, or of a repository's folder on the hub (its cached part while offline)."""
    if path.is_dir():
        return _Place(sorted(f.name for f in path.iterdir() if f.is_file()), lambda name: path / name, False)
    parts = hub_parts(source)
    if parts is None:
        raise InputError(
            f"{what} '{source}' does not exist: give a .safetensors or .bin file, a folder that holds one, or a hub id "
            "OWNER/NAME"
        )
    import huggingface_hub as hub

    repository, folder = parts
    start = f"{folder}/" if folder else ""
    try:
        listed = hub.list_repo_files(repository)
    except Exception as error:  # the hub client raises what its HTTP library raises; a user gets one line
        try:
            local = Path(hub.snapshot_download(repository, local_files_only=True)) / folder
        except Exception:
            raise InputError(
                f"{what} '{source}' is no local file or folder, and the hub gives none of that id "
                f"({one_line(error)}): check the id and the connection, or give a local folder"
            ) from error
        return _listing(local, str(local), what) if local.is_dir() else _Place([], lambda name: local / name, False)
    names = sorted(name.removeprefix(start) for name in listed if name.startswith(start))

    def fetch(name: str) -> Path:
        try:
            return Path(hub.hf_hub_download(repository, start + name))
        except Exception as error:
            raise InputError(f"{what} '{source}': the hub does not give {name} ({one_line(error)})") from error

    return _Place([name for name in names if "/" not in name], fetch, True)
