"""Documents and checkpoints that can't be answered, and the seeds of sampled answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from visionselector_eval.baselines import InputError, build, parse_budget
from visionselector_eval.models.answering import Answerer, CompressorAtBudget, Request

FULL = CompressorAtBudget(build("full"), parse_budget(1.0))
SAMPLED = {"temperature": 8.0, "max_new_tokens": 12}  # the embedded model is sure of its answers


def request(key: str, text: str = "What is it?", size: tuple[int, int] = (56, 56), repetition: int = 0) -> Request:
    parts = [{"type": "image", "image": Image.new("RGB", size, (200, 30, 30))}, {"type": "text", "text": text}]
    return Request(
        key=key,
        messages=lambda: [{"role": "user", "content": parts}],
        generation=SAMPLED,
        repetition=repetition,
    )


def texts(answerer: Answerer, requests: list[Request], seed: int = 0, method: str = "full") -> list[str]:
    setting = CompressorAtBudget(build(method), parse_budget(1.0), seed)
    return [a.text for a in answerer.answer(answerer.prepare(requests, [setting]), setting)]


# documents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (request("long", size=(9000, 12)), "processor refused the input"),
        (request("image", "Is <|image_pad|> an image?"), r"invalid prompt text.*<\|image_pad\|>"),
        (request("video", "Is <|video_pad|> a video?"), r"invalid prompt text.*<\|video_pad\|>"),
    ],
)
def test_what_a_processor_refuses_is_bad_input(broken, reason, tiny):
    with pytest.raises(InputError, match=reason) as refused:
        Answerer(tiny).prepare([request("before"), broken, request("behind")], [FULL])
    assert "\n" not in str(refused.value)


# checkpoints ---------------------------------------------------------------------------------------------------------


@contextmanager
def broken_weights(backbone, value: float) -> Iterator[None]:
    weight = backbone.model.model.language_model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["full", "fastv"])
@pytest.mark.parametrize("generation", [{"max_new_tokens": 3}, SAMPLED])
def test_logits_that_are_not_finite_give_no_answer(value, method, generation, tiny):
    inputs = Answerer(tiny).inputs([request("a"), request("b")])
    with broken_weights(tiny, value):
        with pytest.raises(InputError, match="logits are not finite"):
            tiny.generate(inputs, build(method), 0.5, do_sample="temperature" in generation, **generation)
        with pytest.raises(InputError, match="logits are not finite"):
            tiny.prefill(inputs, build(method), 0.5)
    assert not tiny.model.lm_head._forward_hooks
    tiny.generate(inputs, build(method), 0.5, **generation)


# seeds ---------------------------------------------------------------------------------------------------------------


def test_samples_follow_seed_document_and_repetition(tiny):
    answerer = Answerer(tiny)
    first = texts(answerer, [request("a")])
    assert texts(answerer, [request("a")]) == first
    others = [
        texts(answerer, [request("a")], seed=1),
        texts(answerer, [request("b")]),
        texts(answerer, [request("a", repetition=1)]),
    ]
    assert len({*map(tuple, others), tuple(first)}) == 4


def test_a_sample_does_not_depend_on_its_batch_or_the_method(tiny):
    """Common random numbers: at budget 1.0 every method draws what `full` draws."""
    answerer = Answerer(tiny)
    asked = [request("a"), request("b"), request("a", repetition=1)]
    together = texts(answerer, asked)
    assert together == [texts(answerer, [one])[0] for one in asked]
    assert together == texts(answerer, asked, method="divprune")


def test_sampling_leaves_the_random_state_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts(Answerer(tiny), [request("a")])
    assert torch.initial_seed() == 5
    assert torch.equal(torch.rand(3), expected)
