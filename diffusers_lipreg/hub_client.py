"""Bounded waiting for the Hub: its client has no time limit of its own, and waits as long as any server tells it to."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import get_session, set_client_factory

ANSWER = 60.0  # seconds, for a connection and for each part of a request and its answer
RETRY_AFTER = 60  # seconds


def bound_waiting() -> None:
    """Give the client of huggingface_hub, which all downloads and uploads use, time limits; and Xet's, for large files."""
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{ANSWER:g}s")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
    client = get_session()
    hooks = client.event_hooks
    if _bound_answer in hooks["request"]:
        return
    bounded = {"request": [*hooks["request"], _bound_answer], "response": [*hooks["response"], _bound_retry]}
    kind, follow = type(client), client.follow_redirects  # httpx or httpx2, by the release of huggingface_hub
    set_client_factory(lambda: kind(event_hooks=bounded, follow_redirects=follow))


def _bound_answer(request: Any) -> None:
    given = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: min(given.get(kind) or ANSWER, ANSWER) for kind in kinds}


def _bound_retry(response: Any) -> None:
    for header in ("Retry-After", "RateLimit"):  # the second says after how many seconds, as in "api";r=0;t=55
        if header in response.headers:
            seconds = re.compile(r"^\d+|(?<=t=)\d+")
            response.headers[header] = seconds.sub(
                lambda n: str(min(int(n[0]), RETRY_AFTER)), response.headers[header]
            )
