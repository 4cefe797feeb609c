"""Addresses in what a store says: errors end in logs that more people read than may know a password."""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["Address"]

_HIDDEN = "***"
# A password may hold what should have been quoted, so it ends at the last "@" if a ":" comes before the first "/".
_LOGIN = re.compile(r"://(?P<login>[^:/?#\s]*:[^\s]*(?=@)|[^/?#\s]*(?=@))")
_QUERY = re.compile(r"\?(?P<query>\S+)")


class Address:
    """A URL, without its login and its query for messages. Python's own errors about URLs quote pieces of them.

    Attributes:
        shown: the URL as it may be shown.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        without_login = _LOGIN.sub(f"://{_HIDDEN}", url)
        self.shown = _QUERY.sub(f"?{_HIDDEN}", without_login)
        secrets: set[str] = set()
        for match in _LOGIN.finditer(url):
            user, _, password = match["login"].partition(":")
            secrets |= {match["login"], password or user, *(part for part in re.split("[:/?#@]", password) if len(part) > 2)}
        for match in _QUERY.finditer(without_login):
            secrets |= {match["query"], *(item.partition("=")[2] for item in re.split("[&;]", match["query"]))}
        secrets |= {unquote(secret) for secret in secrets}
        self._secrets = sorted(secrets - {""}, key=len, reverse=True)

    @property
    def has_secrets(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._secrets)

    def hide(self, text: str) -> str:
        """The text without any piece of the login or the query."""
        text = text.replace(self._url, self.shown)
        for secret in self._secrets:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _HIDDEN, text)
        return text
