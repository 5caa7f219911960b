"""Where a URL that a stranger wrote may lead, on real loopback HTTP; no engine."""

import asyncio
from collections.abc import Iterator
from ipaddress import ip_network
from types import SimpleNamespace

import pytest
from vllm import envs

from hidrop_server.media.addresses import is_public
from hidrop_server.media.fetching import CheckedConnection
from hidrop_server.media.images import MediaRefused
from tests.server.media.stranger import MEBIBYTES, PICTURE, Files, stranger

LOOPBACK = (ip_network("127.0.0.0/8"),)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Files]]:
    envs.disable_envs_cache()  # an engine of an earlier test has frozen them
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", str(MEBIBYTES - 1))
    with stranger() as files:
        yield files


def fetch(connection: CheckedConnection, files: type[Files], path: str, host: str = "localhost") -> bytes:
    url = f"http://{host}:{files.port}/{path}"
    return asyncio.run(connection.async_get_bytes(url, timeout=30))


def refusal(connection: CheckedConnection, files: type[Files], path: str, host: str = "localhost") -> str:
    with pytest.raises(MediaRefused) as caught:
        fetch(connection, files, path, host)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "224.0.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
    ],
)
def test_an_address_that_is_not_of_the_open_internet_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_an_address_of_the_open_internet_is_public(address: str) -> None:
    assert is_public(address)


def test_every_byte_counts_in_the_requests_budget(files: type[Files]) -> None:
    charged: list[int] = []
    connection = CheckedConnection(["localhost"], LOOPBACK)
    url = f"http://localhost:{files.port}/picture"
    budget = SimpleNamespace(charge=charged.append)
    assert sum(charged) == 0
    found = connection.get_bytes(url, timeout=30, request_budget=budget)
    assert sum(charged) == len(found) > 0


def test_an_allowed_network_is_allowed_and_no_other() -> None:
    assert is_public("10.1.2.3", [ip_network("10.1.0.0/16")])
    assert not is_public("10.2.2.3", [ip_network("10.1.0.0/16")])


def test_an_allowed_domain_is_fetched(files: type[Files]) -> None:
    assert fetch(CheckedConnection(["localhost"], LOOPBACK), files, "picture") == PICTURE


def test_a_domain_that_is_not_allowed_is_not_asked(files: type[Files]) -> None:
    assert "--allowed-media-domains" in refusal(CheckedConnection(["example.org"], LOOPBACK), files, "picture")
    assert files.seen == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433"])
def test_an_allowed_domain_that_leads_to_loopback_is_not_asked(files: type[Files], host: str) -> None:
    refusal(CheckedConnection([host, "127.0.0.1"]), files, "picture", host)
    assert files.seen == []


def test_the_address_that_was_checked_is_the_one_connected_to(
    files: type[Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose second answer differs from its first: the classic way around a check."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    asked = []

    async def rebinding(loop: object, host: str, port: int, **kwargs: object) -> object:
        asked.append(host)
        return [(2, 1, 6, "", (next(answers), port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rebinding)
    connected = []

    async def refuse(loop: object, sock: object, address: object) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("asyncio.selector_events.BaseSelectorEventLoop.sock_connect", refuse)
    refusal(CheckedConnection(["images.example"]), files, "picture", "images.example")
    assert asked == ["images.example"]
    assert [address[0] for address in connected] == ["93.184.216.34"]  # type: ignore[index]


def test_a_redirect_within_the_allowed_domains_is_followed(files: type[Files]) -> None:
    connection = CheckedConnection(["localhost", "127.0.0.1"], LOOPBACK)
    assert fetch(connection, files, "to/http://127.0.0.1@/picture") == PICTURE
    assert fetch(connection, files, "to//picture") == PICTURE, "relative"


@pytest.mark.parametrize(
    ("says", "target"),
    [
        ("--allowed-media-domains", "http://127.0.0.1@/picture"),
        ("http and https", "file:///etc/passwd"),
        ("--allowed-media-domains", "http://169.254.169.254/latest/meta-data"),
    ],
)
def test_a_redirect_to_elsewhere_is_not_followed(files: type[Files], says: str, target: str) -> None:
    connection = CheckedConnection(["localhost"], LOOPBACK)
    assert says in refusal(connection, files, f"to/{target}")
    assert len(files.seen) == 1


def test_a_redirect_of_a_public_name_to_loopback_is_not_followed(files: type[Files]) -> None:
    """Both names are allowed, but only one address is."""
    connection = CheckedConnection(["localhost", "127.0.0.2"], [ip_network("127.0.0.1/32"), ip_network("::1/128")])
    assert "not public" in refusal(connection, files, "to/http://127.0.0.2@/picture")
    assert len(files.seen) == 1


def test_credentials_in_a_url_are_refused(files: type[Files]) -> None:
    said = refusal(CheckedConnection(["localhost"], LOOPBACK), files, "picture", "user:secret@localhost")
    assert "credentials" in said
    assert "secret" not in said
    assert files.seen == []


def test_redirects_end(files: type[Files]) -> None:
    connection = CheckedConnection(["localhost"], LOOPBACK)
    assert "redirects" in refusal(connection, files, "to/" * 8 + "picture")


@pytest.mark.parametrize("path", ["large", "declared"])
def test_a_file_over_the_limit_is_not_read_to_its_end(files: type[Files], path: str) -> None:
    connection = CheckedConnection(["localhost"], LOOPBACK)
    assert "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB" in refusal(connection, files, path)


def test_what_is_not_there_is_the_urls_fault(files: type[Files]) -> None:
    connection = CheckedConnection(["localhost", "no-such-name.invalid"], LOOPBACK)
    assert "404" in refusal(connection, files, "nothing")
    assert "no-such-name.invalid" in refusal(connection, files, "picture", "no-such-name.invalid")
