"""One question as the models take it, made of a document of lmms-eval. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visionselector_eval.models.generation import named_stops
from visionselector_eval.models.protocols import arranged, new_tokens

Messages = Sequence[Mapping[str, Any]]
"""A conversation: turns with `role` and `content`, as transformers' chat templates take them."""


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        key: names the document, for seeded methods.
        messages: gives the conversation (see `build_inputs`) when needed, so that images are decoded batch by batch.
        generation: the task's generation settings, without `until`.
        until: strings at which the answer ends.
        repetition: counts the times that the document is asked, so that each has a sample of its own.
        task, doc_id: lmms-eval's task and the position of the document in it; empty for a question of no task.
        context: the question's text with the task's prompt, without media.
    """

    key: str
    messages: Callable[[], Messages] = field(repr=False)
    generation: Mapping[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()
    repetition: int = 0
    task: str = ""
    doc_id: int = 0
    context: str = ""

    @property
    def document(self) -> tuple[str, int]:
        """What the answer belongs to: task and position of the document."""
        return self.task, self.doc_id


def request_of(
    task: str,
    doc_id: int,
    context: str,
    messages: Callable[[], Messages],
    generation: Mapping[str, Any],
    *,
    protocol: str,
    delimiter: str | None,
    overrides: Mapping[str, Any] | None = None,
    repetition: int = 0,
) -> Request:
    """A document of lmms-eval as it is asked under a protocol.

    Args:
        messages: gives the conversation that the task's own code makes.
        generation: the task's generation settings, `until` as lmms-eval fills it in.
        delimiter: the task's few-shot delimiter, which lmms-eval puts for `until` where the task names none.
        overrides: generation settings over those of the task and of the protocol.
    """
    settings = new_tokens(protocol, task, generation)
    until = named_stops(settings.pop("until", None), delimiter)
    given = dict(overrides or {})
    if "until" in given:
        until = named_stops(given.pop("until"))
    return Request(
        key=f"{task}/{doc_id}",
        messages=lambda: arranged(protocol, messages(), context),
        generation={**settings, **given},
        until=until,
        repetition=repetition,
        task=task,
        doc_id=doc_id,
        context=context,
    )
