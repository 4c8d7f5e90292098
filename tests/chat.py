"""What a request shows: the media of its conversation."""

from __future__ import annotations

from typing import Any

from visionselector_eval.models.requests import Request


def media_of(request: Request, kind: str) -> list[Any]:
    """The images (`kind` "image") or videos ("video") of a request, in order."""
    return [part[kind] for turn in request.messages() for part in turn["content"] if part["type"] == kind]
