"""`dynamic_qwen`: keeps the visual tokens that a trained predictor inside the LLM wants to keep."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Host, Selection, weights_digest
from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.decoder import DecoderCompressor, DecoderView
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import top_k
from visionselector_eval.models.dynamic_qwen.predictor import MARK, Predictor, load_predictor


@dataclass(frozen=True, kw_only=True)
class DynamicQwen(DecoderCompressor):
    """Drops, two layers into the LLM, the visual tokens that a trained predictor does not want to keep.

    The predictor reads the visual tokens' hidden states at the input of layer `layer`; those with the largest
    log-probability of being kept stay, at their own positions. The weights are those given as `predictor`, else
    `*.image_score_predictor.*` in the checkpoint of the backbone that it is bound to; scores in float32. Source:
    Dynamic-LLaVA, arXiv 2412.00876. Canonically each image or video is judged alone and keeps exactly K.
    `upstream_exact`: all of a prompt's together, and int(r * S) with S the length of the whole prompt, text included,
    so that short pictures in long prompts keep everything. Upstream also takes the text between two images for visual
    tokens; here it does not.
    """

    name = "dynamic_qwen"
    trained = True
    paper = "Dynamic-LLaVA, arXiv 2412.00876 (as Dynamic-Qwen)"
    deviations = "K of the visual tokens, not of the whole prompt; text between images is no visual token; any width"
    cost = "time O(N D M + N^2 M) with M channels inside, memory O(N (D + M))"

    predictor: str | Predictor | None = field(
        default=None,
        metadata={"help": "predictor weights: folder, .safetensors or .bin file, or hub id; default: the checkpoint's"},
    )
    layer: int = field(default=2, metadata={"help": "tokens are dropped at the input of this layer (0-based)"})

    def __post_init__(self) -> None:
        if isinstance(self.predictor, PathLike):
            object.__setattr__(self, "predictor", fspath(self.predictor))
        given = self.predictor
        if not (given is None or isinstance(given, Predictor) or (isinstance(given, str) and given)):
            raise InputError(
                f"invalid option predictor={given!r} of method 'dynamic_qwen': expected a folder, "
                "a .safetensors or .bin file, or a hub id (in Python also a Predictor)"
            )
        if self.layer < 1:
            raise InputError(f"option layer={self.layer} of method 'dynamic_qwen': give 1 or more (the paper's is 2)")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        if self.upstream_exact and isinstance(budget, Share):
            return (min(n, max(1, int(budget.ratio * total))),)
        return (self.count(n, budget),)

    def bind(self, host: Host) -> DynamicQwen:
        """A copy that holds its predictor, checked against the backbone's width and depth.

        Raises:
            InputError: no predictor given nor in the backbone's checkpoint, one of another width, or one that cannot be
                read; a layer that the backbone does not have.
        """
        if host.depth:
            self.check_layers(host.depth)
        if self.predictor is not None:
            source, module = self.predictor if isinstance(self.predictor, str) else "given as a module", self._module
        else:
            source = f"of checkpoint {host.id}"
            own = {name: tensor for name, tensor in host.extra_weights.items() if MARK in name}
            if not own:
                raise InputError(
                    f"dynamic_qwen needs predictor weights: checkpoint {host.id} has no {MARK}*; "
                    "give predictor=FOLDER_OR_ID"
                )
            module = Predictor.from_state(own, host.id)
        if module.width != host.width:
            raise InputError(
                f"predictor {source} has width {module.width} but backbone {host.id} has {host.width}: "
                "give one trained for it"
            )
        bound = dataclasses.replace(self)
        vars(bound)["_module"] = module  # seeds the cached property; no field, since it is no option
        return bound

    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        scores = self.score(view.hidden[view.visual[members]])
        return Selection(kept=top_k(scores, count), scores=scores)

    def score(self, states: Tensor) -> Tensor:
        """(N,) log-probability of being kept for the (N, D) states of one scope."""
        with torch.no_grad():
            return self._on(states.device)(states)[:, 0]

    def fingerprint(self) -> str:
        """sha256 of a given predictor's weights by value; empty where they come from the backbone's checkpoint."""
        if self.predictor is None:
            return ""
        return weights_digest(self._module)

    @cached_property
    def _module(self) -> Predictor:
        """The predictor, read at its first use (`bind` puts it here for a bound one)."""
        if isinstance(self.predictor, Predictor):
            return self.predictor
        if self.predictor is None:
            raise InputError(
                "dynamic_qwen needs predictor weights: give predictor=FOLDER_OR_ID, or bind it to a backbone "
                f"whose checkpoint has {MARK}*"
            )
        return load_predictor(self.predictor)

    @cached_property
    def _copies(self) -> dict[torch.device, Predictor]:
        return {}

    def _on(self, device: torch.device) -> Predictor:
        """The predictor on `device`, copied there once."""
        if self._module.in_proj.weight.device == device:
            return self._module
        if device not in self._copies:
            self._copies[device] = deepcopy(self._module).to(device)
        return self._copies[device]
