"""Keep passwords out of files and messages."""

from __future__ import annotations

import re

# A password may hold any character, so it extends to the last @ of the line.
_URL_PASSWORD = re.compile(r"(\w://[^\s/:@]*):.*@")
_URL_TOKEN = re.compile(r"(https?://)[^\s/:@]+@")
_QUERY_PASSWORD = re.compile(r"([?&](?:password|passwd|pwd|token|api_key)=)[^&\s'\"]*", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """Replace passwords in URLs by `***`.

    >>> mask_credentials("postgresql://me:secret@host/name")
    'postgresql://me:***@host/name'
    >>> mask_credentials("mysql://host/name?user=me&password=secret")
    'mysql://host/name?user=me&password=***'
    """
    text = _URL_PASSWORD.sub(r"\1:***@", text)
    text = _URL_TOKEN.sub(r"\1***@", text)
    return _QUERY_PASSWORD.sub(r"\1***", text)
