"""What is trained: a module beside a frozen backbone, or parts of the backbone, with the forward that gives the loss.

A learner's only child holds what is trained: the trainer, the optimiser, data parallelism and checkpoints never see
what is frozen. The full-length forward goes through the backbone's public modules and hooks, as at inference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.dynamic_qwen.predictor import Predictor, load_predictor
from visionselector_eval.models.dynamic_qwen.training import (
    keep_decisions,
    mean_keep_loss,
    policy_attention,
    temperature,
)
from visionselector_eval.models.loading import load_backbone
from visionselector_eval.models.planes import Planes
from visionselector_eval.models.splice import CompressedPrompt, Encoded, Prompt
from visionselector_eval.models.training.data import IGNORED, Conversations
from visionselector_eval.models.training.export import KINDS, save_learned
from visionselector_eval.models.training.spec import CompressorSpec, PredictorSpec, SelectorSpec, TrainSpec
from visionselector_eval.models.visionselector.scorer import Scorer, load_scorer
from visionselector_eval.models.visionselector.training import curriculum, selector_loss, training_count

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

POLICY_ATTENTION = "visionselector_eval_policy"
"""Name under which the attention with a policy is registered with transformers."""


@dataclass(frozen=True)
class Outcome:
    """Loss of a micro-batch, and what to log of it.

    Attributes:
        loss: scalar with gradient.
        parts: scalars without gradient, averaged over micro-batches and processes.
        schedules: numbers that follow from the step alone.
        left_out: why samples were left out, one line each.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    schedules: dict[str, float]
    left_out: tuple[str, ...] = ()


class Learner(nn.Module, ABC):
    """What is trained (`learned`, float32), with a backbone of which everything else is frozen.

    Args:
        backbone: loaded; its parameters are frozen here.
        learned: what is trained: a module beside the backbone, or one made of the backbone's own.
        spec: the training.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the micro-batch; the trainer averages over micro-batches

    def __init__(self, backbone: Backbone, learned: nn.Module, spec: TrainSpec) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec
        backbone.model.requires_grad_(False).eval()
        self.learned = learned.float().requires_grad_(True)
        if spec.gradient_checkpointing:
            enable = getattr(
                backbone.model, "activation_checkpointing_enable", None
            )  # its name since transformers 5.2x
            (enable or backbone.model.gradient_checkpointing_enable)({"use_reentrant": False})
            for layer in backbone.layer_access.layers:  # checkpointing asks for training mode; nothing there drops out
                layer.train()

    @classmethod
    def load(cls, spec: Any, device: str) -> Backbone:
        """The backbone that a spec trains beside, or of which it trains parts.

        Raises:
            InputError: a checkpoint that can't be loaded, or not be trained in this way.
        """
        return load_backbone(spec.pretrained, device, spec.dtype, spec.attn_implementation, revision=spec.revision)

    @classmethod
    @abstractmethod
    def build(cls, backbone: Backbone, spec: Any) -> Learner:
        """The learner of a spec for a backbone from `load`."""

    def check(self, data: Conversations) -> None:
        """Refuse data that nothing can be learned from, before the training begins."""
        return

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the result; the configuration with `about` comes last: it is the completion record."""
        save_learned(folder, self.learned, KINDS[self.spec.kind], about)

    def forward(self, batch: Mapping[str, Any], step: int, total: int) -> Outcome:
        """Loss of a batch from `Collator` after `step` of `total` optimiser steps.

        Raises:
            InputError: an image with too few tokens for the budget, unless such samples are to be left out.
        """
        if not batch["places"]:  # every sample of the micro-batch was left out; other processes wait for this one
            return Outcome(self.nothing(self.backbone.device), {}, {})
        return self.loss(batch, step, total)

    @abstractmethod
    def loss(self, batch: Mapping[str, Any], step: int, total: int) -> Outcome:
        """`forward` for a batch that has samples."""

    @staticmethod
    def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the backbone reads of a batch."""
        return {k: v for k, v in batch.items() if k not in ("labels", "places", "skipped", "error")}

    def _language_loss(self, prompt: Prompt, embeds: Tensor, labels: Tensor, planes: Planes = ()) -> Tensor:
        """Mean cross-entropy of the answers' tokens, float32; logits are made for these places alone.

        Args:
            prompt: full-length prompts.
            embeds: (B, S, D) with visual features in their places.
            labels: (B, S).
            planes: of all visual tokens.
        """
        rows = len(labels)
        whole = CompressedPrompt(
            input_ids=prompt.input_ids,
            embeds=embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            kept=[],
            totals=[0] * rows,
            scores=[None] * rows,
            visual=prompt.visual,
            question=prompt.question,
            items=[[] for _ in range(rows)],
            planes=planes,
        )
        with self.backbone.hooked(whole):
            hidden, _ = self.backbone.forward(whole)
        following = labels[:, 1:]
        learned = following != IGNORED
        logits = self.backbone.model.get_output_embeddings()(hidden[:, :-1][learned])
        return F.cross_entropy(logits.float(), following[learned])

    def _joined(self, prompt: Prompt, features: list[Tensor]) -> Tensor:
        """(B, S, D) embeddings with visual features in their places."""
        return prompt.embeds.masked_scatter(prompt.visual[..., None], torch.cat(features).to(prompt.embeds.dtype))

    def nothing(self, device: torch.device) -> Tensor:
        """0 with a gradient of 0 for every parameter, so that data-parallel processes agree on what was used."""
        return sum((p.sum() * 0 for p in self.learned.parameters()), torch.zeros((), device=device))


class CompressorLearner(Learner):
    """Trains a module that chooses among visual tokens, beside a backbone that is frozen whole."""

    spec: CompressorSpec

    def __init__(self, backbone: Backbone, learned: nn.Module, spec: CompressorSpec) -> None:
        super().__init__(backbone, learned, spec)
        self.budget = spec.budget

    def _read(self, batch: Mapping[str, Any]) -> tuple[Prompt, Encoded, list[int]]:
        """The prompts, their encoded images, and which prompt each image belongs to; nothing with gradient."""
        inputs = self._inputs(batch)
        prompt = self.backbone.prompt(inputs, batch["places"])
        # The encoder sees no padding: its mask only serves the backbone's check of left-padded prompts.
        everything = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        encoded = self.backbone.encode(everything, frozenset())
        return prompt, encoded, [row for row, items in enumerate(encoded.rows) for _ in items]


class SelectorLearner(CompressorLearner):
    """Trains VisionSelector's scorer: visual tokens are scaled by the soft top-k mask, all stay (arXiv 2510.16598).

    Features that enter behind deeper layers are scaled by the same mask: what is dropped enters nowhere.
    """

    spec: SelectorSpec
    learned: Scorer

    @classmethod
    def build(cls, backbone: Backbone, spec: SelectorSpec) -> SelectorLearner:
        """With a new scorer from the spec's seed, or that of `init`.

        Raises:
            InputError: `init` that can't be read, or of another size.
        """
        if spec.init is not None:
            scorer = load_scorer(spec.init)
            if scorer.width != backbone.width or spec.hidden not in (None, scorer.hidden):
                raise InputError(
                    f"init '{spec.init}' has width {scorer.width} and hidden {scorer.hidden}, but "
                    f"{backbone.id} has width {backbone.width} and the spec hidden={spec.hidden}"
                )
        else:
            with seeded(spec.seed):
                scorer = Scorer(backbone.width, spec.hidden)
                for projection in (scorer.q_proj, scorer.k_proj):
                    nn.init.normal_(projection.weight, std=spec.init_std)
        return cls(backbone, scorer.to(backbone.device), spec)

    def loss(self, batch: Mapping[str, Any], step: int, total: int) -> Outcome:
        prompt, encoded, owners = self._read(batch)
        weight = curriculum(step, total, self.spec.lambda_start, self.spec.lambda_end)
        if not owners:
            loss = self._language_loss(prompt, prompt.embeds, batch["labels"])
            return Outcome(loss + self.nothing(loss.device), {"loss_language": loss.detach()}, {"lambda": weight})
        # Planes stand beside the features of their tokens, so that one mask scales both: (N, D * (1 + planes)).
        scopes = [torch.cat([item.features, *item.planes], dim=1) for row in encoded.rows for item in row]
        sizes = [[len(item.features) for item in row] for row in encoded.rows]
        labels, left_out = batch["labels"], []
        width = self.backbone.width
        if self.spec.upstream_exact:
            scopes, owners = [torch.cat(scopes)], owners[:1]
        counts: dict[int, int] = {}  # scope -> k
        for number, (scope, owner) in enumerate(zip(scopes, owners, strict=True)):
            try:
                counts[number] = training_count(len(scope), self.budget, self.spec.upstream_exact)
            except InputError as error:
                reason = f"{batch['places'][owner]}: {error}"
                if self.spec.on_bad_sample == "fail":
                    raise InputError(reason) from error
                left_out.append(reason)
                labels = labels.clone()
                labels[slice(None) if self.spec.upstream_exact else owner] = IGNORED
        learned = [number for number in counts if self.spec.upstream_exact or bool((labels[owners[number]] >= 0).any())]
        if not learned:
            return Outcome(self.nothing(labels.device), {}, {"lambda": weight}, tuple(left_out))

        def language(gated: list[Tensor]) -> Tensor:
            whole = list(scopes)
            for number, rows in zip(learned, gated, strict=True):
                whole[number] = rows
            features, *planes = torch.cat(whole).split(width, dim=1)
            by_row = tuple(plane.split([sum(row) for row in sizes]) for plane in planes)
            return self._language_loss(prompt, self._joined(prompt, [features]), labels, by_row)

        made = selector_loss(
            [scopes[number] for number in learned],
            [counts[number] for number in learned],
            lambda rows: self.learned(rows[:, :width]),
            language,
            weight,
        )
        kept = made.gates.hard.mean()
        parts = {
            "loss_language": made.task.detach(),
            "loss_mask": made.bce.detach(),
            "mask_entropy": made.entropy,
            "kept_share": kept,
        }
        return Outcome(made.total, parts, {"lambda": weight}, tuple(left_out))


class PredictorLearner(CompressorLearner):
    """Trains Dynamic-Qwen's predictor: dropped tokens stay in the sequence but nobody attends to them (2412.00876).

    Attention with a policy needs its weights written out, (B, H, S, S) in float32, from the predictor's layer on.
    """

    spec: PredictorSpec
    learned: Predictor

    @classmethod
    def build(cls, backbone: Backbone, spec: PredictorSpec) -> PredictorLearner:
        """With a new predictor from the spec's seed, sized by the backbone, or that of `init`.

        Raises:
            InputError: `init` that can't be read, or of another width; a layer that the backbone does not have.
        """
        if spec.layer >= backbone.depth:
            raise InputError(f"layer={spec.layer} of dynamic-qwen: {backbone.id} has layers 0 to {backbone.depth - 1}")
        if spec.init is not None:
            predictor = load_predictor(spec.init)
            if predictor.width != backbone.width:
                raise InputError(
                    f"init '{spec.init}' has width {predictor.width}, but {backbone.id} has {backbone.width}"
                )
        else:
            with seeded(spec.seed):
                predictor = Predictor(backbone.width, spec.hidden, blocks=spec.blocks)
        return cls(backbone, predictor.to(backbone.device).train(), spec)

    def __init__(self, backbone: Backbone, learned: nn.Module, spec: CompressorSpec) -> None:
        super().__init__(backbone, learned, spec)
        register_policy_attention()
        backbone.model.set_attn_implementation({"text_config": POLICY_ATTENTION})

    def loss(self, batch: Mapping[str, Any], step: int, total: int) -> Outcome:
        prompt, encoded, owners = self._read(batch)
        tau = temperature(step, total, self.spec.tau_start, self.spec.tau_end)
        if not owners:
            loss = self._language_loss(prompt, prompt.embeds, batch["labels"])
            return Outcome(loss + self.nothing(loss.device), {"loss_language": loss.detach()}, {"tau": tau})
        sizes = [[len(item.features) for item in row] for row in encoded.rows]
        embeds = self._joined(prompt, [item.features for row in encoded.rows for item in row])
        with self._policy(prompt.visual, sizes, tau) as keep:
            language = self._language_loss(prompt, embeds, batch["labels"], encoded.planes)
        assert isinstance(self.budget, Share)
        bound = mean_keep_loss(keep, self.budget.ratio, 1.0, self.spec.keep_mean == "sample")
        parts = {
            "loss_language": language.detach(),
            "loss_keep": bound.detach(),
            "kept_share": torch.cat(keep).detach().mean(),
        }
        return Outcome(language + self.spec.keep_weight * bound, parts, {"tau": tau})

    @contextmanager
    def _policy(self, visual: Tensor, sizes: list[list[int]], tau: float) -> Iterator[list[Tensor]]:
        """While the block runs, layers from the predictor's on attend by its decisions; yields these, (N,) a prompt."""
        keep: list[Tensor] = []
        policy: list[Tensor] = []

        def decide(states: Tensor) -> None:
            keep.clear()
            rows = [sum(parts) for parts in sizes if parts]
            # As published all images of the micro-batch are one scope: its samples are packed into one sequence.
            parts = [sum(rows)] if self.spec.upstream_exact else [part for row in sizes for part in row]
            scopes = states[visual].split(parts)
            keep.extend(torch.cat([keep_decisions(self.learned(scope), tau) for scope in scopes]).split(rows))
            ones = torch.ones(visual.shape, dtype=keep[0].dtype, device=visual.device)
            policy[:] = [ones.masked_scatter(visual, torch.cat(keep))]

        def hook(number: int) -> Callable[..., Any]:
            def pre(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if number == self.spec.layer:
                    decide(args[0] if args else kwargs["hidden_states"])
                exact = {"visual_policy_exact": self.spec.upstream_exact}
                return args, {**kwargs, "visual_policy": policy[0], **exact}

            return pre

        handles = []
        try:
            for number, layer in enumerate(self.backbone.layer_access.layers):
                if number >= self.spec.layer:
                    handles.append(layer.register_forward_pre_hook(hook(number), with_kwargs=True))
            yield keep
        finally:
            for handle in handles:
                handle.remove()


def register_policy_attention() -> None:
    """Make `POLICY_ATTENTION` known to transformers, through its public interfaces; harmless when called again."""
    AttentionInterface.register(POLICY_ATTENTION, _attend)
    AttentionMaskInterface.register(POLICY_ATTENTION, eager_mask)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    visual_policy: Tensor | None = None,
    visual_policy_exact: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with a policy (B, S) over keys where the layer was given one.

    query (B, H, S, d), key and value (B, H', S, d), attention_mask (B, 1, S, S) additive; gives (B, S, H, d).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if visual_policy is None:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        logits = (query @ key.transpose(-1, -2)).float() * scaling
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        weights = policy_attention(logits, visual_policy[:, None], allowed, upstream_exact=visual_policy_exact)
        mixed = weights.to(value.dtype) @ value
    return mixed.transpose(1, 2).contiguous(), None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU from `seed`, and as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
