"""Server addresses as people type them: brought into one form, or refused with the reason; no server is asked."""

import ipaddress
import re
from urllib.parse import urlsplit

EXAMPLE = "http://127.0.0.1:8000"
_PATH = re.compile(r"(/[\w.~%+@:-]+)*", re.ASCII)
_HOST = re.compile(r"[\w.:%-]+", re.ASCII)


def parse_address(text: str) -> str:
    """Base address: host in lower case, no final slash or ``/v1``, which clients add. Raises ValueError: says why."""
    address = text.strip()
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise _refusal(text, str(error)) from None
    host = (parts.hostname or "").rstrip(".")
    path = re.sub("/+", "/", parts.path).rstrip("/").removesuffix("/v1")  # a proxy's path stays
    wrong = {
        "it has no http:// or https://": parts.scheme not in ("http", "https") or "://" not in address,
        "it has spaces or control characters": re.search(r"[\s\x00-\x1f\x7f]", address) is not None,
        "it names no host": not host,
        "its host cannot be one": not _HOST.fullmatch(_ascii(host)),
        "it holds a name or a password": "@" in parts.netloc,
        "port 0 is nobody's": port == 0,
        "it has a query or a fragment": "?" in address or "#" in address,
        "its path cannot be one": not _PATH.fullmatch(path),
    }
    if reason := next((reason for reason, is_so in wrong.items() if is_so), None):
        raise _refusal(text, reason)
    shown = f"[{host}]" if ":" in host else _ascii(host)
    return f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{path}"


def is_loopback(address: str) -> bool:
    """Whether an address from :func:`parse_address` names this machine."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ascii(host: str) -> str:
    """A host name as it goes over the wire (IDNA); unchanged where it has no such form."""
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


def _refusal(text: str, reason: str) -> ValueError:
    shown = re.sub("//[^/]*@", "//...@", text)
    return ValueError(f"{shown!r} is not an address like {EXAMPLE}: {reason}")
