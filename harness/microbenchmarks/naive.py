"""The compressors in their naive form: full matrices, re-scans and a token at a time, as most papers' code has them.

Short rather than fast. Tests take what these keep for the truth, the benchmark their time for the comparison. Equal up
to rounding counts as equal in both, and then the lower index comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.numerics import rounded
from visionselector_eval.baselines.sparsevlm import merged_into, recycled_of
from visionselector_eval.models.decoder_view import PromptView
from visionselector_eval.models.visionselector import Scorer


def naive_scores(scorer: Scorer, features: Tensor) -> Tensor:
    """(N,) VisionSelector's scores through the N x N product of both projections (arXiv 2510.16598)."""
    products = scorer.q_proj(features) @ scorer.k_proj(features).T
    return products.div(scorer.hidden**0.5).mean(dim=1)


def naive_divprune(features: Tensor, count: int) -> list[int]:
    """DivPrune's picks in order, from the full distance matrix re-read at every pick (arXiv 2503.02175)."""
    unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    distance = 1 - unit @ unit.T
    nearest_other = distance.clone().fill_diagonal_(torch.inf).amin(dim=0)
    order = [_first_largest(nearest_other)]
    while len(order) < count:
        nearest = distance[order].amin(dim=0)
        nearest[order] = -torch.inf
        order.append(_first_largest(nearest))
    return order


def _first_largest(values: Tensor) -> int:
    # Equal tokens come out of a matrix product a few units of rounding apart: the lowest index of those wins.
    return int((values >= values.max() - 8 * torch.finfo(values.dtype).eps).nonzero()[0])


@dataclass(frozen=True)
class NaiveZip:
    """What VisionZip keeps: dominant and target indices, the tokens that joined each target, the merged rows."""

    dominant: list[int]
    joined: dict[int, list[int]]
    merged: dict[int, Tensor]


def naive_visionzip(features: Tensor, keys: Tensor, received: Tensor, dominant: int, contextual: int) -> NaiveZip:
    """VisionZip one token at a time (arXiv 2412.04467)."""
    ranked = sorted(range(len(received)), key=lambda i: (-float(received[i]), i))
    kept = sorted(ranked[:dominant])
    rest = sorted(ranked[dominant:])
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    unit = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-12)
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if targets and token not in joined:
            joined[targets[_first_largest(unit[targets] @ unit[token])]].append(token)
    merged = {
        target: features[target] + (features[members].mean(dim=0) if members else 0)
        for target, members in joined.items()
    }
    return NaiveZip(kept, joined, merged)


def naive_received(queries: Tensor, keys: Tensor) -> Tensor:
    """(N,) attention received by each token, from the full map of queries and keys, (H, N, Dh) each."""
    attention = torch.softmax(queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5, dim=-1)
    return attention.mean(dim=0).sum(dim=0)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _ranked(values: Tensor) -> list[int]:
    """Indices by descending value, the lower index first among equals."""
    return values.sort(descending=True, stable=True).indices.tolist()


def naive_mmr(features: Tensor, scores: Tensor, count: int, balance: float = 0.5) -> list[int]:
    """IDPruner's picks in order, from the full matrix of cosines."""
    unit = _unit(features)
    cosine = unit @ unit.T
    importance = (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)
    order = [_first_largest(importance)]
    while len(order) < count:
        value = balance * importance - (1 - balance) * cosine[order].amax(dim=0)
        value[order] = -torch.inf
        order.append(_first_largest(value))
    return order


def naive_fading(features: Tensor, importance: Tensor, count: int, gamma: float = 20.0) -> list[int]:
    """ID-Selection's picks in order, from the full matrix of cosines (arXiv 2604.05601)."""
    unit = _unit(features)
    fade = torch.exp(-gamma * (1 - unit @ unit.T).square())
    spread = importance.max() - importance.min()
    left = (importance - importance.min()) / spread if spread > 0 else torch.ones_like(importance)
    order: list[int] = []
    while len(order) < count:
        open_ = left.clone()
        open_[order] = -torch.inf
        order.append(_first_largest(open_))
        left = (left - fade[order[-1]] * left[order[-1]]).clamp(min=0)
    return order


def naive_cdpruner(features: Tensor, relevance: Tensor, count: int) -> list[int]:
    """CDPruner's picks in order, by Cholesky rows of the full kernel (arXiv 2506.10967); the spanned count as 0."""
    unit = _unit(features)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    eps = torch.finfo(kernel.dtype).eps
    norm = kernel.diagonal().clone()
    left = norm.clone()
    rows = kernel.new_zeros(count, kernel.shape[0])
    order: list[int] = []
    while len(order) < count:
        left = torch.where(left > norm * max(1e-12, 100 * eps), left, 0)
        left[order] = -torch.inf
        equal = left + torch.where(left > 0, 8 * eps * norm, 0) >= left.max()
        pick, step = int(equal.nonzero()[0]), len(order)
        order.append(pick)
        if left[pick] > 0:
            rows[step] = (kernel[pick] - rows[:step, pick] @ rows[:step]) / left[pick].sqrt()
            left = left - rows[step].square()
    return order


def naive_vispruner(features: Tensor, attention: Tensor, count: int, important: float = 0.5) -> list[int]:
    """What VisPruner keeps, with all similarities computed again in every round (arXiv 2412.01818)."""
    ranked = _ranked(attention)
    kept = ranked[: int(count * important)]
    left = torch.tensor(ranked[len(kept) :], device=features.device)
    unit = _unit(features.double())
    while len(left) > count - len(kept):
        even, odd = left[::2], left[1::2]
        alike = rounded(unit[even] @ unit[odd].T).amax(dim=1) if len(odd) else unit.new_zeros(len(even))
        order = alike.sort(descending=True, stable=True).indices
        dropped = min(8, len(left) - (count - len(kept)), len(even))
        left = torch.cat([even[order[dropped:]], odd])
    return sorted([*kept, *left.tolist()])


def naive_prumerge(
    features: Tensor, keys: Tensor, attention: Tensor, count: int, neighbours: int = 32, upstream_exact: bool = False
) -> tuple[list[int], Tensor]:
    """What PruMerge+ keeps, ascending, and its rows, each from a copy of all other tokens (arXiv 2403.15388)."""
    n = len(features)
    attention = attention / attention.sum()
    q1, q3 = attention.quantile(0.25), attention.quantile(0.75)
    outliers = max(1, int((attention > q3 + 1.5 * (q3 - q1)).sum()))
    ranked = _ranked(attention)
    kept = ranked[: min(count, outliers)]
    if upstream_exact:
        spaced = [i for i in range(0, n, max(1, n // count)) if i not in kept]
        kept += spaced[: count - len(kept)]
        kept += [i for i in ranked if i not in kept][: count - len(kept)]
    else:
        each = count - len(kept)
        spaced = [math.floor(Fraction(2 * i + 1, 2) * Fraction(n, each)) for i in range(each)]
        blocked = [i for i in spaced if i in kept]
        kept += [i for i in spaced if i not in kept]
        for i in blocked:
            kept.append(min((j for j in range(n) if j not in kept), key=lambda j: (abs(j - i), j)))
    unit = _unit(keys.double())
    rows = []
    for i in sorted(kept):
        others = torch.cat([torch.arange(i, device=keys.device), torch.arange(i + 1, n, device=keys.device)])
        other_features, other_unit = features[others], unit[others]
        alike = other_unit @ unit[i]
        if neighbours < len(others):
            last = alike.topk(neighbours).values[-1]
            slack = 8 * torch.finfo(alike.dtype).eps
            sure = (alike > last + slack).nonzero()[:, 0]
            equal = ((alike - last).abs() <= slack).nonzero()[:, 0]
            near = torch.cat([sure, equal[: neighbours - len(sure)]])
        else:
            near = torch.arange(len(others), device=keys.device)
        rows.append(features[i] + (attention[others[near], None] * other_features[near]).sum(dim=0))
    return sorted(kept), torch.stack(rows)


def naive_holov(attention: Tensor, count: int, crops: int, features: Tensor | None = None) -> list[int]:
    """HoloV's picks by crop and attention (arXiv 2510.02912), with its variance term if `features` are given."""
    starts = [0]
    for crop in range(crops):
        starts.append(starts[-1] + len(attention) // crops + (crop < len(attention) % crops))
    members = [list(range(a, b)) for a, b in pairwise(starts)]
    attention = attention.double()
    scores = torch.stack([attention[m].mean() for m in members])
    for number, m in enumerate(members if features is not None else []):
        assert features is not None
        unit = _unit(features[m])
        cosine = (unit @ unit.T).fill_diagonal_(0)
        variance = (cosine - cosine.sum(1, keepdim=True) / max(1, len(m) - 1)).square().sum(1) / max(1, len(m) - 1)
        scale = attention[m].abs().mean() / (variance.abs().mean() + 1e-6)
        scores[number] = (attention[m] + 0.09 * scale * variance).mean()
    share = scores / scores.sum() if scores.sum() > 0 else torch.full_like(scores, 1 / crops)
    allotted = [math.floor(float(s) * count + 1e-9) for s in share]
    for crop in _ranked(scores)[: count - sum(allotted)]:
        allotted[crop] += 1
    order = [m[i] for m, k in zip(members, allotted, strict=True) for i in _ranked(attention[m])[:k]]
    return order + [i for i in _ranked(attention) if i not in set(order)][: count - len(order)]


def naive_tome(features: Tensor, metric: Tensor | None, count: int) -> tuple[list[int], Tensor, list[int]]:
    """ToMe's places, rows and sizes, by the full matrix of each round (arXiv 2210.09461); no `metric`: features."""
    x, size, place = features.clone(), [1] * len(features), list(range(len(features)))
    on_features = metric is None
    metric = x.clone() if metric is None else metric.clone()
    while len(place) > count:
        n = len(place)
        unit = _unit(metric.double())
        cosine = rounded(unit[::2] @ unit[1::2].T)
        edges = _ranked(cosine.amax(dim=1))[: min(n - count, n // 2)]
        groups: dict[int, list[int]] = {}
        for edge in edges:
            groups.setdefault(2 * int((cosine[edge] == cosine[edge].max()).nonzero()[0]) + 1, []).append(2 * edge)
        for target, sources in groups.items():
            parts = [target, *sources]
            mass = torch.tensor([size[i] for i in parts], dtype=x.dtype, device=x.device)[:, None]
            x[target] = (mass * x[parts]).sum(dim=0) / mass.sum()
            metric[target] = x[target] if on_features else (mass * metric[parts]).sum(dim=0) / mass.sum()
            size[target] = sum(size[i] for i in parts)
        left = [i for i in range(n) if i % 2 or i // 2 not in edges]
        x, metric, size, place = x[left], metric[left], [size[i] for i in left], [place[i] for i in left]
    return place, x, size


def naive_fusion2x2(
    features: Tensor, grid: tuple[int, int, int], count: int, sim: bool = False, restore_norm: bool = False
) -> tuple[list[int], Tensor, list[int]]:
    """The 2 x 2 fusion's places, rows and sizes, window by window."""
    x, size, place = dict(enumerate(features)), dict.fromkeys(range(len(features)), 1), list(range(len(features)))
    while len(place) > count:
        t, h, w = grid if grid[1] * grid[2] > 1 else (1, 1, grid[0])
        at = torch.tensor(place, device=features.device).view(t, h, w)
        grid = (t, -(-h // 2), -(-w // 2))
        windows = [
            at[f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten().tolist()
            for f in range(t)
            for i in range(grid[1])
            for j in range(grid[2])
        ]
        surplus = len(place) - count
        if len(windows) < count:

            def alike(window: list[int]) -> float:
                unit = _unit(torch.stack([x[i] for i in window]).double())
                pairs = len(window) * (len(window) - 1)
                return float(rounded((unit.sum(0).square().sum() - unit.square().sum()) / pairs)) if pairs else -2.0

            windows = sorted(windows, key=alike, reverse=True)  # stable
        for window in windows:
            members = window
            if len(members) - 1 > surplus:
                unit = _unit(torch.stack([x[i] for i in members]).double())
                cosine = rounded((unit[1:] * unit[0]).sum(dim=1))
                members = [members[0], *sorted(members[1 + i] for i in _ranked(cosine)[:surplus])]
            if len(members) > 1:
                surplus -= len(members) - 1
                rows = torch.stack([x[i] for i in members])
                mass = torch.tensor([size[i] for i in members], dtype=rows.dtype, device=rows.device)
                fused = (mass / mass.sum()) @ rows
                if sim:
                    mass = mass * torch.exp(_unit(rows) @ _unit(fused[None])[0] / 0.1)
                    fused = (mass / mass.sum()) @ rows
                if restore_norm:
                    fused = _unit(fused[None])[0] * ((mass / mass.sum()) @ rows.norm(dim=1))
                x[members[0]], size[members[0]] = fused, sum(size[i] for i in members)
                place = [i for i in place if i not in members[1:]]
    return place, torch.stack([x[i] for i in place]), [size[i] for i in place]


def naive_pooling(features: Tensor, grid: tuple[int, int, int], bands: int, columns: int) -> Tensor:
    """2-D adaptive average pooling of each frame to bands x columns."""
    frames = features.view(*grid, -1).permute(0, 3, 1, 2)
    return torch.nn.functional.adaptive_avg_pool2d(frames, (bands, columns)).flatten(2).transpose(1, 2).flatten(0, 1)


def _queries_and_keys(view: PromptView, layer: int) -> tuple[Tensor, Tensor]:
    """(H, S, d) each, of all tokens."""
    normed = view.previous if layer < view.layer else view.access.attention_input(layer, view.hidden)
    assert normed is not None
    queries = view.access.queries(layer, normed, *view.tables)
    keys = view.access.keys(layer, normed, *view.tables)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return queries.transpose(0, 1), keys.transpose(0, 1)


def naive_map(view: PromptView, layer: int) -> Tensor:
    """(H, S, S) causal attention of `layer`, written out as `output_attentions` does."""
    queries, keys = _queries_and_keys(view, layer)
    scores = queries @ keys.transpose(1, 2) * view.access.scale(layer)
    return (scores + torch.full_like(scores[0], -torch.inf).triu(1)).softmax(dim=-1)


def naive_fastv(view: PromptView, count: int, rows: str = "last") -> list[int]:
    """FastV's choice among the visual tokens by the full map of the layer before (arXiv 2403.06764)."""
    mean = naive_map(view, view.layer - 1).mean(dim=0)
    received = mean[-1] if rows == "last" else mean.mean(dim=0)
    return sorted(_ranked(received[view.visual])[:count])


def naive_pyramiddrop(view: PromptView, count: int) -> list[int]:
    """PyramidDrop's choice by q and k of all tokens, of which one row is used (arXiv 2410.17247)."""
    queries, keys = _queries_and_keys(view, view.layer)
    scores = keys @ queries[:, -1, :, None] * view.access.scale(view.layer)  # (H, S, 1)
    return sorted(_ranked(scores[..., 0].softmax(dim=-1).mean(dim=0)[view.visual])[:count])


def naive_sparsevlm(view: PromptView, count: int) -> list[int]:
    """SparseVLM's places by the full attention map and the full matrix of distances (arXiv 2410.04417)."""
    visual, words = view.embeds[view.first_visual], view.embeds[view.first_text]
    liking = (visual @ words.T).softmax(dim=-1).mean(dim=0)
    raters = view.text[liking > liking.mean()]
    relation = naive_map(view, view.layer - 1)[:, raters].mean(dim=(0, 1))[view.visual]
    order, states = _ranked(relation), view.hidden[view.visual]
    clusters, expected = 0, min(1, count // 2, len(order) - count)
    while expected > clusters:  # merged tokens are part of the count
        clusters, expected = expected, min(merged_into(len(order) - count + expected), count // 2)
    if not clusters:
        return sorted(order[:count])
    gone = order[count - clusters :]
    recycled = sorted(gone[: max(clusters, recycled_of(len(gone)))])
    x = states[recycled]
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-distance.topk(clusters, largest=False).values.square().mean(dim=1)).exp()
    delta = torch.where(density[None] > density[:, None], distance, torch.inf).amin(dim=1)
    delta = torch.where(delta.isinf(), distance.max(), delta)
    centres = _ranked(density * delta)[:clusters]
    return sorted(order[: count - clusters] + [recycled[centre] for centre in centres])
