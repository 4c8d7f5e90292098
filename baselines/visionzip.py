"""`visionzip`: dominant tokens by received attention, the rest merged into contextual ones (VisionZip)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Host, Selection, VisualTokens, traced
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import top_k, unit_rows, working_dtype

_OF_ALL = 0.05  # contextual share of all tokens without a CLS token, as in the authors' port
_OF_KEPT = 10 / 64  # and of the kept ones with it: 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30


@dataclass(frozen=True, kw_only=True)
class VisionZip(Compressor):
    """Keeps the most attended tokens and merges the others into a few contextual tokens.

    Of K kept tokens C are contextual and D = K - C dominant: exactly K in all, for every budget. Source: VisionZip,
    arXiv 2412.04467. Encoders with a CLS token rank by its attention and merge before the projector, as in the paper
    (the CLS token itself, which the LLM never sees otherwise, is not kept), with C = round(K * 10 / 64): 54 + 10,
    108 + 20 and 162 + 30 tokens at 64, 128 and 192. Others rank by the attention received and merge behind it, as in
    the authors' port, with C = floor(0.05 * N). C is at least 1, and canonically at most K // 2. A given `contextual`
    replaces the 0.05, for both kinds of encoders. `upstream_exact` chooses among all of a prompt's images at once; with
    a CLS token K and C stay the same (its budgets are absolute there), without one D = int((r - 0.05) * N) and
    C = max(1, int(0.05 * N)) (often fewer than r * N; D = 0 for small r). Attention never crosses images here;
    upstream's does.
    """

    name = "visionzip"
    needs = frozenset({"cls|received", "keys", "patches"})
    renumbers = True
    paper = "VisionZip, arXiv 2412.04467"
    deviations = (
        "exactly K in all; the CLS token is not kept (a patch takes its place); without one, attention received in the "
        "encoder counts"
    )
    cost = "time O(N C Dk + N D) with C contextual tokens, memory O(N (C + D))"

    contextual: float | None = field(
        default=None,
        metadata={
            "help": "share of all tokens that becomes contextual (merged) ones; 0 keeps a single one; default: 10/64 "
            "of the kept tokens where the encoder has a CLS token, else 0.05 of all"
        },
    )

    _has_cls: ClassVar[bool] = False  # of the backbone that it is bound to

    def __post_init__(self) -> None:
        value = self.contextual
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1  # also refuses nan
        ):
            raise InputError(
                f"invalid option contextual={value!r} of method 'visionzip': expected a share of all visual tokens, "
                "0 <= contextual < 1, for example contextual=0.05"
            )

    def bind(self, host: Host) -> Compressor:
        bound = replace(self)
        vars(bound)["_has_cls"] = "cls" in host.traces  # no field, since it is no option
        return bound

    def upstream_count(self, n: int, ratio: float) -> int:
        if self._has_cls and self.contextual is None:
            return Share(ratio).count(n)
        # Upstream's own arithmetic to the letter: int((0.15 - 0.05) * 40) is 3 in binary.
        share = _OF_ALL if self.contextual is None else self.contextual
        return max(0, int((ratio - share) * n)) + max(1, int(share * n))

    def _contextual_count(self, n: int, count: int, has_cls: bool) -> int:
        share = _OF_ALL if self.contextual is None else self.contextual
        if has_cls and self.contextual is None:
            expected = round(count * _OF_KEPT)  # half to even
        elif self.upstream_exact:
            expected = int(share * n)
        else:
            expected = math.floor(share * n + 1e-9)  # the slack is that of `Share.count`
        return min(max(1, expected), count if self.upstream_exact else count // 2)

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens, the contextual ones at their targets' places.

        Returns:
            kept: (count,) int64; features: (count, D) in the features' dtype, a dominant token unchanged, a contextual
            one x_target + mean(x of the tokens that joined it), summed in float32 (float64 for float64); scores: the
            attention, (N,).

        Raises:
            InputError: where the trace lacks `keys`, or both `cls` and `received`.
        """
        features, n = tokens.features, tokens.features.shape[0]
        attention, keys = traced(tokens, self.name, "cls|received", "keys")
        has_cls = tokens.trace is not None and tokens.trace.cls is not None
        contextual = self._contextual_count(n, count, has_cls)
        dominant = top_k(attention, count - contextual)
        if contextual == 0:  # count is 1: nothing to merge into
            return Selection(kept=dominant, scores=attention)

        rest = _complement(n, dominant)
        indices = torch.arange(contextual, device=features.device) * max(1, rest.shape[0] // contextual)
        targets, joining = rest[indices], rest[_complement(rest.shape[0], indices)]
        owner = _owner(keys, targets, joining)
        merged = tokens.finish(_merge(tokens.rows, targets, joining, owner))

        kept = torch.cat([dominant, targets]).sort().values
        place = torch.searchsorted(kept, targets)

        def merge(rows: Tensor) -> Tensor:
            return rows[kept].index_copy_(0, place, _merge(rows, targets, joining, owner).to(rows.dtype))

        rows = features[kept]
        rows[place] = merged
        return Selection(kept=kept, features=rows, scores=attention, merge=merge)


def _complement(n: int, chosen: Tensor) -> Tensor:
    """Indices i < n that are not in `chosen`, ascending. The host knows how many (unlike `nonzero`)."""
    taken = torch.zeros(n, dtype=torch.uint8, device=chosen.device).index_fill_(0, chosen, 1)
    return torch.sort(taken, stable=True).indices[: n - chosen.shape[0]]


def _owner(keys: Tensor, targets: Tensor, joining: Tensor) -> Tensor:
    """For each token of `joining` the number of the target with the most similar key; of equal ones the first."""
    unit = unit_rows(keys.double())
    similarity = unit[joining] @ unit[targets].T
    slack = 8 * torch.finfo(similarity.dtype).eps  # equal keys differ by rounding, see divprune
    return (similarity >= similarity.amax(dim=1, keepdim=True) - slack).to(torch.uint8).argmax(dim=1)


def _merge(features: Tensor, targets: Tensor, joining: Tensor, owner: Tensor) -> Tensor:
    """(C, D) `x_target + mean(x_joined)`, each token of `joining` with its owner.

    The target is not in the mean, so its norm about doubles; that is the published method. A target that nothing joins
    stays as it is.
    """
    members = features[joining].to(working_dtype(features))
    sums = members.new_zeros(targets.shape[0], members.shape[1])
    # The one that adds in a fixed order: index_add_ does not on CUDA, index_put_ does not on the CPU.
    if sums.is_cuda:
        sums.index_put_((owner,), members, accumulate=True)
    else:
        sums.index_add_(0, owner, members)
    sizes = members.new_zeros(targets.shape[0]).index_add_(0, owner, members.new_ones(owner.shape[0]))
    return features[targets].to(sums.dtype) + sums / sizes.clamp(min=1)[:, None]
