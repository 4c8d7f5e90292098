"""What a smoke run is expected to give, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.registry import BUILTIN
from visionselector_eval.harness.store.files import canonical_json

EXPECTATION = "smoke.expected.json"
"""Where the expectation is, in the current folder, unless `--expect` names another file."""


SUITE = "smoke"
"""The suite that is asked for by default: every embedded benchmark."""


# What a run without flags and without an expectation asks for. Device, precision and attention are definite: an
# expectation made on a machine with a GPU must hold on one without. Two documents a batch, so that batching is covered.
DEFAULTS: dict[str, Any] = {
    "backbones": ["tiny"],
    "methods": [name for name in BUILTIN if name != "full"],
    "budgets": ["0.2"],
    "suite": SUITE,
    "limit": 4,
    "seeds": [0],
    "batch_size": 2,
    "device": "cpu",
    "dtype": "float32",
    "attn_implementation": "sdpa",
}


RUN_NAME = "smoke"  # of the run, by which a folder is known to be ours


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Strict):
    """What a smoke run asks for; names are those of the flags of `sweep`."""

    backbones: list[dict[str, Any]]
    methods: list[dict[str, Any]]
    budgets: list[str]
    tasks: list[str]
    limit: int
    seeds: list[int]
    batch_size: int
    device: str
    dtype: str
    attn_implementation: str

    def differing(self, other: Settings) -> list[str]:
        """Names of the settings that are not the same; the order of a list does not matter."""
        return [name for name in type(self).model_fields if self._items(name) != other._items(name)]

    def shown(self, name: str) -> str:
        """One setting as flag and value; a method by its name in tables."""
        flag = {"backbones": "pretrained"}.get(name, name).replace("_", "-")
        value = getattr(self, name)
        items = [_short(item) for item in value] if isinstance(value, list) else [value]
        return f"--{flag} {' '.join(map(str, items))}"

    def _items(self, name: str) -> list[str]:
        value = getattr(self, name)
        return sorted(map(canonical_json, value if isinstance(value, list) else [value]))


def _short(item: Any) -> str:
    if not isinstance(item, Mapping):
        return str(item)
    if "pretrained" in item:
        return str(item["pretrained"]) + (f" --revision {item['revision']}" if item.get("revision") else "")
    # a label of one's own does not say which options it stands for
    options = f" {item['options']}" if item.get("options") and "[" not in item["label"] else ""
    return f"{item['label']}{options}"


class Cell(_Strict):
    """What is compared of one cell."""

    backbone: str
    method: str = Field(description="the method's name in tables, options included")
    budget: str
    task: str
    seed: int
    metric: str
    score: float | None
    scale: float | None = Field(description="largest possible score; None: not known")
    kept_tokens: float | None = Field(description="mean over the documents that have visual tokens")
    total_tokens: float | None
    answers: dict[str, str] = Field(description="by lmms-eval task and document number")

    @property
    def title(self) -> str:
        """The cell in one line."""
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.backbone} {self.method} @ {self.budget} on {self.task}{seed}"


class Expectation(_Strict):
    """The content of the expectation file: what was asked for, with what, and what came."""

    format: Literal[1] = 1
    settings: Settings
    made_with: dict[str, str] = Field(description="versions and processor")
    inputs: dict[str, str] = Field(
        description="hashes of checkpoints, documents and prompts; they explain a difference"
    )
    cells: list[Cell]


def read(path: Path) -> Expectation:
    """The expectation in a file.

    Raises:
        InputError: missing, or not what `smoke --update` writes.
    """
    try:
        return Expectation.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"there is no expectation '{path}' to compare with: make one with `smoke --update` and commit it"
        ) from None
    except OSError as error:
        raise InputError(f"the expectation '{path}' can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"'{path}' is not an expectation that this version reads ({f'{where}: ' if where else ''}{first['msg']}): "
            "delete it and make a new one with `smoke --update`"
        ) from error
