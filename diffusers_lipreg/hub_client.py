"""Bound the waits of the Hub's client, which has no time limit and waits as long as any server tells it to."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import get_session, set_client_factory

ANSWER = 60.0  # seconds for a connection, and for each part of a request and its answer
RETRY_AFTER = 60  # seconds


def bound_waiting() -> None:
    """Set time limits for all downloads and uploads of huggingface_hub, and for Xet, which moves large files."""
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{ANSWER:g}s")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
    client = get_session()
    hooks = client.event_hooks
    if _bound_answer in hooks["request"]:
        return
    bounded = {"request": hooks["request"] + [_bound_answer], "response": hooks["response"] + [_bound_retry]}
    # The class is httpx's or httpx2's, depending on the release of huggingface_hub.
    client_class, follow_redirects = type(client), client.follow_redirects
    set_client_factory(lambda: client_class(event_hooks=bounded, follow_redirects=follow_redirects))


def _bound_answer(request: Any) -> None:
    given = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: min(given.get(kind) or ANSWER, ANSWER) for kind in kinds}


def _bound_retry(response: Any) -> None:
    # A rate limit names its seconds as t: "api";r=0;t=55
    for header, seconds in (("Retry-After", r"^\d+"), ("RateLimit", r"(?<=t=)\d+")):
        if header in response.headers:
            value = response.headers[header]
            response.headers[header] = re.sub(seconds, lambda n: str(min(int(n[0]), RETRY_AFTER)), value)
