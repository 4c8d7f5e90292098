"""The record of one cell, `cell.json`, and the columns of its samples."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from visionselector_eval.baselines.contract.budget import parse_budget
from visionselector_eval.harness.store.files import plain

SAMPLE_COLUMNS = ("doc_id", "answer", "target", "score", "kept_tokens", "total_tokens")
"""What every samples table has; `cluster` (documents with the same value are not independent) and more may
follow."""


IDENTITY = ("cell", "backbone", "method", "label", "budget", "task", "seed")
"""What `load_run` puts before them, from the cell's record, so that it is stored once and cannot disagree."""


class CellRecord(BaseModel):
    """The completion record of one cell, the content of `cell.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="name of the cell: `digest_of(settings)`")
    backbone: str = Field(description="path or hub id of the backbone")
    revision: str = Field(default="", description="commit or weights' hash of the backbone")
    remark: str = Field(
        default="", description="what tables say beside the backbone's name, such as that its LLM was retrained"
    )
    method: str = Field(description="name of the compressor")
    label: str = Field(default="", description="how tables call method + options; the method's name when empty")
    options: dict[str, Any] = Field(default_factory=dict, description="the compressor's options, defaults included")
    budget: str = Field(description="canonical text of the budget: 0.2 or 64tok")
    task: str
    seed: int = 0
    metric: str = Field(default="", description="name of the headline metric")
    score: float | None = Field(default=None, description="the headline metric; None where it could not be computed")
    metrics: dict[str, float | None] = Field(default_factory=dict, description="every metric that the task reported")
    metric_note: str = Field(default="", description="why the headline metric is a guess; empty where it is none")
    higher_is_better: bool = True
    scale: float | None = Field(default=1.0, description="largest possible score: 1, 100, 2000 (MME); None: not known")
    mean_of_documents: bool = Field(
        default=True,
        description="whether `score` is the mean of the samples' scores (false for F1, MME, corpus metrics)",
    )
    cluster_key: str | None = Field(default=None, description="field of the document that the samples' `cluster` holds")
    n_documents: int = 0
    needs_submission: bool = Field(default=False, description="scored by the benchmark's server: a file was written")
    n_skipped: int = Field(default=0, description="documents that could not be read and count as unanswered")
    kept_tokens: float | None = Field(default=None, description="mean over documents that have visual tokens, measured")
    total_tokens: float | None = Field(
        default=None, description="the same mean of the visual tokens before compression"
    )
    layer_tokens: float | None = Field(
        default=None, description="the same mean of the visual tokens averaged over the LLM's layers"
    )
    status: Literal["done", "failed"] = "done"
    error: str | None = Field(default=None, description="why the cell failed")
    seconds: float = 0.0
    version: str = Field(default="", description="version of visionselector-eval")
    finished_at: str = Field(default="", description="UTC, ISO 8601")
    context: str = Field(
        default="",
        description="digest of the settings that a cell must share with the full row it is compared with; "
        "cells whose contexts are given and differ are never compared",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="everything that the digest covers")

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> str:
        return str(parse_budget(value))

    @field_validator("score", "kept_tokens", "total_tokens", "layer_tokens", mode="after")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        # JSON has no nan; None says the same: there is no number.
        return value if value is None or math.isfinite(value) else None

    @field_validator("metrics", mode="after")
    @classmethod
    def _finite_values(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        return {key: cls._finite(number) for key, number in value.items()}

    @field_validator("options", "settings", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)


RECORD_COLUMNS = tuple(CellRecord.model_fields)


JSON_COLUMNS = ("options", "metrics", "settings")
