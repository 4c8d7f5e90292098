"""Compressors: the contract, the registry and one file for each baseline method."""

from __future__ import annotations

from .base import (
    Budget,
    Compressor,
    EncoderTrace,
    Host,
    InputError,
    ScoreCompressor,
    Selection,
    Share,
    Tokens,
    VisualTokens,
    as_compressor,
    parse_budget,
    top_k,
)
from .registry import available, build

__all__ = [
    "Budget",
    "Compressor",
    "EncoderTrace",
    "Host",
    "InputError",
    "ScoreCompressor",
    "Selection",
    "Share",
    "Tokens",
    "VisualTokens",
    "as_compressor",
    "available",
    "build",
    "parse_budget",
    "top_k",
]
