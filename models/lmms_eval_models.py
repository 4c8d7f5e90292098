"""The lmms-eval chat models: a backbone with a compressor, found by the stock `lmms-eval` command."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from visionselector_eval.baselines import Budget, build, parse_budget
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.registry import resolve_options
from visionselector_eval.models.answering import Answer, Answerer, CompressorAtBudget
from visionselector_eval.models.backbones import FAMILIES, Family
from visionselector_eval.models.backbones.base import Backbone
from visionselector_eval.models.inputs import MediaSettings, UnsupportedMediaError
from visionselector_eval.models.loading import default_protocol, load_backbone
from visionselector_eval.models.protocols import media_fields, new_tokens
from visionselector_eval.models.requests import Request, request_of

log = logging.getLogger(__name__)


@dataclass
class VisualTokenCounts(TokenCounts):
    """Token counts of one sample, with its visual tokens as they really entered the LLM.

    Attributes:
        visual_tokens_kept, visual_tokens_total: after and before compression.
    """

    visual_tokens_kept: int | None = None
    visual_tokens_total: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        return {
            **super().to_dict(),
            "visual_tokens_kept": self.visual_tokens_kept,
            "visual_tokens_total": self.visual_tokens_total,
        }


class CompressedModel(lmms):
    """A backbone whose visual tokens a compressor reduces; a class for each family says what is loaded by default.

    Args (`--model_args name=value,...`):
        pretrained: folder or hub id; `tiny` is the embedded checkpoint. revision: on the hub.
        method, budget: a compressor of `visionselector-eval list` and the ratio of visual tokens to keep (0.2, 20%,
            64tok).
        device, dtype, attn_implementation: as for `load_backbone`, `auto` by default.
        batch_size: samples answered together.
        protocol: pixels, frames and prompts by name (a row of `models.protocols`), by default the checkpoint's, as for
            all other commands; any field of `MediaSettings` (min_pixels, max_pixels, max_num_frames, fps,
            system_prompt, jpeg, ...) goes over it.
        backbone: (from Python) a loaded backbone to share between settings instead of `pretrained`.
        options: everything else goes to the compressor (upstream_exact=True, scorer=FOLDER, seed=1, ...).
    """

    is_simple = False
    default_pretrained: ClassVar[str]

    def __init__(
        self,
        pretrained: str | None = None,
        method: str = "full",
        budget: Budget | float | str = 1.0,
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str = "auto",
        batch_size: int | str = 1,
        revision: str | None = None,
        protocol: str | None = None,
        backbone: Backbone | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        pretrained = pretrained or self.default_pretrained
        if protocol is None and backbone is not None:
            protocol = default_protocol(backbone.id, model_type=backbone.model.config.model_type)
        self.protocol = protocol or default_protocol(pretrained, revision)
        media = {f.name: options.pop(f.name) for f in dataclasses.fields(MediaSettings) if f.name in options}
        settings = MediaSettings(**media_fields(self.protocol, media))
        source = pretrained if backbone is None else backbone.id
        self.setting = CompressorAtBudget(
            build(method, **resolve_options(method, options, source)), parse_budget(budget)
        )
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 0
        if self.batch_size < 1:
            raise InputError(f"invalid batch_size={batch_size!r}: expected a whole number of at least 1")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        if backbone is None:
            backbone = load_backbone(pretrained, device, dtype, attn_implementation, revision=revision)
        backbone.bind(self.setting.compressor)  # a method that does not fit is refused before any document is read
        self.answerer = Answerer(backbone, settings)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.answerer.backbone.device

    def clean(self) -> None:
        """Keep the model: one loaded model serves several `simple_evaluate` calls."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer lmms-eval's requests, batched where their generation settings are equal, in their own order."""
        order = utils.Collator(
            [request.args for request in requests],
            lambda args: (args[4], args[3]),  # by task and document: batches do not depend on the order of requests
            group_fn=lambda args: new_tokens(self.protocol, args[4], args[2]),
            grouping=True,
        )
        results: list[GenerationResult] = []
        answers: list[Answer] = []
        started = time.perf_counter()
        # `--seed` of the stock command reaches a model through torch alone.
        setting = dataclasses.replace(self.setting, seed=torch.initial_seed())
        repetitions: Counter[tuple[str, int]] = Counter()
        bar = tqdm(
            total=len(requests), disable=self.rank != 0, desc=f"{self.setting.compressor.name}@{self.setting.budget}"
        )
        for chunk in order.get_batched(n=self.batch_size, batch_fn=None):
            batch = []
            for args in chunk:
                batch.append(self._request(args, repetitions[args[4], args[3]]))
                repetitions[args[4], args[3]] += 1
            try:
                prepared = self.answerer.prepare(batch, [setting])
            except UnsupportedMediaError as error:
                raise InputError(f"{chunk[0][4]} can't be answered: {error}; leave this task out of --tasks") from error
            for answer in self.answerer.answer(prepared, setting):
                answers.append(answer)
                results.append(
                    GenerationResult(
                        text=answer.text,
                        token_counts=VisualTokenCounts(
                            input_tokens=answer.prompt_tokens,
                            output_tokens=answer.new_tokens,
                            visual_tokens_kept=answer.kept_tokens,
                            visual_tokens_total=answer.total_tokens,
                        ),
                    )
                )
            for args, result in zip(chunk, results[-len(chunk) :], strict=True):
                self.cache_hook.add_partial("generate_until", (args[0], args[2]), result.text)
            bar.update(len(chunk))
        bar.close()
        self._log(answers, time.perf_counter() - started)
        return order.get_original(results)

    def _request(self, args: Sequence[Any], repetition: int) -> Request:
        context, to_messages, generation, doc_id, task, split = args
        # lmms-eval hands over a method of its task object, which knows what it filled in itself.
        config = getattr(getattr(to_messages, "__self__", None), "config", None)
        return request_of(
            task,
            doc_id,
            context,
            lambda: ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id])).to_hf_messages(),
            generation,
            protocol=self.protocol,
            delimiter=getattr(config, "fewshot_delimiter", None),
            repetition=repetition,
        )

    def _log(self, answers: Sequence[Answer], elapsed: float) -> None:
        new = sum(a.new_tokens for a in answers)
        n = max(1, len(answers))
        log_metrics(
            total_gen_tokens=new,
            total_elapsed_time=elapsed,
            avg_speed=new / elapsed if elapsed > 0 else 0.0,
            additional_metrics={
                "rank": self.rank,
                "visual_tokens_kept": sum(a.kept_tokens for a in answers) / n,
                "visual_tokens_total": sum(a.total_tokens for a in answers) / n,
            },
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: compression is measured on generated answers, as in all published tables."""
        raise InputError("this model answers by generation: tasks with output_type loglikelihood can't be run with it")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: a second round would need the dropped tokens of the first."""
        raise InputError(
            "this model answers in one round: tasks with output_type generate_until_multi_round can't be run"
        )


def _class_of(family: Family) -> type[CompressedModel]:
    about = (
        f"`{family.model_id}`: {family.about}; with `protocol=lmms_eval` asked as by lmms-eval's `{family.lmms_eval}`."
    )
    return type(
        f"VisionSelector{family.class_name}",
        (CompressedModel,),
        {"__doc__": about, "__module__": __name__, "default_pretrained": family.pretrained},
    )


_CLASSES = {made.__name__: made for made in map(_class_of, FAMILIES.values())}


def __getattr__(name: str) -> type[CompressedModel]:
    # One class a family (`VisionSelectorQwen2_5_VL`, ...), made from its row.
    if name in _CLASSES:
        return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
