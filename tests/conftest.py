"""Shared fixtures: the embedded checkpoint, loaded once; never the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits for the first


@pytest.fixture(scope="session")
def tiny():
    """The embedded backbone, float32, sdpa."""
    from visionselector_eval.models import load_backbone

    return load_backbone("tiny")


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """A LLaVA-1.5 checkpoint of random weights."""
    from llava_checkpoint import save_llava

    return save_llava(tmp_path_factory.mktemp("llava") / "llava-tiny")


@pytest.fixture(scope="session")
def llava(llava_folder):
    """That checkpoint, float32, sdpa."""
    from visionselector_eval.models import load_backbone

    return load_backbone(llava_folder)


@pytest.fixture(scope="session")
def tiny_eager():
    """The embedded backbone, float32, eager attention."""
    from visionselector_eval.models import load_backbone

    return load_backbone("tiny", attn_implementation="eager")
