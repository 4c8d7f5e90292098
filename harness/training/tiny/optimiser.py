"""Muon for the matrices of the embedded checkpoints' trainings.

torch.optim.Muon came with torch 2.9, above our lower bound. It takes a fused qkv matrix as one and refuses the kernels
of convolutions, and it orthogonalises each matrix alone, where here all of a shape go together, which matters for
matrices of this size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalised(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, for a batch (n, rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to an entry size of 0.2 (so that Adam's learning rates fit).

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Matrices of equal shape
    are orthogonalised together; a fused qkv matrix is taken as three.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], lr: float, momentum: float = 0.95) -> None:
        named = list(named)
        self._split = {id(p): 3 for name, p in named if name.endswith("qkv.weight")}
        super().__init__([p for _, p in named], {"lr": lr, "momentum": momentum, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                pieces = update.reshape(p.shape[0], -1).chunk(self._split.get(id(p), 1))
                for target, piece in zip(p.view(p.shape[0], -1).chunk(len(pieces)), pieces, strict=True):
                    shapes[piece.shape[0], piece.shape[1]].append((target, piece))
            for (rows, columns), items in shapes.items():
                updates = orthogonalised(torch.stack([u for _, u in items])) * (0.2 * max(rows, columns) ** 0.5)
                for (target, _), update in zip(items, updates, strict=True):
                    target.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
