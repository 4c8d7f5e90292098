"""What a training writes, and the way to a full checkpoint in the released layout and back.

A result folder holds `scorer.safetensors`, `predictor.safetensors` or `fusion.safetensors` (float32),
`<name>_config.json` with everything that says how it came to be, and a model card. `build("visionselector",
scorer=FOLDER)` takes it. The released layout is the backbone's own checkpoint with
`visual.importance_scorer.{q,k}_proj.{weight,bias}` among its tensors. Token fusion is a part of its backbone: its full
checkpoint is one that `load_backbone` takes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.models.backbones.base import Backbone
from visionselector_eval.models.backbones.llava import Llava
from visionselector_eval.models.backbones.llava_original import is_original
from visionselector_eval.models.backbones.token_fusion import WINDOW, FusedLlava, FusionConfig, TokenFusion
from visionselector_eval.models.dynamic_qwen.predictor import MARK, Predictor, load_predictor
from visionselector_eval.models.loading import (
    DTYPES,
    checkpoint_folder,
    folder_fingerprint,
    load_backbone,
    weight_files,
)
from visionselector_eval.models.visionselector.scorer import Scorer, load_scorer

FORMAT = 1
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Kind:
    """How one kind of learned module is stored.

    Attributes:
        method: the compressor that takes it; empty for a part of the backbone.
        prefix: stands before its tensors in a full checkpoint.
    """

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
    "token-fusion": Kind("fusion", "token-fusion", "", "multi_modal_projector."),
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

    Args:
        module: a `Scorer`, `Predictor` or `TokenFusion`.
        about: goes into the configuration: `backbone` {id, revision, family}, `training` (the spec), `data` {files,
            samples, sha256}, `metrics`, `environment`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in module.state_dict().items()}
    temporary = folder / f".{kind.file}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / kind.file)
    if isinstance(module, TokenFusion):
        sizes: dict[str, Any] = {"width": module.width, "out": module.out, "token_fusion": module.config.as_dict()}
    else:
        sizes = {"width": module.width, "hidden": module.hidden}
    config = {"format": FORMAT, "kind": kind.name, **sizes, "parameters": _count(state), **about}
    write_atomically(folder / "README.md", _card(kind, config))
    write_atomically(folder / kind.config, json.dumps(config, indent=2) + "\n")


def save_whole(folder: Path, backbone: Backbone, kind: Kind, about: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write a trained backbone as a checkpoint, with a configuration and a card as in a result folder.

    Args:
        about: as for `save_learned`, with `parameters`.
        dtype: of the stored weights.
    """
    files = save_backbone(backbone, folder, dtype)
    config = {"format": FORMAT, "kind": kind.name, "dtype": str(dtype).removeprefix("torch."), "files": files, **about}
    write_atomically(folder / "README.md", _card(kind, config))
    write_atomically(folder / kind.config, json.dumps(config, indent=2) + "\n")


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    """Configuration of a result folder; empty where there is none.

    Raises:
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
    head: dict[str, Any] = {"tags": ["visionselector-eval"], "library_name": "visionselector-eval"}
    if backbone.get("family") and "/" in str(backbone.get("id")):
        head["base_model"] = backbone["id"]
    option = f"{kind.name}=FOLDER"
    whose = backbone.get("id", "unknown")
    if kind.method:
        head["tags"].append(kind.method)
        title = f"# A {kind.name} for `{kind.method}`"
        use = (
            f"Use it: `visionselector-eval sweep --pretrained {backbone.get('id', 'BACKBONE')} "
            f"--methods {kind.method}:{option}`, or `build({kind.method!r}, {kind.name}=FOLDER)`."
        )
    elif config.get("files"):
        title = "# LLaVA with trained token fusion"
        use = "Use it: `visionselector-eval sweep --pretrained FOLDER`, or `load_backbone(FOLDER)`."
    else:
        title = "# Token fusion for LLaVA, first stage"
        use = (
            "Go on with it: `visionselector-eval train token-fusion --stage 2 --pretrained FOLDER`; "
            "`visionselector-eval export FOLDER CHECKPOINT` makes a backbone of it as it is."
        )
    beside = "From the backbone" if config.get("files") else "Trained beside the frozen backbone"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        title,
        "",
        f"{beside} `{whose}` (revision "
        f"`{backbone.get('revision', 'unknown')}`); {config['parameters']:,} trained parameters, "
        f"{config.get('dtype', 'float32')}.",
        "",
        use,
        "",
        "## Training",
        "",
        f"{data.get('samples', 'unknown')} samples (sha256 `{data.get('sha256', 'unknown')}`). Settings that are not "
        "the defaults of the training spec, and the last values of its log:",
        "",
        *(f"- {name}: {value}" for name, value in config.get("changed", {}).items()),
        *(f"- {name}: {value:.5g}" for name, value in config.get("metrics", {}).items()),
        "",
        "Limits: it knows the images, sizes and questions that it was trained with; its accuracy is to be measured "
        "with `visionselector-eval sweep` before it is relied on.",
    ]
    return "\n".join(lines) + "\n"


def load_learned(folder: str | Path) -> tuple[Kind, Scorer | Predictor | TokenFusion]:
    """The module of a result folder.

    Raises:
        InputError: no result folder, or damaged weights.
    """
    path = Path(folder)
    kind = kind_of(path) if path.is_dir() else None
    if kind is None:
        names = " or ".join(k.file for k in KINDS.values())
        raise InputError(f"'{folder}' is no result of a training: a folder with {names} is needed")
    loaders: dict[str, Callable[[str], Scorer | Predictor | TokenFusion]] = {
        "scorer": load_scorer,
        "predictor": load_predictor,
        "fusion": load_fusion,
    }
    return kind, loaders[kind.name](str(path))


def load_fusion(source: str) -> TokenFusion:
    """Token fusion from the result folder of a first stage, or out of a checkpoint that has it (folder or hub id).

    Raises:
        InputError: nothing there, no token fusion in it, or damaged.
    """
    kind, path = KINDS["token-fusion"], Path(source).expanduser()
    if (path / kind.file).is_file():
        said = read_config(path, kind)
        tensors = _read(path / kind.file, source)
    else:
        located = checkpoint_folder(source)
        said = {"token_fusion": None, **json.loads((located / "config.json").read_text(encoding="utf-8"))}
        if is_original(said):
            raise InputError(
                f"checkpoint '{source}' is in the original layout: `export` writes it in one to read it from"
            )
        if said["token_fusion"] is None:
            raise InputError(f"checkpoint '{source}' has no token fusion")
        files = weight_files(str(located))
        tensors = {
            name.rpartition(kind.prefix)[2]: tensor
            for file, names in files.items()
            if any(kind.prefix in name for name in names)
            for name, tensor in _read(Path(file), source, kind.prefix).items()
        }
    try:
        first, last = tensors["multi_block.0.weight"], tensors["spatial.2.weight"]
        width = len(tensors["multi_block.2.bias"])
        inner, hidden = len(first), last.shape[1]
        config = FusionConfig(said["token_fusion"]["layers"], inner, hidden, said["token_fusion"].get("window", WINDOW))
        fusion = TokenFusion(config, width, len(last))
        fusion.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"token fusion of '{source}' is damaged ({one_line(error)}): train again or restore it"
        ) from error
    return fusion


def _read(file: Path, source: str, mark: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names contain `mark`."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys() if mark in name}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{source}': {file.name} can't be read ({error}): train again or restore it") from error


def save_backbone(backbone: Backbone, folder: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Write a loaded backbone as a checkpoint of its own, in transformers' layout; the names of its files.

    Args:
        dtype: of the stored weights; as they are by default.
    """
    work = folder / ".saving"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = backbone.model
    state = model.state_dict() if dtype is None else {k: v.to(dtype) for k, v in model.state_dict().items()}
    if not model.generation_config.do_sample:  # settings of sampling that greedy answers do not read can't be saved
        for name in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, name, None)
    model.save_pretrained(work, state_dict=state)
    if dtype is not None:
        path = work / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_atomically(path, json.dumps(config, indent=2) + "\n")
    backbone.processor.save_pretrained(work)
    names = sorted(file.name for file in work.iterdir())
    for name in names:
        os.replace(work / name, folder / name)
    work.rmdir()
    return names


def export_checkpoint(learned: str | Path, output: str | Path, pretrained: str | None = None) -> Path:
    """A full checkpoint: the backbone's files, with the tensors of a trained module among its weights.

    A checkpoint in another layout than transformers' is written in that one.

    Args:
        learned: result folder, or a checkpoint in another layout.
        output: a new or empty folder.
        pretrained: the backbone (folder, hub id or `tiny`); by default the one recorded in the result folder.

    Raises:
        InputError: folders that can't be used, a backbone of another width.
    """
    if (path := Path(learned)).is_dir() and kind_of(path) is None and _is_foreign(path):
        if pretrained:
            raise InputError(f"'{learned}' is a checkpoint, which is only rewritten: leave --pretrained out")
        folder = _new_folder(output)
        save_backbone(load_backbone(learned, dtype=_stored_dtype(path)), folder)
        return folder
    kind, module = load_learned(learned)
    source = pretrained or read_config(Path(learned), kind).get("backbone", {}).get("id")
    if not source:
        raise InputError(f"'{learned}' does not say its backbone: give --pretrained FOLDER_OR_ID")
    if isinstance(module, TokenFusion):
        return _export_fused(learned, module, output, source)
    located = checkpoint_folder(source)
    width = json.loads((located / "config.json").read_text(encoding="utf-8"))
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


def _is_foreign(folder: Path) -> bool:
    """Whether a checkpoint folder is in the original LLaVA code's layout."""
    return (folder / "config.json").is_file() and is_original(_fields(folder))


def _fields(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"config.json of '{folder}' is damaged ({error}): restore it") from error


def _stored_dtype(folder: Path) -> torch.dtype:
    """What config.json says of the weights; float32 where it says nothing."""
    fields = _fields(folder)
    return DTYPES.get(str(fields.get("dtype", fields.get("torch_dtype"))), torch.float32)


def _export_fused(learned: str | Path, fusion: TokenFusion, output: str | Path, source: str) -> Path:
    """A backbone with the fusion of a first stage for a projector; its LLM is as it was."""
    backbone = load_backbone(source, dtype=_stored_dtype(checkpoint_folder(source)))
    if not isinstance(backbone, Llava) or isinstance(backbone.model, FusedLlava):
        raise InputError(f"backbone '{source}' is no plain LLaVA-1.5: token fusion can't be added")
    fusion.fit(backbone.model.config, str(learned))
    folder = _new_folder(output)
    save_backbone(backbone.fused(fusion.to(backbone.model.dtype)), folder)
    return folder


def _is_part(name: str, kind: Kind) -> bool:
    return (MARK if kind.name == "predictor" else "importance_scorer.") in name


def _write_sharded(located: Path, folder: Path, state: Mapping[str, Tensor], replaced: set[str]) -> None:
    """Shards as they are, and one more with the new tensors."""
    index = json.loads((located / _INDEX).read_text(encoding="utf-8"))
    shards: dict[str, str] = index["weight_map"]
    dropped = 0
    for shard in sorted(set(shards.values())):
        old = [name for name in shards if shards[name] == shard and name in replaced]
        if old:
            tensors = load_file(located / shard)
            dropped += sum(tensors.pop(name).nbytes for name in old)
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            continue
        shutil.copyfile(located / shard, folder / shard)
    new = "model-learned.safetensors"
    save_file(dict(state), folder / new, metadata={"format": "pt"})
    shards = {name: shard for name, shard in shards.items() if name not in replaced}
    index["weight_map"] = {**shards, **dict.fromkeys(state, new)}
    meta = index.setdefault("metadata", {})
    if "total_size" in meta:
        meta["total_size"] += sum(t.nbytes for t in state.values()) - dropped
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def extract_learned(checkpoint: str, output: str | Path, kind: Kind) -> Path:
    """A result folder from a full checkpoint (folder, hub id or `tiny`) that holds a trained module.

    Raises:
        InputError: no such checkpoint, or nothing of this kind in it.
    """
    located = checkpoint_folder(checkpoint)
    if kind.name == "scorer":
        module: Scorer | Predictor | TokenFusion = load_scorer(str(located))
    elif kind.name == "fusion":
        module = load_fusion(str(located))
    else:
        if not any(_is_part(name, kind) for names in weight_files(str(located)).values() for name in names):
            raise InputError(f"checkpoint '{checkpoint}' holds no predictor (*.{MARK}*)")
        module = load_predictor(str(located))
    family = json.loads((located / "config.json").read_text(encoding="utf-8")).get("model_type")
    backbone = {"id": checkpoint, "revision": folder_fingerprint(located), "family": family}
    folder = _new_folder(output)
    save_learned(folder, module, kind, {"backbone": backbone, "extracted_from": checkpoint})
    return folder


def _new_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output '{path}' already exists: give a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output '{path}' can't be made: {error.strerror or error}") from error
    return folder
