"""The trained scorer of VisionSelector, and where its weights are found (arXiv 2510.16598)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from visionselector_eval.baselines.base import InputError

__all__ = ["Scorer", "load_scorer"]

_PARTS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
_MARK = "importance_scorer."
_ROWS = {"cpu": 128, "cuda": 4096}  # tokens scored together
_FILE = "scorer.safetensors"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Scorer(nn.Module):
    """Scores each visual token by its mean scaled product with all tokens of its scope.

    With q and k the two projections, `s_i = mean_j q(V_i) . k(V_j) / sqrt(hidden)`. Upstream forms the N x N
    matrix; here the mean is moved inside, which is the same number in O(N D + D h): `s_i = (V_i . Wq'kbar +
    bq . kbar) / sqrt(h)` with `kbar = k(mean_j V_j)`. Source: VisionSelector, arXiv 2510.16598.

    Parameters
    ----------
    width: D, the size of a visual token.
    hidden: h, the size of the projections; half the width where not given, as in the released checkpoints.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.hidden = max(1, width // 2) if hidden is None else hidden
        if self.width < 1 or self.hidden < 1:
            raise InputError(f"Scorer(width={width}, hidden={hidden}): give sizes of at least 1")
        self.q_proj = nn.Linear(self.width, self.hidden)
        self.k_proj = nn.Linear(self.width, self.hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start of training: weights N(0, 1e-4^2) and biases 0, so that every score is about 0."""
        for projection in (self.q_proj, self.k_proj):
            nn.init.normal_(projection.weight, std=1e-4)
            nn.init.zeros_(projection.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Score the tokens of one scope.

        Parameters
        ----------
        features: (N, D) any float dtype, on the parameters' device.

        Returns
        -------
        (N,) float64 where the features or the parameters are float64, else float32 (also under autocast).

        Raises
        ------
        InputError: features of another shape.
        """
        if features.dim() != 2 or features.shape[1] != self.width:
            raise InputError(f"this scorer takes features of shape (N, {self.width}), got {tuple(features.shape)}")
        double = torch.float64 in (features.dtype, self.q_proj.weight.dtype)
        dtype = torch.float64 if double else torch.float32
        with torch.autocast(features.device.type, enabled=False):
            wq, bq, wk, bk = (
                p.to(dtype) for p in (self.q_proj.weight, self.q_proj.bias, self.k_proj.weight, self.k_proj.bias)
            )
            rows = features.split(_ROWS["cuda" if features.is_cuda else "cpu"])
            # By blocks of rows, which a CPU sums with all its cores and in its cache.
            mean = torch.stack([part.sum(dim=0, dtype=dtype) for part in rows]).sum(dim=0) / features.shape[0]
            mean_key = linear(mean, wk, bk)
            scores = (_row_products(rows, mean_key @ wq) + bq @ mean_key) / math.sqrt(self.hidden)
        return scores

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], source: str = "scorer") -> Scorer:
        """A scorer from its four tensors, its sizes read from their shapes.

        Parameters
        ----------
        state: holds `{q,k}_proj.{weight,bias}`, by these names or behind a prefix ending in
            `importance_scorer.`; other tensors of a checkpoint may stand beside them.
        source: what to call the weights in an error.

        Returns
        -------
        A scorer in evaluation mode whose parameters are float32 (float64 for float64) copies without
        gradient.

        Raises
        ------
        InputError: tensors that are missing, do not fit each other, or that this scorer has no place for.
        """
        names = scorer_keys(state, source)
        if names is None:
            raise InputError(f"{source} holds no scorer: it needs {', '.join(_PARTS)} (or *.{_MARK}...)")
        tensors = {part: state[name] for part, name in names.items()}
        weight = tensors["q_proj.weight"]
        if weight.dim() != 2:
            raise InputError(f"{source}: q_proj.weight has shape {tuple(weight.shape)}, a scorer needs (hidden, width)")
        hidden, width = weight.shape
        for part, tensor in tensors.items():
            expected = (hidden, width) if part.endswith("weight") else (hidden,)
            if tuple(tensor.shape) != expected:
                raise InputError(
                    f"{source}: {part} has shape {tuple(tensor.shape)}, but q_proj.weight "
                    f"{tuple(weight.shape)} asks for {expected}"
                )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            scorer = cls(width, hidden)
        copies = {part: tensor.detach().to(dtype=dtype, copy=True) for part, tensor in tensors.items()}
        scorer.load_state_dict(copies, assign=True)
        return scorer.eval().requires_grad_(False)


def _row_products(rows: Sequence[Tensor], direction: Tensor) -> Tensor:
    """(N,) products of each row of the blocks (n, D) with `direction`, (D,), in its dtype.

    Not a matrix product: that sums a row in an order that depends on the row's place, so that equal tokens (repeated
    video frames) would get scores a rounding apart and their tie would fall anywhere.
    """
    if direction.requires_grad or rows[0].requires_grad:
        return torch.cat([(part * direction).sum(dim=1) for part in rows])
    # One buffer that stays in a CPU's cache: a fresh one for each block would cost more than the sums.
    buffer = direction.new_empty(rows[0].shape)
    return torch.cat([torch.mul(part, direction, out=buffer[: len(part)]).sum(dim=1) for part in rows])


def scorer_keys(names: Iterable[str], source: str = "scorer") -> dict[str, str] | None:
    """Names of a scorer's tensors in a checkpoint by part (`q_proj.weight`, ...); None where there are none.

    Raises
    ------
    InputError: a scorer with parts missing, with parts this scorer has no place for, or under two prefixes.
    """
    listed = list(names)
    found: dict[str, dict[str, str]] = {}
    for name in listed:
        prefix, mark, part = name.rpartition(_MARK)
        if mark:
            found.setdefault(prefix + mark, {})[part] = name
    if not found and any(part in listed for part in _PARTS):
        found[""] = {part: part for part in _PARTS if part in listed}
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{source} holds several scorers ({', '.join(sorted(found))}): give a file with one of them")
    ((prefix, parts),) = found.items()
    if missing := [part for part in _PARTS if part not in parts]:
        raise InputError(f"{source}: scorer tensor {prefix}{missing[0]} is missing (it needs {', '.join(_PARTS)})")
    # A norm before the projections, say, would change every score: better refused than left out.
    if surplus := sorted(set(parts) - set(_PARTS)):
        raise InputError(f"{source}: scorer tensor {prefix}{surplus[0]} is unknown (it takes {', '.join(_PARTS)})")
    return parts


def load_scorer(source: str) -> Scorer:
    """Read a scorer from a file, a folder or the Hugging Face hub, and from there only its own four tensors.

    Parameters
    ----------
    source: a `.safetensors` file; a folder with `scorer.safetensors` or with a checkpoint (one file, or
        shards with `model.safetensors.index.json`) that has `*.importance_scorer.*`; or a hub id `owner/name`
        of such a folder.

    Raises
    ------
    InputError: nothing there, no scorer in it, a damaged file, or a hub that cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Scorer.from_state(_read_tensors([path], source), source)
    if path.is_dir():
        return Scorer.from_state(_read_tensors(_files_in_folder(path, source), source), source)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith((".", "~")):
        return Scorer.from_state(_read_tensors(_files_on_hub(source), source), source)
    raise InputError(
        f"scorer '{source}' does not exist: give a .safetensors file, a folder that holds one, or a hub id OWNER/NAME"
    )


def _files_in_folder(folder: Path, source: str) -> list[Path]:
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX, source, lambda shard: folder / shard)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"scorer folder '{source}' holds no .safetensors file: it needs {_FILE} or a checkpoint's files"
        )
    return files


def _files_on_hub(repo: str) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, name))

    reason: Exception | None = None
    for name in (_FILE, _INDEX, _SINGLE):
        try:
            path = fetch(name)
            return _shards(path, repo, fetch) if name == _INDEX else [path]
        except InputError:
            raise
        except EntryNotFoundError as error:  # also "not in the cache" while offline; another file may be
            reason = reason or error
        except Exception as error:  # the hub client raises what its HTTP library raises; a user gets one line
            reason = error
            break
    raise InputError(
        f"scorer '{repo}' is no local file or folder, and the hub gives none of {_FILE}, {_INDEX}, {_SINGLE} "
        f"({_first_line(reason)}): check the id and the connection, or give a local folder"
    ) from reason


def _shards(index: Path, source: str, locate: Callable[[str], Path]) -> list[Path]:
    """The files that hold the scorer's tensors by a checkpoint's index; others are not even looked for."""
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{source}: {index.name} is damaged ({_first_line(error)}): fetch the checkpoint again"
        ) from error
    names = scorer_keys(weight_map, source)
    if names is None:
        raise InputError(f"{source}: {index.name} lists no *.{_MARK}*: this checkpoint has no scorer")
    return [locate(shard) for shard in sorted({weight_map[name] for name in names.values()})]


def _read_tensors(files: list[Path], source: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt", device="cpu") as file:
                where.update(dict.fromkeys(file.keys(), path))
        names = scorer_keys(where, source) or {}
        for name in names.values():
            with safe_open(where[name], framework="pt", device="cpu") as file:
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{source}: cannot read its safetensors ({_first_line(error)}): fetch them again") from error
    return tensors


def _first_line(error: Exception | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
