"""lmms-eval as a library: imported once, quietly, with the side effects of that import undone.

Importing lmms-eval takes seconds, sends its log to standard output, silences all Python warnings, and fixes video
folders from `HF_HOME`. Everything in `tasks` that needs it comes here first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import ImageFile

log = logging.getLogger("lmms_eval")


@functools.cache
def lmms_eval() -> Any:
    """The parts of lmms-eval that we use: `simple_evaluate`, `TaskManager`, `ChatMessages`, `lmms`, `tasks_folder`."""
    # Some task files read HF_HOME without a default (nextqa: KeyError) when they are imported.
    if "HF_HOME" not in os.environ:
        from huggingface_hub.constants import HF_HOME

        os.environ["HF_HOME"] = str(HF_HOME)
    first, truncated = "lmms_eval.evaluator" not in sys.modules, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        import lmms_eval as package
        from lmms_eval.api.model import lmms
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.protocol import ChatMessages
        from lmms_eval.tasks import TaskManager
    if first:
        _reroute_loguru()
    # lmms-eval turns this on for all: an image file cut off half-way would be shown with a grey rest, as if whole.
    ImageFile.LOAD_TRUNCATED_IMAGES = truncated and first
    return SimpleNamespace(
        simple_evaluate=simple_evaluate,
        TaskManager=TaskManager,
        ChatMessages=ChatMessages,
        lmms=lmms,
        tasks_folder=Path(package.__path__[0]) / "tasks",
        version=_version(),
    )


def _version() -> str:
    from importlib.metadata import version

    return version("lmms-eval")


def _reroute_loguru() -> None:
    # lmms-eval points loguru at standard output, where our tables and answers go. Ordinary logging is what people
    # configure.
    from loguru import logger

    def forward(message: Any) -> None:
        record = message.record
        log.log(record["level"].no, "%s", record["message"])

    logger.remove()
    logger.add(forward, level="WARNING", format="{message}")


@functools.cache
def _index() -> Any:
    # 1985 names in 2 s: once a process, whatever the base models.
    with quiet():
        return lmms_eval().TaskManager("ERROR")


def task_manager(base_model: str, folder: Path | None = None) -> Any:
    """An lmms-eval `TaskManager` whose prompts are those for `base_model` (e.g. "qwen2_5_vl").

    With `folder` it knows the task files of that folder alone (milliseconds), else all of upstream's (2 s the
    first time).
    """
    if folder is not None:
        with quiet():
            return lmms_eval().TaskManager(
                "ERROR", include_path=[str(folder)], include_defaults=False, model_name=base_model
            )
    manager = copy.copy(_index())
    manager.model_name = base_model
    manager.task_group_map = defaultdict(list)  # remembers loaded members and renames them on the second load
    return manager


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep progress bars and `print` of upstream code off both standard streams; yields what was said.

    Log records pass, since logging handlers hold the stream that they were given.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


@contextlib.contextmanager
def no_waiting_offline() -> Iterator[None]:
    """Offline (`HF_HUB_OFFLINE`), let upstream's loader fail at once and not after 8 s of retries."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import stop_after_attempt

    retrying = getattr(ConfigurableTask.download, "retry", None)
    if not HF_HUB_OFFLINE or retrying is None:
        yield
        return
    stop, retrying.stop = retrying.stop, stop_after_attempt(1)
    try:
        yield
    finally:
        retrying.stop = stop


@contextlib.contextmanager
def no_word_lists(task: str) -> Iterator[None]:
    """Keep NExT-QA's code from fetching word lists over the network, three for each function that its task file names.

    Only its open-ended tasks use them. Multiple choice never needs them, and without the hub nothing does.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if "nextqa" not in task or not (HF_HUB_OFFLINE or task.endswith("nextqa_mc_test")):
        yield
        return
    try:
        nltk: Any = importlib.import_module("nltk")
    except ImportError:  # upstream does without as well
        yield
        return
    original, nltk.download = nltk.download, lambda *_, **__: False
    try:
        yield
    finally:
        nltk.download = original


@contextlib.contextmanager
def no_judge() -> Iterator[None]:
    """MMBench's scoring without a server.

    Where an answer names no letter, upstream asks a judge over the network and, without a key, waits minutes for
    nothing and then guesses. Inside, the rule of upstream's own key-free variant (`mmbench_en_dev_static`) decides, for
    every language.
    """
    module = sys.modules.get("lmms_eval.tasks.mmbench.mmbench_evals")
    if module is None:  # no MMBench task is loaded
        yield
        return
    evaluator, original = module.MMBench_Evaluator, module.MMBench_Evaluator.eval_result
    evaluator.eval_result = lambda self, results, eval_method: original(self, results, "static")
    try:
        yield
    finally:
        evaluator.eval_result = original
