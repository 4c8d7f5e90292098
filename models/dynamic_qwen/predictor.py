"""The trained predictor of Dynamic-LLaVA and Dynamic-Qwen, and where its weights are found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionselector_eval.baselines.base import InputError

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

    Parameters
    ----------
    width: D, the size of the LLM's states.
    hidden: m, the size inside (512 in the published ones), a multiple of 8. inner: that of the blocks' MLPs, 4 * m.
    blocks: number of transformer blocks. bias: whether their output projections have one.
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

        Raises
        ------
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

        Parameters
        ----------
        state: tensors by our own names (`state_dict()` of a `Predictor`), or by those of another program: they are then
            told apart by their shapes; among equal shapes by the order of their names (numbers by value) and, where q,
            k and v stand apart, by these letters. A prefix ending in `image_score_predictor.` may stand before them,
            and other tensors of a checkpoint beside them.
        source: what to call the weights in an error.

        Returns
        -------
        A predictor in evaluation mode whose parameters are float32 (float64 for float64) copies without gradient.

        Raises
        ------
        InputError: tensors that are missing, do not fit each other, or that this predictor has no place for.
        """
        tensors = {name.rpartition(MARK)[2]: tensor for name, tensor in state.items() if MARK in name} or dict(state)
        if not tensors:
            raise InputError(f"{source} holds no predictor: it needs *.{MARK}* or the tensors of a saved Predictor")
        ours = _in_our_names(tensors, source)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in ours.values()) else torch.float32
        hidden, width = ours["in_proj.weight"].shape
        blocks = sum(name.endswith("qkv.weight") for name in ours)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            predictor = cls(width, hidden, len(ours["blocks.0.up.weight"]), blocks, "blocks.0.out.bias" in ours)
        wanted = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
        for name in sorted({*wanted, *ours}):
            if name not in ours or name not in wanted or tuple(ours[name].shape) != wanted[name]:
                got = tuple(ours[name].shape) if name in ours else "nothing"
                raise InputError(
                    f"{source}: predictor tensor {name} has shape {got}, but the others ask for "
                    f"{wanted.get(name, 'nothing')}"
                )
        copies = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in ours.items()}
        predictor.load_state_dict(copies, assign=True)
        return predictor.eval().requires_grad_(False)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)|\.", name) if part]


def _in_our_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`tensors` by the names of `Predictor`'s parameters."""
    if "in_proj.weight" in tensors and "blocks.0.qkv.weight" in tensors:
        return dict(tensors)

    def fail(what: str) -> InputError:
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return InputError(f"{source}: its predictor tensors ({shown}) are not those of Dynamic-LLaVA: {what}")

    names = sorted(tensors, key=_natural)
    modules: dict[str, dict[str, Tensor]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part not in ("weight", "bias"):
            raise fail(f"{name} is neither a weight nor a bias")
        modules.setdefault(module, {})[part] = tensors[name]
    if lost := [module for module, parts in modules.items() if "weight" not in parts]:
        raise fail(f"{lost[0]} has no weight")
    norms = [m for m, parts in modules.items() if parts["weight"].ndim == 1]
    linears = {m: tuple(parts["weight"].shape) for m, parts in modules.items() if parts["weight"].ndim == 2}

    # From the end: 2 <- m/4 <- m/2 <- m. No other map has these shapes.
    last = _only([m for m, (rows, _) in linears.items() if rows == 2], "one map to 2", fail)
    quarter = linears[last][1]
    second = _only([m for m, (rows, _) in linears.items() if rows == quarter], f"one map to {quarter}", fail)
    half = linears[second][1]
    first = _only([m for m, (rows, _) in linears.items() if rows == half and m != second], f"one map to {half}", fail)
    width = linears[first][1]
    rest = {m: shape for m, shape in linears.items() if m not in (last, second, first)}

    fused = [m for m, shape in rest.items() if shape == (3 * width, width)]
    square = [m for m, shape in rest.items() if shape == (width, width)]
    apart = {}
    if not fused:
        # q, k and v have no bias, the output projection has one; else the letter tells.
        apart = {letter: [m for m in square if _letter(m) == letter] for letter in "qkv"}
    blocks = len(fused) or len(apart["q"])
    if not blocks or any(len(found) != blocks for found in apart.values()):
        raise fail(f"no maps from {width} to q, k and v")
    group = (fused or apart["q"])[0].split(".")[0]

    def entry_of(found: list[str], what: str) -> str:
        """Of several that look alike, the one outside the blocks' group; in one numbered list the first."""
        outside = [m for m in found if m.split(".")[0] != group]
        return _only(found if len(found) == 1 else outside or found[:1], what, fail)

    left = {m: shape for m, shape in rest.items() if m not in fused and not any(m in found for found in apart.values())}
    ups = [m for m, (_, columns) in left.items() if columns == width and m not in square]
    if len(ups) != blocks:
        raise fail(f"{blocks} blocks need as many maps from {width} to more, found {ups or 'none'}")
    inner = left[ups[0]][0]
    outs = [m for m in left if m in square]
    downs = [m for m, shape in left.items() if shape == (width, inner)]
    others = [m for m in left if m not in (*ups, *outs, *downs)]
    surplus = next((found for found in (outs, downs) if len(found) == blocks + 1), [])
    entry = entry_of(others or surplus, f"one map from the LLM's width to {width}")
    outs, downs = [m for m in outs if m != entry], [m for m in downs if m != entry]
    wide = [m for m in norms if len(modules[m]["weight"]) == linears[entry][1]]
    entry_norm = entry_of(wide, "one norm of the LLM's width")
    block_norms = [m for m in norms if m != entry_norm]
    if (len(outs), len(downs), len(block_norms)) != (blocks, blocks, 2 * blocks):
        raise fail(f"found {outs or 'none'}, {downs or 'none'} and norms {block_norms or 'none'} for {blocks} blocks")

    ours: dict[str, Tensor] = {}
    placed = {"in_norm": entry_norm, "in_proj": entry, "head.0": first, "head.1": second, "head.2": last}
    for b in range(blocks):
        placed |= {
            f"blocks.{b}.attention_norm": block_norms[2 * b],
            f"blocks.{b}.mlp_norm": block_norms[2 * b + 1],
            f"blocks.{b}.out": outs[b],
            f"blocks.{b}.up": ups[b],
            f"blocks.{b}.down": downs[b],
        }
        if fused:
            placed[f"blocks.{b}.qkv"] = fused[b]
        else:
            ours[f"blocks.{b}.qkv.weight"] = torch.cat([modules[apart[x][b]]["weight"] for x in "qkv"])
    for name, module in placed.items():
        ours |= {f"{name}.{part}": tensor for part, tensor in modules[module].items()}
    return ours


def _letter(module: str) -> str:
    """q, k or v where the last part of a module's name says so (q, q_proj, to_q, wq, query, ...), else nothing."""
    last = module.rpartition(".")[2].lower()
    match = re.fullmatch(r"(?:to_|w|w_|proj_)?([qkv])(?:_proj|_lin|_linear)?|(query|key|value)(?:_proj)?", last)
    return (match[1] or match[2][0]) if match else ""


def _only(found: list[str], what: str, fail: object) -> str:
    if len(found) != 1:
        raise fail(f"{what} expected, found {found or 'none'}")  # type: ignore[operator]
    return found[0]


def load_predictor(source: str) -> Predictor:
    """Read a predictor from a file, a folder or the Hugging Face hub, and from there only its own tensors.

    Parameters
    ----------
    source: a `.safetensors` file; a folder with `predictor.safetensors` or with a checkpoint (one file, or shards with
        an index) that has `*.image_score_predictor.*`; or a hub id `owner/name` of such a folder.

    Raises
    ------
    InputError: nothing there, no predictor in it, or a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    from visionselector_eval.models.loading import weight_files

    path = Path(source).expanduser()
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise InputError(
            f"predictor '{source}' does not exist: give a .safetensors file, a folder that holds one, "
            "or a hub id OWNER/NAME"
        )
    tensors: dict[str, Tensor] = {}
    try:
        if path.is_dir() and (path / _FILE).is_file():
            path = path / _FILE
        files: Iterable[str] = [str(path)] if path.is_file() else weight_files(source)
        if not files and not path.exists():
            raise InputError(
                f"predictor '{source}' is no local file or folder, and the hub gives no weights of that id: check the "
                "id and the connection, or give a local folder"
            )
        for file in files:
            with safe_open(file, framework="pt", device="cpu") as opened:
                whole = path.is_file() and not any(MARK in name for name in opened.keys())  # noqa: SIM118
                tensors |= {k: opened.get_tensor(k) for k in opened.keys() if whole or MARK in k}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"predictor '{source}' cannot be read ({reason}): fetch its safetensors again") from error
    return Predictor.from_state(tensors, source)
