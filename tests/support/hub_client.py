"""This process as a client of the loopback Hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest
from huggingface_hub import close_session, constants, hf_api
from huggingface_hub.utils import disable_progress_bars

from support.loopback_hub import ACCOUNTS, LoopbackHub


@contextmanager
def client_of_loopback_hub() -> Iterator[LoopbackHub]:
    """Yield a running Hub; huggingface_hub asks no other, and begins with an empty cache."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as cache, LoopbackHub(ACCOUNTS) as hub:
        for name in list(os.environ):  # the caller's own settings, which subprocesses would inherit
            if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
                patch.delenv(name)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        # The client asks some things outside HfApi(endpoint=...); the addresses have to agree.
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()  # the next one reads the proxies again
        disable_progress_bars()
        yield hub
        close_session()
