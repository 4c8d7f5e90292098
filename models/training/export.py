"""What a training writes, and the way to a full checkpoint in the released layout and back.

A result folder holds `scorer.safetensors` or `predictor.safetensors` (float32), `<name>_config.json` with everything
that says how it came to be, and a model card. `build("visionselector", scorer=FOLDER)` takes it. The released layout is
the backbone's own checkpoint with `visual.importance_scorer.{q,k}_proj.{weight,bias}` among its tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionselector_eval.baselines.errors import InputError
from visionselector_eval.models.dynamic_qwen.predictor import MARK, Predictor, load_predictor
from visionselector_eval.models.loading import checkpoint_folder, folder_fingerprint, weight_files
from visionselector_eval.models.visionselector.scorer import Scorer, load_scorer

FORMAT = 1
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Kind:
    """How one kind of learned module is stored. `prefix` stands before its tensors in a full checkpoint."""

    name: str
    training: str
    method: str
    prefix: str

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def config(self) -> str:
        return f"{self.name}_config.json"


KINDS = {
    "visionselector": Kind("scorer", "visionselector", "visionselector", "visual.importance_scorer."),
    "dynamic-qwen": Kind("predictor", "dynamic-qwen", "dynamic_qwen", f"model.{MARK}"),
}


def kind_of(folder: Path) -> Kind | None:
    """The kind of module that a result folder holds; None for another folder."""
    return next((kind for kind in KINDS.values() if (folder / kind.file).is_file()), None)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_learned(folder: Path, module: nn.Module, kind: Kind, about: Mapping[str, Any]) -> None:
    """Write a result folder; the configuration comes last and by rename: it is the completion record.

    Parameters
    ----------
    module: a `Scorer` or `Predictor`. about: goes into the configuration: `backbone` {id, revision, family}, `training`
        (the spec), `data` {files, samples, sha256}, `metrics`, `environment`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in module.state_dict().items()}
    temporary = folder / f".{kind.file}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / kind.file)
    sizes = {"width": module.width, "hidden": module.hidden, "parameters": sum(t.numel() for t in state.values())}
    config = {"format": FORMAT, "kind": kind.name, **sizes, **about}
    write_atomically(folder / "README.md", _card(kind, config))
    write_atomically(folder / kind.config, json.dumps(config, indent=2) + "\n")


def read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    """Configuration of a result folder; empty where there is none.

    Raises
    ------
    InputError: damaged.
    """
    path = folder / kind.config
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): train again or restore it") from error


def _card(kind: Kind, config: Mapping[str, Any]) -> str:
    backbone, data = config.get("backbone", {}), config.get("data", {})
    head: dict[str, Any] = {"tags": ["visionselector-eval", kind.method], "library_name": "visionselector-eval"}
    if backbone.get("family") and "/" in str(backbone.get("id")):
        head["base_model"] = backbone["id"]
    option = f"{kind.name}=FOLDER"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# A {kind.name} for `{kind.method}`",
        "",
        f"Trained beside the frozen backbone `{backbone.get('id', 'unknown')}` (revision "
        f"`{backbone.get('revision', 'unknown')}`); {config['parameters']:,} parameters, float32.",
        "",
        f"Use it: `visionselector-eval sweep --pretrained {backbone.get('id', 'BACKBONE')} "
        f"--methods {kind.method}:{option}`, or `build({kind.method!r}, {kind.name}=FOLDER)`.",
        "",
        "## Training",
        "",
        f"{data.get('samples', 'unknown')} samples (sha256 `{data.get('sha256', 'unknown')}`). Settings that are not "
        "the defaults of the training spec, and the last values of its log:",
        "",
        *(f"- {name}: {value}" for name, value in config.get("changed", {}).items()),
        *(f"- {name}: {value:.5g}" for name, value in config.get("metrics", {}).items()),
        "",
        "Limits: it knows the pictures, sizes and questions that it was trained with; its accuracy is to be measured "
        "with `visionselector-eval sweep` before it is relied on.",
    ]
    return "\n".join(lines) + "\n"


def load_learned(folder: str | Path) -> tuple[Kind, Scorer | Predictor]:
    """The module of a result folder.

    Raises
    ------
    InputError: no result folder, or damaged weights.
    """
    path = Path(folder)
    kind = kind_of(path) if path.is_dir() else None
    if kind is None:
        names = " or ".join(k.file for k in KINDS.values())
        raise InputError(f"'{folder}' is no result of a training: a folder with {names} is needed")
    return kind, load_scorer(str(path)) if kind.name == "scorer" else load_predictor(str(path))


def export_checkpoint(learned: str | Path, output: str | Path, pretrained: str | None = None) -> Path:
    """A full checkpoint: the backbone's files, with the tensors of a trained module among its weights.

    Parameters
    ----------
    learned: result folder. output: a new or empty folder.
    pretrained: the backbone (folder, hub id or `tiny`); by default the one recorded in the result folder.

    Raises
    ------
    InputError: folders that can't be used, a backbone of another width.
    """
    kind, module = load_learned(learned)
    source = pretrained or read_config(Path(learned), kind).get("backbone", {}).get("id")
    if not source:
        raise InputError(f"'{learned}' does not say its backbone: give --pretrained FOLDER_OR_ID")
    located = checkpoint_folder(source)
    width = json.loads((located / "config.json").read_text())
    width = width.get("text_config", width).get("hidden_size")
    if width != module.width:
        raise InputError(f"{kind.name} '{learned}' has width {module.width} but backbone {source} has {width}")
    folder = _new_folder(output)
    state = {f"{kind.prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    own = weight_files(str(located))
    for file in sorted(located.iterdir()):
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".pth") and file.name != _INDEX:
            shutil.copyfile(file, folder / file.name)
    marks = {name for names in own.values() for name in names if _is_part(name, kind)}
    if (located / _INDEX).is_file():
        _write_sharded(located, folder, state, marks)
    else:
        tensors = {name: t for name, t in load_file(located / _SINGLE).items() if name not in marks}
        save_file({**tensors, **state}, folder / _SINGLE, metadata={"format": "pt"})
    return folder


def _is_part(name: str, kind: Kind) -> bool:
    return (MARK if kind.name == "predictor" else "importance_scorer.") in name


def _write_sharded(located: Path, folder: Path, state: Mapping[str, Tensor], replaced: set[str]) -> None:
    """Shards as they are, and one more with the new tensors."""
    index = json.loads((located / _INDEX).read_text())
    places: dict[str, str] = index["weight_map"]
    dropped = 0
    for shard in sorted(set(places.values())):
        old = [name for name in places if places[name] == shard and name in replaced]
        if old:
            tensors = load_file(located / shard)
            dropped += sum(tensors.pop(name).nbytes for name in old)
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            continue
        shutil.copyfile(located / shard, folder / shard)
    new = "model-learned.safetensors"
    save_file(dict(state), folder / new, metadata={"format": "pt"})
    places = {name: shard for name, shard in places.items() if name not in replaced}
    index["weight_map"] = {**places, **dict.fromkeys(state, new)}
    meta = index.setdefault("metadata", {})
    if "total_size" in meta:
        meta["total_size"] += sum(t.nbytes for t in state.values()) - dropped
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def extract_learned(checkpoint: str, output: str | Path, kind: Kind) -> Path:
    """A result folder from a full checkpoint (folder, hub id or `tiny`) that holds a trained module.

    Raises
    ------
    InputError: no such checkpoint, or nothing of this kind in it.
    """
    located = checkpoint_folder(checkpoint)
    if kind.name == "scorer":
        module: Scorer | Predictor = load_scorer(str(located))
    else:
        if not any(_is_part(name, kind) for names in weight_files(str(located)).values() for name in names):
            raise InputError(f"checkpoint '{checkpoint}' holds no predictor (*.{MARK}*)")
        module = load_predictor(str(located))
    family = json.loads((located / "config.json").read_text()).get("model_type")
    backbone = {"id": checkpoint, "revision": folder_fingerprint(located), "family": family}
    folder = _new_folder(output)
    save_learned(folder, module, kind, {"backbone": backbone, "extracted_from": checkpoint})
    return folder


def _new_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output '{path}' is there already: give a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output '{path}' can't be made: {error.strerror or error}") from error
    return folder
