"""Load a backbone from a folder or a hub id, with every failure of the checkpoint as one clear line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoProcessor, PretrainedConfig
from transformers.utils import cached_file, is_flash_attn_2_available
from transformers.utils import logging as hf_logging

from visionselector_eval.baselines.contract.errors import InputError, one_line, unknown
from visionselector_eval.models.backbones import FAMILIES, Family, family_of
from visionselector_eval.models.tiny import EMBEDDED, checkpoint, embedded

if TYPE_CHECKING:
    from torch import Tensor

    from visionselector_eval.models.backbones.base import Backbone, Foreign

log = logging.getLogger(__name__)

ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
# Weights of learned methods that a released checkpoint holds beside the backbone's own.
_LEARNED = ("importance_scorer.", "image_score_predictor.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> str:
    """`auto` becomes the first CUDA device where there is one, else the CPU.

    Raises:
        InputError: for a device that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"invalid device '{device}': expected auto, cpu, cuda or cuda:0") from None
    if kind.type == "cuda" and (not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count()):
        raise InputError(
            f"device '{device}' is not here: {torch.cuda.device_count()} CUDA devices found, try device=cpu"
        )
    return device


def choose_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """`auto` becomes bfloat16 on CUDA and float32 on the CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def choose_attention(name: str, device: str, dtype: torch.dtype) -> str:
    """`auto` becomes flash_attention_2 where it is installed and the device is CUDA, else sdpa.

    Raises:
        InputError: unknown name, or flash_attention_2 where it can't run (says what to install).
    """
    if name not in ATTENTION:
        raise unknown("attn_implementation", name, ATTENTION)
    usable = device.startswith("cuda") and dtype != torch.float32 and is_flash_attn_2_available()
    if name == "auto":
        return "flash_attention_2" if usable else "sdpa"
    if name == "flash_attention_2" and not usable:
        if not device.startswith("cuda"):
            why = f"it needs a CUDA device and the device is '{device}'"
        elif dtype == torch.float32:
            why = "it needs dtype bfloat16 or float16"
        else:
            why = "flash-attn is not installed: pip install 'visionselector-eval[flash]'"
        raise InputError(f"attn_implementation=flash_attention_2 can't be used: {why}; or use auto, sdpa or eager")
    return name


@contextmanager
def _readable_failures(source: str, what: str) -> Iterator[None]:
    """Anything that goes wrong while a user's checkpoint is read is about that checkpoint: one line, no traceback."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        log.debug("reading %s failed", source, exc_info=True)
        raise InputError(f"{what} of '{source}' can't be read: {one_line(error)}") from error


def _locate(source: str) -> str:
    """`source` as transformers takes it: an embedded checkpoint's folder, a local folder or a hub id."""
    if source in EMBEDDED:
        return str(checkpoint(source))
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"'{source}' is a folder without config.json: give the folder of a transformers checkpoint"
            )
        return str(path)
    looks_local = source.startswith((".", "~", os.sep)) or source.count("/") > 1 or path.exists()
    if looks_local:
        names = ", ".join(f"'{name}'" for name in EMBEDDED)
        raise InputError(
            f"no checkpoint folder at '{source}': give a folder with config.json, a hub id, or one of {names}"
        )
    return source


class _Fields(PretrainedConfig):
    """The fields of a config.json, uninterpreted."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__.update(raw)


def _config(source: str, located: str, revision: str | None) -> Any:
    """The checkpoint's configuration; only its plain fields where transformers does not know the family's name."""
    try:
        raw = PretrainedConfig.get_config_dict(located, revision=revision)[0]
        if family_of(str(raw.get("model_type"))) and raw["model_type"] not in CONFIG_MAPPING:
            return _Fields(raw)
        return AutoConfig.from_pretrained(located, revision=revision)
    except OSError as error:
        if Path(located).is_dir():
            raise InputError(f"config.json of '{source}' can't be read: {one_line(error)}") from error
        offline = " (offline mode is on: HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"'{source}' is neither a local folder nor a checkpoint that the hub gave{offline}: check the spelling, "
            "your access to it, or download it and give the folder"
        ) from error
    except Exception as error:
        # A family that transformers does not know either is told apart from a broken file.
        family = None
        with suppress(OSError, ValueError):
            family = PretrainedConfig.get_config_dict(located, revision=revision)[0].get("model_type")
        if family is not None:
            _family(source, family)
        raise InputError(f"config.json of '{source}' can't be read: {one_line(error)}") from error


def weight_files(located: str, revision: str | None = None) -> dict[str, list[str]]:
    """File -> names of the tensors in it, as they stand in the file; single or sharded safetensors, local or cached."""

    def find(name: str) -> str | None:
        return cached_file(located, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    if index := find("model.safetensors.index.json"):
        files: dict[str, list[str]] = {}
        for name, file in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, []).append(name)
        return {path: names for file, names in files.items() if (path := find(file)) is not None}
    if single := find("model.safetensors"):
        with safe_open(single, framework="pt") as tensors:
            return {single: list(tensors.keys())}
    return {}


def _is_learned(name: str) -> bool:
    """Whether a tensor of this name is a learned method's."""
    return any(mark in name for mark in _LEARNED)


def _extra_weights(located: str, revision: str | None, unexpected: Iterable[str]) -> dict[str, Tensor]:
    """Tensors that the architecture has no place for, by their name in the file.

    transformers reports them under names of its own layout (`model.visual...`), the file of a released checkpoint has
    the layout of transformers 4 (`visual...`): a name fits where it is the other's tail. `model...` became
    `model.language_model...` on the way: weights of learned methods are known by their own names.
    """
    names = list(unexpected)
    if not names:
        return {}
    extra: dict[str, Tensor] = {}
    for file, keys in weight_files(located, revision).items():
        expected = [
            k
            for k in keys
            if _is_learned(k) or any(u == k or u.endswith("." + k) or k.endswith("." + u) for u in names)
        ]
        if expected:
            with safe_open(file, framework="pt") as tensors:
                extra.update({k: tensors.get_tensor(k) for k in expected})
    return extra


def folder_fingerprint(folder: Path) -> str:
    """Hash that changes when a checkpoint folder does: names, sizes, contents (of large files the ends)."""
    digest = hashlib.sha256()
    for file in sorted(
        f
        for f in folder.rglob("*")
        if f.is_file()
        and f.suffix in {".json", ".safetensors", ".bin", ".jinja", ".txt"}
        and "checkpoints" not in f.relative_to(folder).parts  # of the training that made it: no part of the model
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= 64 << 20:
                digest.update(stream.read())
            else:
                digest.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()[:16]


def checkpoint_revision(source: str, revision: str | None = None) -> str:
    """What names the exact weights of `source`: the hub's commit, or `folder_fingerprint` of a local folder."""
    located = _locate(source)
    config = _config(source, located, revision)
    return getattr(config, "_commit_hash", None) or folder_fingerprint(Path(located))


def checkpoint_folder(source: str, revision: str | None = None) -> Path:
    """A local folder with all files of a checkpoint (folder, hub id or `tiny`), downloaded where need be.

    Raises:
        InputError: no such checkpoint, or the hub does not give it.
    """
    located = _locate(source)
    if not Path(located).is_dir():
        from huggingface_hub import snapshot_download

        with _readable_failures(source, "files"):
            expected = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
            located = snapshot_download(located, revision=revision, allow_patterns=expected)
    return Path(located)


def checkpoint_family(source: str, revision: str | None = None) -> Family:
    """What is known of a checkpoint's kind of model.

    Raises:
        InputError: no such checkpoint, or a family without an adapter (lists what exists).
    """
    return _family(source, _config(source, _locate(source), revision).model_type)


def default_protocol(source: str, revision: str | None = None, model_type: str | None = None) -> str:
    """The protocol of a checkpoint where nothing else is said: for sweep, ask, profile and lmms-eval's command.

    Args:
        model_type: of its configuration, where that is known already.

    Raises:
        InputError: as `checkpoint_family`.
    """
    if known := embedded(source):
        return known.protocol
    return (_family(source, model_type) if model_type else checkpoint_family(source, revision)).protocol


def _family(source: str, model_type: str) -> Family:
    family = family_of(model_type)
    if family is None:
        known = sorted(name for row in FAMILIES.values() for name in row.model_types)
        raise InputError(
            f"checkpoint '{source}' is of family '{model_type}', which has no adapter here: "
            f"available: {', '.join(known)}; docs/new-backbone.md says how to write one"
        )
    return family


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Transformers prints a table of unexpected keys; a scorer beside the backbone is expected, the rest we report."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


def _processor(source: str, located: str, revision: str | None, foreign: Foreign | None, config: Any) -> Any:
    """The processor of a checkpoint, checked against its configuration."""
    with _readable_failures(source, "processor"):
        if foreign is None:
            processor = AutoProcessor.from_pretrained(located, revision=revision)
        else:
            processor = foreign.processor()
        if processor.chat_template is None:
            # Of a template that stands in tokenizer_config.json alone transformers tells the tokenizer only.
            processor.chat_template = processor.tokenizer.chat_template
        # Without its files transformers makes an empty tokenizer up, and every prompt would silently be nonsense.
        if processor.image_token_id != config.image_token_id:
            raise InputError(
                f"tokenizer of '{source}' does not know the checkpoint's image token {config.image_token_id}: "
                "tokenizer.json or tokenizer_config.json is missing or of another model"
            )
    return processor


def load_backbone(
    path_or_hub_id: str | os.PathLike[str],
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "sdpa",
    *,
    revision: str | None = None,
) -> Backbone:
    """Load a multimodal LLM behind its family's adapter.

    Long because each part of a checkpoint has its own refusal, in the order in which they can be told.

    Args:
        path_or_hub_id: folder, hub id, or `tiny` for the embedded checkpoint. A released VisionSelector checkpoint (the
            backbone's state dict with `visual.importance_scorer.*` beside it) loads as it is, as do LLaVA-1.5 and
            LLaVA-STF in the layout of the original code.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`.
        dtype: `float32`, `bfloat16`, `float16`, `auto` (bfloat16 on CUDA, else float32), or a torch dtype.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, or `auto` (flash where installed and on CUDA, else
            sdpa).
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: missing or truncated checkpoint, unknown family, unusable device, dtype or attention; one line each.
    """
    source = os.fspath(path_or_hub_id)
    device = choose_device(device)
    torch_dtype = choose_dtype(dtype, device)
    attention = choose_attention(attn_implementation, device, torch_dtype)
    located = _locate(source)
    config = _config(source, located, revision)
    adapter = _family(source, config.model_type).load_adapter()
    raw = PretrainedConfig.get_config_dict(located, revision=revision)[0]
    foreign = adapter.foreign(source, located, revision, raw, _is_learned)
    commit = getattr(config, "_commit_hash", None)
    with _readable_failures(source, "configuration"):
        config = config if foreign is None else foreign.config
    processor = _processor(source, located, revision, foreign, config)
    extra: dict[str, Tensor] = {}
    with _readable_failures(source, "weights"), _quiet_report():
        where: dict[str, Any] = {"pretrained_model_name_or_path": located, "revision": revision}
        if foreign is not None:
            state, extra = foreign.state()
            where = {"pretrained_model_name_or_path": None, "state_dict": state}
        model, info = adapter.model_class_for(config).from_pretrained(
            **where, config=config, dtype=torch_dtype, attn_implementation=attention, output_loading_info=True
        )
        if foreign is not None:
            model.generation_config = foreign.generation_config()
    if broken := sorted(info["missing_keys"]) or sorted(str(key) for key in info.get("mismatched_keys", ())):
        raise InputError(
            f"weights of '{source}' are incomplete: {len(broken)} tensors missing or of another shape, "
            f"first '{broken[0]}'; download the checkpoint again"
        )
    if foreign is None:
        with _readable_failures(source, "weights"):
            extra = _extra_weights(located, revision, info["unexpected_keys"])
    unplaced = [k for k in extra if not _is_learned(k)] if foreign is None else sorted(info["unexpected_keys"])
    if unplaced:
        log.warning(
            "%s holds %d tensors that its family has no place for, first '%s'", source, len(unplaced), unplaced[0]
        )
    backbone = adapter(
        model.to(device),
        processor,
        id=source,
        revision=commit or folder_fingerprint(Path(located)),
        extra_weights=extra,
    )
    if backbone.processor.chat_template is None:
        raise InputError(
            f"'{source}' has no chat template: expected chat_template.jinja, chat_template.json, or `chat_template` in "
            "tokenizer_config.json"
        )
    return backbone
