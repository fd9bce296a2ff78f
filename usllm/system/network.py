"""Whether a server can be reached, found out at once instead of in several tries with growing pauses."""

from __future__ import annotations

import os
import re
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from usllm.system.errors import RunError, UserError

_SECONDS = 5.0
_UNREACHABLE = re.compile(r"connect|offline|reach|resolve host|name resolution|timed? ?out", re.IGNORECASE)
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@lru_cache(maxsize=1)
def leave_unreachable_hub() -> None:
    """Let the hub's client look into its cache alone, for the rest of the process, where the hub does not answer."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and unreachable(constants.ENDPOINT) is not None:
        constants.HF_HUB_OFFLINE = True


def unreachable(address: str) -> str | None:
    """Why the server of a web address cannot be reached; ``None`` where it can, or where only a proxy knows."""
    if any(os.environ.get(name) for name in _PROXIES):
        return None
    place = urlsplit(address)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((str(place.hostname), port), timeout=_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def network_or_user_error(message: str, cause: BaseException) -> UserError:
    """``message`` as an error: of the network where that is the cause, else of what was asked for."""
    return RunError(message) if _UNREACHABLE.search(f"{type(cause).__name__} {cause}") else UserError(message)
