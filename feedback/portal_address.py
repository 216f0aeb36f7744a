"""Addresses at which a portal can be."""

import httpx

from yuan.config import FieldError
from yuan.data.text import make_printable

MAX_SHOWN_URL_CHARACTERS = 80
MAX_URL_PORT = 65535


def check_portal_url(url: str) -> None:
    """Reject an address at which no portal can be.

    Raises:
        FieldError: if it is not http or https, or lacks a host, or has a port that does not exist, a password, a query
            or a fragment; its field is `url`.

    >>> check_portal_url("https://portal.example/yuan")
    >>> check_portal_url("http://127.0.0.1:99999")
    Traceback (most recent call last):
    yuan.config.FieldError: url must have a port from 1 to 65535, got 'http://127.0.0.1:99999'; correct it
    """
    if fault := _find_url_fault(url):
        raise FieldError(["url"], f"must {fault}, got {make_printable(url, MAX_SHOWN_URL_CHARACTERS)!r}; correct it")


def _find_url_fault(url: str) -> str | None:
    """Return the rule that a portal's address breaks, behind "must"; None if it breaks none."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        return f"be an address such as http://HOST:PORT ({str(error).rstrip('.')})"
    if parts.scheme not in ("http", "https") or not parts.host or any(letter.isspace() for letter in url):
        return "begin with http:// or https:// and name a host"
    if parts.port is not None and not 1 <= parts.port <= MAX_URL_PORT:
        return f"have a port from 1 to {MAX_URL_PORT}"
    if parts.userinfo or parts.query or parts.fragment:
        return "have no user, query or fragment, since the token is an option of its own"
    return None
