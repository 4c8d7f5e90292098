"""The losses of training as pure functions: golden vectors, naive references, finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from visionselector_eval.baselines import InputError, Tokens, parse_budget
from visionselector_eval.models.dynamic_qwen import training as dynamic
from visionselector_eval.models.visionselector import Scorer, soft_topk
from visionselector_eval.models.visionselector import training as selector

I = torch.arange(16, dtype=torch.float64)[:, None]  # noqa: E741
J = torch.arange(6, dtype=torch.float64)[None]
X = torch.sin(0.37 * (I + 1) * (J + 1)) + 0.1 * torch.cos(1.7 * (I + 1))


def golden_scorer() -> Scorer:
    """The golden vectors' scorer: h = 3."""
    scorer = Scorer(6, 3).double()
    p, q = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)[None]
    with torch.no_grad():
        scorer.q_proj.weight.copy_(0.5 * torch.sin(1 + p + 2 * q))
        scorer.k_proj.weight.copy_(0.5 * torch.cos(2 + 2 * p + q))
        scorer.q_proj.bias.copy_(0.01 * (p[:, 0] + 1))
        scorer.k_proj.bias.copy_(-0.02 * (p[:, 0] + 1))
    return scorer


def tenfold(features: torch.Tensor) -> torch.Tensor:
    return 10 * golden_scorer()(features)


def naive_scores(scorer: Scorer, features: torch.Tensor) -> torch.Tensor:
    """The published N x N form."""
    products = scorer.q_proj(features) @ scorer.k_proj(features).T
    return (products / math.sqrt(scorer.hidden)).mean(1)


def naive_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """sigmoid(s + t): t by bisection, then one Newton step that autograd sees, which gives its exact derivative."""
    low, high = -scores.max().item() - 30, -scores.min().item() + 30
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(scores + middle).sum() < k else (low, middle)
    gate = torch.sigmoid(scores + low)
    slope = (gate * (1 - gate)).sum().detach()
    return torch.sigmoid(scores + low - (gate.sum() - k) / slope)


# --- VisionSelector ---------------------------------------------------------------------------------------------------


def test_golden_mask_gradient_and_bce():
    scores = tenfold(X).detach().requires_grad_()
    mask = soft_topk(scores[None], 4)[0]
    shift = torch.logit(mask) - scores
    assert shift.detach().tolist() == pytest.approx([-1.1072212628] * 16, abs=1e-9)
    assert [mask[i].item() for i in (0, 5, 10)] == pytest.approx([0.263512, 0.141183, 0.393573], abs=1e-6)
    (gradient,) = torch.autograd.grad(mask, scores, torch.arange(16) / 16)
    assert [gradient[i].item() for i in (0, 10, 15)] == pytest.approx([-0.092225, 0.035751, 0.081089], abs=1e-6)

    made = selector.selector_loss(X, 4, tenfold)
    assert made.bce.item() == pytest.approx(0.4773287390, abs=1e-9)
    assert made.gates.hard.nonzero().squeeze(1).tolist() == [3, 7, 10, 11]
    assert made.gates.mask.sum().item() == pytest.approx(4, abs=1e-6)
    assert made.task.item() == 0
    assert made.total.item() == made.bce.item()
    torch.testing.assert_close(made.gates.features[0], mask.detach()[:, None] * X)


def test_gradients_agree_with_the_naive_form():
    torch.manual_seed(0)
    scorer = golden_scorer()
    target = torch.randn(16, 6, dtype=torch.float64)

    def naive() -> torch.Tensor:
        scores = 10 * naive_scores(scorer, X)
        mask = naive_mask(scores, 4)
        hard = torch.zeros(16, dtype=torch.float64)
        hard[scores.topk(4).indices] = 1
        bce = -(hard * mask.log() + (1 - hard) * (1 - mask).log()).mean()
        return ((mask[:, None] * X - target) ** 2).mean() + 0.7 * bce

    def task(features: list[torch.Tensor]) -> torch.Tensor:
        return ((features[0] - target) ** 2).mean()

    ours = selector.selector_loss(X, 4, lambda v: 10 * scorer(v), task, weight=0.7).total
    reference = naive()
    assert ours.item() == pytest.approx(reference.item(), abs=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, list(scorer.parameters())),
        torch.autograd.grad(reference, list(scorer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


def test_the_composite_loss_by_finite_differences():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((4, 6), (4,), (4, 6), (4,))]

    def loss(features, wq, bq, wk, bk):
        scorer = Scorer(6, 4)
        score = lambda v: torch.func.functional_call(  # noqa: E731
            scorer, {"q_proj.weight": wq, "q_proj.bias": bq, "k_proj.weight": wk, "k_proj.bias": bk}, (v,)
        )
        return selector.selector_loss(
            [features[:9], features[9:]], [2, 3], score, lambda gated: torch.cat(gated).pow(3).sum(), weight=0.3
        ).total

    inputs = [torch.randn(16, 6, dtype=torch.float64, generator=generator), *weights]
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs], eps=1e-6, atol=1e-6)


def test_scopes_of_a_batch_do_not_see_each_other():
    scorer = golden_scorer()
    sizes, counts = [16, 5, 9], [4, 1, 3]
    scopes = [X[:n] + n for n in sizes]
    together = selector.gate(scopes, counts, scorer)
    for scope, k, gated, mask, hard in zip(
        scopes, counts, together.features, together.mask.split(sizes), together.hard.split(sizes), strict=True
    ):
        alone = selector.gate(scope, k, scorer)
        torch.testing.assert_close(gated, alone.features[0])
        torch.testing.assert_close(mask, alone.mask)
        assert torch.equal(hard, alone.hard)
        assert mask.sum().item() == pytest.approx(k, abs=1e-6)
        assert hard.sum() == k


def test_float32_masks_inside_a_bfloat16_model():
    scorer = Scorer(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = selector.selector_loss(X.bfloat16(), 4, scorer, lambda f: f[0].float().square().mean())
    assert made.gates.features[0].dtype == torch.bfloat16
    assert made.gates.mask.dtype == made.bce.dtype == torch.float32
    assert made.gates.mask.sum().item() == pytest.approx(4, abs=1e-5)
    made.total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in scorer.parameters())


def test_training_starts_with_an_even_mask_and_a_live_gradient():
    torch.manual_seed(0)
    scorer = Scorer(64)
    features = torch.randn(50, 64)
    made = selector.selector_loss(features, 10, scorer, lambda f: (f[0][:10] * features[:10]).sum())
    torch.testing.assert_close(made.gates.mask, torch.full((50,), 0.2), atol=1e-3, rtol=0)
    assert made.entropy.item() == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8), abs=1e-3)
    made.total.backward()
    assert scorer.q_proj.weight.grad.abs().max() > 0
    assert scorer.k_proj.weight.grad.abs().max() > 0


def test_curriculum_and_entropy():
    assert [selector.curriculum(step, 100) for step in (0, 50, 100, 200)] == pytest.approx([0.1, 1.05, 2.0, 2.0])
    assert selector.curriculum(3, 0) == 2.0
    assert selector.mask_entropy(torch.tensor([0.0, 1.0])).item() == 0
    assert selector.mask_entropy(torch.tensor([0.5])).item() == pytest.approx(math.log(2))


def test_k_of_a_training_scope():
    fifth = parse_budget(0.2)
    assert [selector.training_count(n, fifth) for n in (2, 5, 9, 64)] == [1, 1, 1, 12]
    assert selector.training_count(64, fifth, upstream_exact=True) == 12
    assert selector.training_count(100, parse_budget(0.29)) == 29  # int() of the product would give 28
    assert selector.training_count(100, parse_budget(0.29), upstream_exact=True) == 28
    for n, budget, exact in ((1, fifth, False), (4, fifth, True), (8, Tokens(8), False), (8, parse_budget(1.0), False)):
        with pytest.raises(InputError, match="0 < k < N"):
            selector.training_count(n, budget, exact)
    for k in (0, 16, 17):
        with pytest.raises(InputError, match="0 < k < N"):
            selector.selector_loss(X, k, golden_scorer())
    with pytest.raises(InputError, match="2 numbers"):
        selector.gate([X], [1, 2], golden_scorer())


# --- Dynamic-Qwen -----------------------------------------------------------------------------------------------------


def test_temperature_falls_geometrically():
    assert [dynamic.temperature(s, 10) for s in (0, 5, 10, 12)] == pytest.approx([1.0, 0.1**0.5, 0.1, 0.1])


def test_keep_decisions_are_hard_and_pass_the_relaxed_gradient():
    logp = torch.randn(200, 2, dtype=torch.float64).log_softmax(-1).requires_grad_()
    torch.manual_seed(1)
    keep = dynamic.keep_decisions(logp, 0.7)
    assert set(keep.detach().round(decimals=9).tolist()) == {0.0, 1.0}
    torch.manual_seed(1)
    soft = F.gumbel_softmax(logp, tau=0.7, hard=False)[:, 0]
    weights = torch.randn(200, dtype=torch.float64)
    (ours,) = torch.autograd.grad((keep * weights).sum(), logp)
    (relaxed,) = torch.autograd.grad((soft * weights).sum(), logp)
    torch.testing.assert_close(ours, relaxed)
    certain = torch.tensor([[0.0, -40.0]]).expand(50, 2)
    assert dynamic.keep_decisions(certain.bfloat16(), 1.0).tolist() == [1.0] * 50


def test_mean_keep_loss_over_the_batch_or_by_sample():
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])]
    assert dynamic.mean_keep_loss(rows, 0.2).item() == pytest.approx(100 * 0.3**2)
    assert dynamic.mean_keep_loss([torch.ones(1), torch.zeros(3)], 0.25).item() == pytest.approx(0)
    by_sample = dynamic.mean_keep_loss([torch.ones(1), torch.zeros(3)], 0.25, per_sample=True)
    assert by_sample.item() == pytest.approx(100 * (0.75**2 + 0.25**2) / 2)


def naive_policy_attention(z, policy, allowed, eps, n_of_row):
    size = len(z)
    made = torch.zeros(size, size, dtype=z.dtype)
    for i in range(size):
        p = [1.0 if i == j else policy[j] for j in range(size)]
        top = max(z[i, j] for j in range(size) if allowed[i, j])
        e = [torch.exp(z[i, j] - top) * p[j] if allowed[i, j] else torch.zeros((), dtype=z.dtype) for j in range(size)]
        for j in range(size):
            extra = eps / n_of_row(i) if n_of_row is not None and (allowed[i, j] or n_of_row(i) == size) else 0.0
            made[i, j] = (e[j] + extra) / (sum(e) + eps)
    return made


@pytest.mark.parametrize("exact", [False, True])
def test_policy_attention_is_the_formula(exact):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    policy = torch.tensor([1, 1, 0, 1, 0, 0, 1], dtype=torch.float64)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    n_of_row = (lambda i: 7) if exact else (lambda i: int(allowed[i].sum()))
    expected = naive_policy_attention(z, policy, allowed, 1e-3, n_of_row)
    ours = dynamic.policy_attention(z, policy, allowed, eps=1e-3, upstream_exact=exact)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours.sum(-1), torch.ones(7, dtype=torch.float64))
    assert (ours[~allowed] == 0).all() != exact  # the published form leaks a little


def test_policy_attention_hides_what_is_dropped_and_what_is_forbidden():
    z = torch.randn(2, 3, 6, 6)
    policy = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])[:, None]
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    a = dynamic.policy_attention(z, policy, allowed)
    assert a[0, :, 2:, 1].max() < 1e-5  # dropped, apart from the share of eps
    assert (a[:, :, 0, 1:] == 0).all()
    everything = z.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(a[1], everything[1], atol=1e-5, rtol=1e-4)
    nothing = dynamic.policy_attention(z, policy, torch.zeros(6, 6, dtype=torch.bool))
    torch.testing.assert_close(nothing, torch.eye(6).expand(2, 3, 6, 6))


def test_policy_attention_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 5, dtype=torch.float64, generator=generator).requires_grad_()
    policy = torch.rand(5, dtype=torch.float64, generator=generator).requires_grad_()
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.autograd.gradcheck(lambda z, p: dynamic.policy_attention(z, p, allowed), (z, policy))
