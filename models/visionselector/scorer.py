"""The trained scorer of VisionSelector, and where its weights are found (arXiv 2510.16598)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.visionselector.released import ALIASES
from visionselector_eval.models.weights import find_tensors

__all__ = ["Scorer", "load_scorer"]

_PARTS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
_MARK = "importance_scorer."
_NAME = re.compile(rf"((?:module\.|_orig_mod\.)*(?:(?:model\.)?(?:visual\.)?{re.escape(_MARK)})?)(.+)")
_ROWS = {"cpu": 128, "cuda": 4096}  # tokens scored together
_FILE = "scorer.safetensors"


class Scorer(nn.Module):
    """Scores each visual token by its mean scaled product with all tokens of its scope.

    With q and k the two projections, `s_i = mean_j q(V_i) . k(V_j) / sqrt(hidden)`. Upstream forms the N x N
    matrix; here the mean is moved inside, which is the same number in O(N D + D h): `s_i = (V_i . Wq'kbar +
    bq . kbar) / sqrt(h)` with `kbar = k(mean_j V_j)`. Source: VisionSelector, arXiv 2510.16598.

    Args:
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

        Args:
            features: (N, D) any float dtype, on the parameters' device.

        Returns:
            (N,) float64 where the features or the parameters are float64, else float32 (also under autocast).

        Raises:
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

        Args:
            state: holds `{q,k}_proj.{weight,bias}`, by these names or behind `visual.importance_scorer.` or
                `model.visual.importance_scorer.`, with `module.` and `_orig_mod.` of a wrapped module before that;
                other tensors of a checkpoint may stand beside them. The same scorer may be there twice.
            source: what to call the weights in an error.

        Returns:
            A scorer in evaluation mode whose parameters are float32 (float64 for float64) copies without gradient.

        Raises:
            InputError: tensors that are missing, do not fit each other, or that this scorer has no place for.
        """
        scorers = scorer_keys(state, source)
        if not scorers:
            raise InputError(f"{source} holds no scorer: it needs {', '.join(_PARTS)} (or *.{_MARK}...)")
        prefix, names = next(iter(scorers.items()))
        tensors = {part: state[name] for part, name in names.items()}
        for other, theirs in scorers.items():
            if any(not torch.equal(state[theirs[part]].cpu(), tensor.cpu()) for part, tensor in tensors.items()):
                raise InputError(
                    f"{source} holds several scorers that differ ({prefix}q_proj.weight, {other}q_proj.weight): give a "
                    "file with one of them"
                )
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


def scorer_keys(names: Iterable[str], source: str = "scorer") -> dict[str, dict[str, str]]:
    """Names of a scorer's tensors in a checkpoint: prefix -> part (`q_proj.weight`, ...) -> name; empty for none.

    Raises:
        InputError: a scorer with parts missing, or with parts this scorer has no place for.
    """
    found: dict[str, dict[str, str]] = {}
    for name in scorer_names(names):
        match = _NAME.fullmatch(name)
        assert match is not None
        found.setdefault(match[1], {})[match[2]] = name
    for prefix, parts in found.items():
        if missing := [part for part in _PARTS if part not in parts]:
            raise InputError(f"{source}: scorer tensor {prefix}{missing[0]} is missing (it needs {', '.join(_PARTS)})")
        # A norm before the projections, say, would change every score: better refused than left out.
        if surplus := sorted(set(parts) - set(_PARTS)):
            raise InputError(f"{source}: scorer tensor {prefix}{surplus[0]} is unknown (it takes {', '.join(_PARTS)})")
    return found


def scorer_names(names: Iterable[str]) -> list[str]:
    """Those of the tensor names of one file that are a scorer's.

    A scorer's own prefix says that all behind it are; without one, its projections do, and then what stands right
    beside them.
    """
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    bare = {match[1] for match in matches if match[2] in _PARTS}
    return [m[0] for m in matches if m[1].endswith(_MARK) or (m[1] in bare and m[2].count(".") == 1)]


def load_scorer(source: str) -> Scorer:
    """Read a scorer from a file, a folder or the Hugging Face hub, and from there only its own four tensors.

    Args:
        source: a `.safetensors` or `.bin` file; a folder with `scorer.safetensors`, or with any such files among whose
            tensors are a scorer's (see `Scorer.from_state` for the names); a hub id `owner/name` of such a folder, or a
            name of `released.ALIASES`.

    Raises:
        InputError: nothing there, no scorer in it or several that differ, a damaged file, or a hub that cannot be
            reached.
    """
    if source in ALIASES and not Path(source).exists():
        source = ALIASES[source]
    return Scorer.from_state(find_tensors(source, scorer_names, _FILE, "scorer"), source)
