"""The trained predictor of Dynamic-LLaVA and Dynamic-Qwen, and where its weights are found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.weights import find_tensors

__all__ = ["MARK", "Predictor", "load_predictor"]

MARK = "image_score_predictor."
_HEADS = 8
_FILE = "predictor.safetensors"


class _Block(nn.Module):
    """A pre-norm transformer block without bias on q, k and v, without positions and without a mask."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=bias)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(n, 3, _HEADS, width // _HEADS).permute(1, 2, 0, 3)
        # Fused: the N x N weights are never written out.
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        x = x + self.out(mixed.transpose(0, 1).reshape(n, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Predictor(nn.Module):
    """Tells for each visual token whether to keep it, from its hidden state inside the LLM.

    LayerNorm, Linear, GELU; two transformer blocks of 8 heads; then the first half of the channels (local) beside the
    mean over all tokens of the second half (global), through three linear maps to (keep, drop). Source:
    Dynamic-LLaVA, arXiv 2412.00876. The validity mask of padded training batches has no counterpart here: the tokens
    given are all valid.

    Args:
        width: D, the size of the LLM's states.
        hidden: m, the size inside (512 in the published ones), a multiple of 8.
        inner: that of the blocks' MLPs, 4 * m.
        blocks: number of transformer blocks.
        bias: whether their output projections have one.
    """

    def __init__(
        self, width: int, hidden: int = 512, inner: int | None = None, blocks: int = 2, bias: bool = True
    ) -> None:
        super().__init__()
        if width < 1 or blocks < 1 or hidden < 1 or hidden % _HEADS:
            raise InputError(
                f"Predictor(width={width}, hidden={hidden}, blocks={blocks}): give sizes of at least 1, "
                f"hidden a multiple of {_HEADS}"
            )
        self.width, self.hidden = width, hidden
        self.in_norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, inner or 4 * hidden, bias) for _ in range(blocks))
        self.head = nn.ModuleList(
            [nn.Linear(hidden, hidden // 2), nn.Linear(hidden // 2, hidden // 4), nn.Linear(hidden // 4, 2)]
        )

    def forward(self, states: Tensor) -> Tensor:
        """(N, 2) log-probabilities of keep and drop for the (N, D) states of one scope.

        In float64 where states or parameters are float64, else in float32 (also under autocast).

        Raises:
            InputError: states of another shape.
        """
        if states.dim() != 2 or states.shape[1] != self.width:
            raise InputError(f"this predictor takes states of shape (N, {self.width}), got {tuple(states.shape)}")
        with torch.autocast(states.device.type, enabled=False):
            x = F.gelu(self.in_proj(self.in_norm(states.to(self.in_proj.weight.dtype))))
            for block in self.blocks:
                x = block(x)
            local, whole = x.split([self.hidden // 2, self.hidden - self.hidden // 2], dim=1)
            x = torch.cat([local, whole.mean(0, keepdim=True).expand(len(x), -1)], 1)
            first, second, last = self.head
            return last(F.gelu(second(F.gelu(first(x))))).log_softmax(-1)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], source: str = "predictor") -> Predictor:
        """A predictor from its tensors, its sizes read from their shapes.

        Args:
            state: tensors by our own names (`state_dict()` of a `Predictor`), or by those of the published Dynamic-Qwen
                (`down_mlp.0.weight`, `transformer.0.attn.qkv.weight`, ...). A prefix ending in `image_score_predictor.`
                may stand before them, and other tensors of a checkpoint beside them.
            source: what to call the weights in an error.

        Returns:
            A predictor in evaluation mode whose parameters are float32 (float64 for float64) copies without gradient.

        Raises:
            InputError: tensors that are missing, do not fit each other, or that this predictor has no place for.
        """
        ours: dict[str, Tensor] = {}
        for name in predictor_names(state):
            if (own := _our_name(name.rpartition(MARK)[2])) is None:
                raise InputError(f"{source}: predictor tensor {name} is unknown (it takes those of Dynamic-Qwen)")
            if own in ours and not torch.equal(ours[own], state[name]):
                raise InputError(f"{source} holds several predictors that differ (in {own}): give a file with one")
            ours[own] = state[name]
        if not ours:
            raise InputError(f"{source} holds no predictor: it needs *.{MARK}* or the tensors of a saved Predictor")
        for name in ("in_proj.weight", "blocks.0.up.weight"):
            if name not in ours or ours[name].ndim != 2:
                got = tuple(ours[name].shape) if name in ours else "nothing"
                raise InputError(f"{source}: predictor tensor {name} has shape {got}, but it must be a matrix")
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in ours.values()) else torch.float32
        hidden, width = ours["in_proj.weight"].shape
        blocks = sum(name.endswith("qkv.weight") for name in ours)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            predictor = cls(width, hidden, len(ours["blocks.0.up.weight"]), blocks, "blocks.0.out.bias" in ours)
        expected = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
        for name in sorted({*expected, *ours}):
            if name not in ours or name not in expected or tuple(ours[name].shape) != expected[name]:
                got = tuple(ours[name].shape) if name in ours else "nothing"
                raise InputError(
                    f"{source}: predictor tensor {name} has shape {got}, but the others ask for "
                    f"{expected.get(name, 'nothing')}"
                )
        copies = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in ours.items()}
        predictor.load_state_dict(copies, assign=True)
        return predictor.eval().requires_grad_(False)


# Names of the published Dynamic-Qwen, and ours. A block's stand behind its number.
_RELEASED = {
    "down_mlp.0": "in_norm",
    "down_mlp.1": "in_proj",
    "output_mlp.0": "head.0",
    "output_mlp.2": "head.1",
    "output_mlp.4": "head.2",
}
_RELEASED_BLOCK = {
    "norm1": "attention_norm",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "norm2": "mlp_norm",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}


def _our_name(name: str) -> str | None:
    """A tensor's name among `Predictor`'s parameters, from the published one or our own; None for another name."""
    if block := re.fullmatch(r"(transformer|blocks)\.(\d+)\.(.+)\.(weight|bias)", name):
        known = _RELEASED_BLOCK if block[1] == "transformer" else dict.fromkeys(_RELEASED_BLOCK.values())
        inner = known.get(block[3], "") or block[3]
        return f"blocks.{block[2]}.{inner}.{block[4]}" if block[3] in known else None
    module, _, part = name.rpartition(".")
    ours = _RELEASED.get(module) or (module if module in _RELEASED.values() else None)
    return f"{ours}.{part}" if ours and part in ("weight", "bias") else None


def predictor_names(names: Iterable[str]) -> list[str]:
    """Those of the tensor names of one file that are a predictor's: behind `MARK`, else all where one is known."""
    listed = list(names)
    marked = [name for name in listed if MARK in name]
    return marked or (listed if any(_our_name(name) for name in listed) else [])


def load_predictor(source: str) -> Predictor:
    """Read a predictor from a file, a folder or the Hugging Face hub, and from there only its own tensors.

    Args:
        source: a `.safetensors` or `.bin` file; a folder with `predictor.safetensors`, or with any such files in which
            there is `*.image_score_predictor.*`; or a hub id `owner/name` of such a folder.

    Raises:
        InputError: nothing there, no predictor in it or two that differ, or a damaged file.
    """
    return Predictor.from_state(find_tensors(source, predictor_names, _FILE, "predictor"), source)
