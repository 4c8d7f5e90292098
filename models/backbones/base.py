"""What every backbone offers: encode, compress, prefill, generate. An adapter adds what is special about its family."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from visionselector_eval.baselines.contract.base import Compressor, EncoderTrace, Host, checked_compressor
from visionselector_eval.baselines.contract.budget import Budget, Share, parse_budget
from visionselector_eval.baselines.contract.decoder import DecoderCompressor
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models import planes
from visionselector_eval.models.decoder_pruning import DecoderPruning, refuse_unusual_generation
from visionselector_eval.models.decoder_view import Entered, LayerAccess, entered
from visionselector_eval.models.instrumentation import step
from visionselector_eval.models.question import Question
from visionselector_eval.models.splice import CompressedPrompt, Encoded, Prompt, prompt_key, splice

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity): check the checkpoint's weights, or choose another dtype "
    "(float16 overflows where bfloat16 and float32 do not)"
)

ALL_TRACES = frozenset(field.name for field in fields(EncoderTrace) if field.name != "at_layers")
AT_LAYERS = ALL_TRACES & {"received", "keys", "keys_concat", "cls"}
"""What of a trace can be had of any block of the encoder."""


def block_of(need: str, ranking: int, depth: int) -> int:
    """The block of the encoder, counted from 0, that a name such as "received@16" asks for.

    Args:
        need: a name of `Compressor.needs`, without alternatives.
        ranking: the block of names without a number.
        depth: blocks of the encoder.

    Raises:
        InputError: a block that there is not.
    """
    name, _, number = need.partition("@")
    if not number:
        return ranking
    if name not in AT_LAYERS or not re.fullmatch(r"-?\d+", number) or not -depth <= int(number) < depth:
        raise InputError(
            f"invalid need '{need}' of a method: expected one of {', '.join(sorted(AT_LAYERS))} at a block from 0 to "
            f"{depth - 1} of the vision encoder"
        )
    return int(number) % depth


@dataclass(frozen=True)
class PrefillOutput:
    """What one prefill saw and gave.

    Attributes:
        kept: for each sample the visual indices that reached the last layer, ascending, CPU; 0 is the first visual
            token of that prompt.
        totals: for each sample its visual tokens before compression.
        scores: for each sample (N,) or None: the compressor's scores, for images.
        position_ids: (3, B, S') int64 ((B, S') for backbones with 1-D positions); 0 on padding. S' is the last layer's.
        attention_mask: (B, S') int64, 0 on (left) padding.
        hidden: (B, S', D) after the final norm.
        logits: (B, vocab) float32 at the last prompt position.
        layer_lengths: tokens entering each LLM layer, the largest of the batch.
        layer_tokens: for each sample its visual tokens, averaged over the layers: what to compare methods at.
    """

    kept: list[Tensor]
    totals: list[int]
    scores: list[Tensor | None]
    position_ids: Tensor
    attention_mask: Tensor
    hidden: Tensor
    logits: Tensor
    layer_lengths: list[int]
    layer_tokens: list[float]


class Foreign(Protocol):
    """A checkpoint in another layout than transformers'."""

    @property
    def config(self) -> Any:
        """As transformers has it."""

    def processor(self) -> Any:
        """As transformers has it."""

    def generation_config(self) -> Any:
        """As transformers has it."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All tensors by the names of transformers' model, and those of learned methods by their own."""


class Backbone(ABC):
    """A loaded multimodal LLM behind one interface; model classes are used as they are, through public modules.

    Attributes:
        id: path or hub id it was loaded from.
        revision: hub commit, or a hash of the folder's files.
        model, processor: the transformers objects.
        host: what compressors may know of it.
        question: finds the question's tokens in a prompt.
    """

    model_class: ClassVar[Any]  # the transformers class that `load_backbone` loads the weights with
    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]]]  # the family's `apply_rotary_pos_emb`, a static method
    traces: ClassVar[frozenset[str]]  # fields of `EncoderTrace` that its vision encoder can tell
    ranking_block: int  # the block of the vision encoder whose attention ranks tokens, counted from 0

    def __init__(
        self, model: Any, processor: Any, *, id: str, revision: str, extra_weights: Mapping[str, Tensor]
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.id = id
        self.revision = revision
        self.host = Host(
            id=id,
            width=self.width,
            extra_weights=extra_weights,
            depth=self.depth,
            traces=self.traces,
            encoder_depth=self.encoder_depth,
        )
        self.question = Question(processor)
        self._bound: dict[Compressor, Compressor] = {}

    @classmethod
    def model_class_for(cls, config: Any) -> Any:
        """The transformers class of a checkpoint with this configuration."""
        return cls.model_class

    @classmethod
    def foreign(
        cls, source: str, located: str, revision: str | None, raw: Mapping[str, Any], learned: Callable[[str], bool]
    ) -> Foreign | None:
        """A checkpoint in a layout that is not transformers', made readable; None for one that is.

        Args:
            source: as the user wrote it.
            located: folder or hub id.
            revision: on the hub.
            raw: fields of its config.json.
            learned: whether a tensor of this name is a learned method's, which goes beside the backbone.
        """
        return None

    # What an adapter must say -----------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, inputs: Mapping[str, Any], needs: frozenset[str] = ALL_TRACES) -> Encoded:
        """Run the vision encoder once for a batch; the result serves any number of compressors and budgets.

        Args:
            inputs: what the processor returned.
            needs: what compressors may ask for later, as in `Compressor.needs`; what this encoder can't tell is left
                out. Capturing it costs memory for one block's input; it is computed at first use.
        """

    @abstractmethod
    def prompt(self, inputs: Mapping[str, Any], keys: Sequence[str]) -> Prompt:
        """Embeddings, positions, and where visual tokens stand, before any compression."""

    @abstractmethod
    def resize(self, inputs: Mapping[str, Any], compressor: Compressor, budget: Budget) -> dict[str, Any]:
        """`inputs` with pixels lowered by a compressor of stage `pixels`."""

    # What is the same for all -----------------------------------------------------------------------------------------

    # What a profile asks ----------------------------------------------------------------------------------------------

    def vision_flops(self, inputs: Mapping[str, Any]) -> int | None:
        """FLOPs that the shape of the vision encoder asks for; None where it is not described."""
        return None

    @classmethod
    def config_of(
        cls, text: Mapping[str, Any], vision: Mapping[str, Any], tokenizer: Any, *, tied: bool, **more: Any
    ) -> Any:
        """The transformers configuration of a model of these sizes, with the token ids of `tokenizer`.

        Args:
            text, vision: sizes of the LLM and of the vision encoder, over the family's own values.
            tied: whether the LLM's input and output embeddings are one.
            more: what else the family's shapes have (`fused`).
        """
        raise NotImplementedError

    @classmethod
    def processor_of(cls, vision: Mapping[str, Any], processor: Any, **more: Any) -> Any:
        """A processor for a model of these sizes, made of the embedded checkpoint's; `more` as for `config_of`."""
        return processor

    @property
    def width(self) -> int:
        """D, the size of the LLM's embeddings."""
        return self.model.config.text_config.hidden_size

    @property
    def depth(self) -> int:
        """Layers of the LLM."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def encoder_blocks(self) -> Sequence[Any]:
        """The blocks of the vision encoder; none where it tells nothing of them."""
        return ()

    @property
    def encoder_depth(self) -> int:
        """Blocks of the vision encoder."""
        return len(self.encoder_blocks)

    @property
    def layer_access(self) -> LayerAccess:
        """The LLM's parts that decoder-stage methods read."""
        return LayerAccess(self.model.model.language_model, self.rotate)

    def llm_positions(self, compressed: CompressedPrompt) -> Tensor:
        """Positions as the stock LLM takes them; (B, S') for plain ones."""
        return compressed.position_ids[0]

    def forward(self, compressed: CompressedPrompt) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S', D) after the final norm and last logits (B, vocab), by the stock forward."""
        hidden = self.model.model.language_model(
            inputs_embeds=compressed.embeds,
            attention_mask=compressed.attention_mask,
            position_ids=self.llm_positions(compressed),
            use_cache=False,
        ).last_hidden_state
        return hidden, self.model.lm_head(hidden[:, -1])

    def stock_generate(self, compressed: CompressedPrompt, **generation: Any) -> Tensor:
        """New tokens (B, T) by the stock `generate()`."""
        # input_ids go along so that a repetition penalty sees the prompt, as it does in the stock model; they must come
        # before position_ids, whose first dimension would else be taken for the batch size.
        output = self.model.generate(
            input_ids=compressed.input_ids,
            inputs_embeds=compressed.embeds,
            attention_mask=compressed.attention_mask,
            position_ids=self.llm_positions(compressed),
            **generation,
        )
        return output[:, compressed.input_ids.shape[1] :]

    @property
    def remark(self) -> str:
        """What tables say beside the backbone's name; empty for most."""
        return ""

    def offered(self, needs: frozenset[str]) -> frozenset[str]:
        """What of `EncoderTrace` serves `needs` here: of alternatives ("cls|received") the first.

        Raises:
            InputError: a block that the encoder does not have.
        """
        firsts = (next((n for n in need.split("|") if n.partition("@")[0] in self.traces), None) for need in needs)
        names = frozenset(name for name in firsts if name is not None)
        for name in names:
            block_of(name, 0, self.encoder_depth)
        return names

    @property
    def device(self) -> torch.device:
        """Where the prompt's tensors go."""
        return self.model.device

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        end = self.model.generation_config.eos_token_id
        return frozenset([end] if isinstance(end, int) else end or ())

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs` with tensors on the backbone's device; checks that the batch is left-padded."""
        moved = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if v is not None}
        ids = moved.get("input_ids")
        if ids is None or ids.ndim != 2:
            raise InputError("inputs have no (B, S) input_ids: pass what the backbone's processor returns")
        mask = moved.setdefault("attention_mask", torch.ones_like(ids))
        if not bool(mask[:, -1].all()):
            raise InputError("the batch is padded on the right: use processor(..., padding=True, padding_side='left')")
        return moved

    def bind(self, compressor: Any) -> Compressor:
        """`compressor` made ready for this backbone; weights are looked up once."""
        compressor = checked_compressor(compressor)
        if compressor.stage == "decoder" and not isinstance(compressor, DecoderCompressor):
            raise InputError(
                f"method '{compressor.name}' has stage 'decoder': it must be a DecoderCompressor "
                "(visionselector_eval.baselines.contract.base)"
            )
        try:
            if compressor not in self._bound:
                self._bound[compressor] = compressor.bind(self.host)
            return self._bound[compressor]
        except TypeError:  # an option that can't be hashed, such as a list: bind it each time
            return compressor.bind(self.host)

    @torch.no_grad()
    def compress(
        self,
        inputs: Mapping[str, Any],
        compressor: Any,
        budget: Budget | float | str = 1.0,
        *,
        encoded: Encoded | None = None,
        keys: Sequence[str] | None = None,
    ) -> CompressedPrompt:
        """The prompt after compression, ready for the LLM. Parameters as in `prefill`."""
        inputs = self.to_device(inputs)
        method, share = self.bind(compressor), parse_budget(budget)
        method.check_budget(share)
        if keys is None:
            mask = inputs["attention_mask"].bool()
            keys = [prompt_key(row[m]) for row, m in zip(inputs["input_ids"], mask, strict=True)]
        if method.stage == "pixels" and share != Share(1.0):
            full = [sum(item.features.shape[0] for item in row) for row in encoded.rows] if encoded else None
            with step("compressor"):
                shorter = self.resize(inputs, method, share)
            with step("vision"):
                smaller = self.encode(shorter, frozenset())
            result = splice(self.prompt(shorter, keys), smaller, method, Share(1.0))
            totals = full if full is not None else self.visual_totals(inputs)
            return replace(result, totals=totals)
        first, before, inside = method, share, None
        if isinstance(method, DecoderCompressor):
            inside = (method, share) if share != Share(1.0) else None
            if method.before is None:
                before = Share(1.0)
            else:
                first = method.before
        if encoded is None:
            with step("vision"):
                encoded = self.encode(inputs, first.needs)
        return replace(splice(self.prompt(inputs, keys), encoded, first, before), decoder=inside)

    @torch.no_grad()
    def run_llm(self, compressed: CompressedPrompt) -> PrefillOutput:
        """Run the LLM over a prompt from `compress`, dropping tokens inside it where the method says so.

        Raises:
            InputError: logits that are not finite.
        """
        with self.hooked(compressed) as pruning:
            hidden, logits = self.forward(compressed)
        seen = pruning.outcome() if pruning else entered(compressed, self.depth)
        if not bool(torch.isfinite(logits).all()):
            raise InputError(_NOT_FINITE)
        positions = seen.position_ids
        return PrefillOutput(
            kept=seen.kept,
            totals=compressed.totals,
            scores=seen.scores,
            position_ids=positions if positions.shape[0] > 1 else positions[0],
            attention_mask=seen.attention_mask,
            hidden=hidden,
            logits=logits.float(),
            layer_lengths=seen.layer_lengths,
            layer_tokens=seen.layer_tokens,
        )

    @torch.no_grad()
    def run_generate(self, compressed: CompressedPrompt, **generation: Any) -> tuple[Tensor, Entered]:
        """New tokens (B, T) for a prompt from `compress`, and what entered the LLM's layers while it was read.

        Raises:
            InputError: beam search and the like with a decoder-stage method; logits that are not finite.
        """
        if compressed.decoder is not None:
            refuse_unusual_generation(compressed.decoder[0].name, generation, self.model.generation_config)
        with self._finite_logits(), self.hooked(compressed) as pruning:
            tokens = self.stock_generate(compressed, **generation)
        return tokens, pruning.outcome() if pruning else entered(compressed, self.depth)

    @contextmanager
    def hooked(self, compressed: CompressedPrompt) -> Iterator[DecoderPruning | None]:
        """The hooks that a prompt needs inside the LLM: those that drop tokens there, and those that add planes."""
        pruning = DecoderPruning(self.layer_access, compressed) if compressed.decoder is not None else None

        def placed(layer: int) -> tuple[Tensor, Sequence[Tensor]]:
            return compressed.visual, compressed.planes[layer]

        with ExitStack() as stack:
            if pruning is not None:
                stack.enter_context(pruning.installed())
            if compressed.planes:
                at = placed if pruning is None else pruning.planes_at
                stack.enter_context(planes.added(self.layer_access.layers, len(compressed.planes), at))
            yield pruning

    @contextmanager
    def _finite_logits(self) -> Iterator[None]:
        """Refuse, when the block ends, logits that were not finite in any of its forward passes.

        The check stays on the device until then: no token waits for the host. What is not finite is shown to the
        sampler as 0, because a draw from NaN ends the process's CUDA context, and so the cells behind this one.
        """
        broken: list[Tensor] = []

        def check(module: Any, args: Any, logits: Tensor) -> Tensor:
            finite = torch.isfinite(logits[:, -1])  # earlier positions may be padding
            now = ~finite.all()
            broken[:] = [broken[0] | now] if broken else [now]
            return logits.nan_to_num(0.0, 0.0, 0.0)

        handle = self.model.get_output_embeddings().register_forward_hook(check)
        try:
            yield
        finally:
            handle.remove()
        if broken and bool(broken[0]):
            raise InputError(_NOT_FINITE)

    @abstractmethod
    def visual_totals(self, inputs: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each prompt before compression, from its placeholders."""

    @torch.no_grad()
    def prefill(
        self,
        inputs: Mapping[str, Any],
        compressor: Any,
        budget: Budget | float | str = 1.0,
        *,
        encoded: Encoded | None = None,
        keys: Sequence[str] | None = None,
    ) -> PrefillOutput:
        """Run the LLM over the compressed prompt.

        Args:
            inputs: what the processor returned: B >= 1 prompts, left-padded; any number of images and videos each.
            compressor: what `build(...)` returned.
            budget: `0.2`, `"20%"`, `Tokens(64)` or `"64tok"`: visual tokens to keep.
            encoded: from `encode`, to reuse one vision pass.
            keys: a name for each prompt (a document id), so that seeded methods draw the same in any batch; the
                prompt's token ids by default.

        Raises:
            InputError: inputs, compressor or budget that can't be used; one line says why.
        """
        return self.run_llm(self.compress(inputs, compressor, budget, encoded=encoded, keys=keys))

    @torch.no_grad()
    def generate(
        self,
        inputs: Mapping[str, Any],
        compressor: Any,
        budget: Budget | float | str = 1.0,
        *,
        encoded: Encoded | None = None,
        keys: Sequence[str] | None = None,
        **generation: Any,
    ) -> Tensor:
        """Answer with the stock `generate()` on the compressed prompt.

        Args:
            generation: as for transformers' `generate` (max_new_tokens, do_sample, temperature, repetition_penalty,
                ...); what is not given comes from the checkpoint's generation config, as in the stock model.

        Returns:
            (B, T) int64: new tokens only, padded after a row's end.
        """
        compressed = self.compress(inputs, compressor, budget, encoded=encoded, keys=keys)
        return self.run_generate(compressed, **generation)[0]
