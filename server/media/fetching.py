"""Fetch remote media for URLs that strangers wrote: names, addresses and redirects are all checked."""

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from vllm.connections import HTTPConnection
from yarl import URL

from hidrop_server.media.addresses import Network, is_public
from hidrop_server.media.images import MediaRefused, check_size

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"User-Agent": "vllm_hidrop", "Accept-Encoding": "identity"}  # not compressed: sizes are limited as sent


class CheckedConnection(HTTPConnection):
    """vLLM's connection, for URLs that strangers wrote.

    Every hop, the first and each redirect, must name one of ``domains``, and each address that this name resolves to
    must be public or in ``networks``. The connection is made to the very addresses that were checked: a name that
    resolves differently a moment later changes nothing. No proxy, cookie or credential of the environment is used.
    """

    def __init__(self, domains: Sequence[str], networks: Sequence[Network] = ()) -> None:
        super().__init__()
        self.domains = frozenset(domain.lower() for domain in domains)
        self.networks = tuple(networks)

    def get_bytes(self, url: str, **limits: Any) -> bytes:
        """Run :meth:`async_get_bytes` in a thread without an event loop."""
        return asyncio.run(self.async_get_bytes(url, **limits))

    async def async_get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        allow_redirects: bool = True,
        max_bytes: int | None = None,
        request_budget: Any = None,
    ) -> bytes:
        """Fetch a file in at most ``timeout`` seconds altogether; MediaRefused if it is forbidden or not to be had.

        ``request_budget`` is that of all the request's files, which vLLM 0.33 counts.
        """
        target = URL(url)
        try:
            async with asyncio.timeout(timeout), self._session() as session:
                for _ in range(MAX_REDIRECTS + 1):
                    self._check(target)
                    async with session.get(target, allow_redirects=False) as response:
                        if response.status not in REDIRECTS:
                            return await _read(response, max_bytes, request_budget)
                        target = _next(target, response, allow_redirects)
        except TimeoutError:
            raise MediaRefused(f"{target.host} did not send the media within {timeout} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise MediaRefused(f"cannot fetch the media from {target.host} ({type(error).__name__})") from None
        raise MediaRefused(f"more than {MAX_REDIRECTS} redirects")

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=CheckedResolver(self.networks), use_dns_cache=False)
        jar = aiohttp.DummyCookieJar()
        return aiohttp.ClientSession(connector=connector, cookie_jar=jar, headers=HEADERS, auto_decompress=False)

    def _check(self, url: URL) -> None:
        """Check what a URL says; addresses are checked when its name is resolved, or here if its host is an address."""
        if url.scheme not in ("http", "https") or not url.host:
            raise MediaRefused("media is fetched from http and https URLs only")
        if url.host.lower() not in self.domains:
            raise MediaRefused(f"{url.host} is not one of --allowed-media-domains")
        if url.user is not None or url.password is not None:
            raise MediaRefused("a media URL must not contain credentials")
        if _is_address(url.host):
            _check_address(url.host, self.networks)


class CheckedResolver(AbstractResolver):
    """The system's resolver, with an error unless each address is public; aiohttp connects to what it returns."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self.networks = networks
        self.inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """All addresses of a name; MediaRefused if one of them is not public."""
        found = await self.inner.resolve(host, port, family)
        for each in found:
            _check_address(each["host"], self.networks)
        return found

    async def close(self) -> None:
        """Nothing is held."""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _check_address(address: str, networks: Sequence[Network]) -> None:
    """Refuse without naming the address, which would tell strangers what names mean inside this network."""
    if not is_public(address, networks):
        raise MediaRefused("the media URL leads to an address that is not public (--allowed-media-networks)")


def _next(url: URL, response: aiohttp.ClientResponse, allow_redirects: bool) -> URL:
    if not allow_redirects:
        raise MediaRefused("the media URL redirects, and VLLM_MEDIA_URL_ALLOW_REDIRECTS is 0")
    return url.join(URL(response.headers.get("Location", "")))


async def _read(response: aiohttp.ClientResponse, max_bytes: int | None, request_budget: Any = None) -> bytes:
    if response.status != 200:
        raise MediaRefused(f"{response.url.host} answered {response.status} for the media URL")
    check_size(response.content_length or 0, max_bytes)
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        check_size(len(body), max_bytes)
        if request_budget is not None:
            request_budget.charge(len(chunk))
    return bytes(body)
