"""Compressors: the contract, the registry and one file for each baseline method. Names are loaded at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionselector_eval.baselines.contract.base import (
        Compressor,
        EncoderTrace,
        Host,
        ScoreCompressor,
        Selection,
        VisualTokens,
    )
    from visionselector_eval.baselines.contract.budget import Budget, Share, Tokens, parse_budget
    from visionselector_eval.baselines.contract.decoder import DecoderCompressor, DecoderView, ScoreDecoder
    from visionselector_eval.baselines.contract.errors import InputError
    from visionselector_eval.baselines.contract.numerics import top_k
    from visionselector_eval.baselines.contract.registry import available, build

_HOME = {
    **dict.fromkeys(("Budget", "Share", "Tokens", "parse_budget"), "budget"),
    **dict.fromkeys(("DecoderCompressor", "DecoderView", "ScoreDecoder"), "decoder"),
    "InputError": "errors",
    "top_k": "numerics",
    **dict.fromkeys(("available", "build"), "registry"),
}

__all__ = [
    "Budget",
    "Compressor",
    "DecoderCompressor",
    "DecoderView",
    "EncoderTrace",
    "Host",
    "InputError",
    "ScoreCompressor",
    "ScoreDecoder",
    "Selection",
    "Share",
    "Tokens",
    "VisualTokens",
    "available",
    "build",
    "parse_budget",
    "top_k",
]


def __getattr__(name: str) -> Any:
    # Budgets, errors and names are asked for by commands that should not wait for torch (report, --help).
    if name in __all__:
        return getattr(import_module(f".contract.{_HOME.get(name, 'base')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
