"""Golden vectors in float64, to the printed digits; computed apart from this code, by the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from visionselector_eval.baselines import EncoderTrace, VisualTokens, build, cdpruner, holov, id_selection, top_k
from visionselector_eval.baselines.contract.numerics import unit_rows
from visionselector_eval.baselines.divprune import pick_order
from visionselector_eval.models.visionselector import Scorer, idpruner, soft_topk

I = torch.arange(16, dtype=torch.float64)[:, None]  # noqa: E741 - the row i of the formulas
J = torch.arange(6, dtype=torch.float64)[None]
X = torch.sin(0.37 * (I + 1) * (J + 1)) + 0.1 * torch.cos(1.7 * (I + 1))
Y = torch.cos(0.53 * (I + 1) * (J + 1) + 0.2)
A = torch.softmax(2 * torch.sin(1.1 * I[:, 0]), dim=0)

# fmt: off
SCORES = torch.tensor([
    0.007943, -0.012015, 0.011822, 0.017146, -0.052221, -0.069828, -0.007696, 0.012704,
    -0.016553, 0.005950, 0.067490, 0.047317, -0.021201, -0.013894, 0.008670, -0.011879,
], dtype=torch.float64)
# fmt: on


def scorer() -> Scorer:
    p = torch.arange(3, dtype=torch.float64)[:, None]
    return Scorer.from_state(
        {
            "q_proj.weight": 0.5 * torch.sin(1 + p + 2 * J),
            "k_proj.weight": 0.5 * torch.cos(2 + 2 * p + J),
            "q_proj.bias": 0.01 * (p[:, 0] + 1),
            "k_proj.bias": -0.02 * (p[:, 0] + 1),
        }
    )


def printed(values: torch.Tensor, digits: int = 6) -> list[float]:
    return [round(v, digits) for v in values.flatten().tolist()]


def test_scores():
    assert printed(scorer()(X)) == SCORES.tolist()
    selection = build("visionselector", scorer=scorer()).compress(VisualTokens(features=X, grid=(1, 4, 4)), 4)
    assert selection.kept.tolist() == [3, 7, 10, 11]
    assert selection.scores is not None
    assert printed(selection.scores) == SCORES.tolist()


def test_soft_topk_and_its_gradient():
    scores = (10 * scorer()(X))[None].requires_grad_()
    mask = soft_topk(scores, 4)
    assert printed(mask[0, [0, 5, 10]]) == [0.263512, 0.141183, 0.393573]
    assert mask.sum().item() == pytest.approx(4, abs=1e-12)
    shift = torch.logit(mask[0]) - scores[0]
    assert printed(shift, 10) == [-1.1072212628] * 16

    (gradient,) = torch.autograd.grad(mask, scores, (I[:, 0] / 16)[None], retain_graph=True)
    assert printed(gradient[0, [0, 10, 15]]) == [-0.092225, 0.035751, 0.081089]

    hard = torch.zeros(16, dtype=torch.float64)
    hard[top_k(scores[0].detach(), 4)] = 1
    # Within one unit of the last printed digit: the value to 14 digits is 0.47732873906545 (checked in 50-digit
    # arithmetic), of which ten digits are printed here, cut off rather than rounded.
    assert binary_cross_entropy(mask[0], hard).item() == pytest.approx(0.4773287390, abs=1e-10)


def test_divprune_order():
    assert pick_order(X, 6).tolist() == [4, 11, 0, 7, 8, 15]
    kept = build("divprune").compress(VisualTokens(features=X, grid=(1, 4, 4)), 6).kept
    assert kept.tolist() == [0, 4, 7, 8, 11, 15]


def test_visionzip():
    tokens = VisualTokens(features=X, grid=(1, 4, 4), trace=EncoderTrace(received=A, keys=Y))
    selection = build("visionzip", contextual=0.125).compress(tokens, 6)
    assert selection.kept.tolist() == [0, 1, 2, 7, 9, 13]  # dominant 1, 2, 7, 13; targets 0, 9
    assert selection.features is not None
    assert torch.equal(selection.features[[1, 2, 3, 5]], X[[1, 2, 7, 13]])
    assert printed(selection.features[0, :3]) == [0.157447, 0.450693, 0.817956]
    assert printed(selection.features[4, :3]) == [-0.446358, 0.631554, -1.228915]
    for place, target, joined in ((0, 0, [4, 6, 8, 10, 12, 14]), (4, 9, [3, 5, 11, 15])):
        torch.testing.assert_close(selection.features[place], X[target] + X[joined].mean(dim=0))


TOKENS = VisualTokens(features=X, grid=(1, 4, 4), trace=EncoderTrace(received=A, keys=Y))


def test_holov():
    """By crop, and inside a crop by attention, as upstream orders them."""
    assert holov.pick_order(A, count=6, crops=4).tolist() == [1, 2, 7, 6, 13, 12]
    assert build("holov", crops=4).compress(TOKENS, 6).kept.tolist() == [1, 2, 6, 7, 12, 13]


def test_prumerge_plus():
    """The port's rule. rho = 0, so that one token goes by attention; by rank the rows are 7, 0, 2, 4, 6, 8."""
    selection = build("prumerge_plus", upstream_exact=True, neighbours=4).compress(TOKENS, 6)
    assert selection.kept.tolist() == [0, 2, 4, 6, 7, 8]
    assert selection.features is not None
    assert printed(selection.features[:, 0]) == [0.221408, 0.935199, 0.908904, 0.600802, 0.343363, -0.257836]


@pytest.mark.parametrize(("count", "kept"), [(8, [1, 2, 7, 9, 10, 13, 14, 15]), (6, [1, 4, 6, 7, 11, 13])])
def test_vispruner(count, kept):
    assert build("vispruner").compress(TOKENS, count).kept.tolist() == kept


def test_cdpruner():
    q = torch.arange(6, dtype=torch.float64)
    text = unit_rows(torch.stack([torch.sin(0.9 * q), torch.cos(0.4 * q)]))
    relevance = cdpruner.relevance(unit_rows(X), -text.mean(dim=0))  # upstream's sign, and its mean of cosines
    assert printed(relevance[[0, 3]]) == [0.301982, 0.628082]
    assert cdpruner.pick_order(unit_rows(Y), relevance, 5).tolist() == [14, 15, 13, 11, 5]


def test_idpruner():
    assert idpruner.pick_order(X, A, 6).tolist() == [7, 8, 13, 1, 2, 12]


def test_id_selection():
    assert id_selection.pick_order(X, A, 6, gamma=20.0).tolist() == [7, 13, 1, 2, 12, 8]
    assert build("id_selection").compress(TOKENS, 6).kept.tolist() == [1, 2, 7, 8, 12, 13]


def test_tome():
    """Merges 6 into 15, 14 into 7, 8 into 13 and 12 into 9."""
    selection, sizes = build("tome", metric="keys").merge(TOKENS, 12)
    assert selection.kept.tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 13, 15]
    assert sizes.tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 2, 2]
    for place, source, target in ((11, 6, 15), (6, 14, 7), (10, 8, 13), (7, 12, 9)):
        torch.testing.assert_close(selection.features[place], (X[source] + X[target]) / 2)
    assert printed(selection.features[11, :1]) == [0.099883]
