"""Try the address and the certificates before anything slow begins.

The address is bound and let go again; the server binds it once more when it starts, and may then find it taken.
"""

import ssl
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_UNIX, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, AddressFamily, socket

from vllm.utils.network_utils import is_valid_ipv6_address

from hidrop_server.errors import StartError


def check_listening(args: Namespace) -> None:
    """Try to bind the port or the Unix socket, and to read the certificates; StartError names the flag at fault."""
    with refused_in_one_line(args), socket(_family(args), SOCK_STREAM) as probe:
        if args.uds is not None:
            probe.bind(args.uds)
            Path(args.uds).unlink()
        else:
            probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)  # as vLLM's: what a connection left behind is in nobody's way
            probe.bind((args.host or "", args.port))
    _check_certificates(args)


@contextmanager
def refused_in_one_line(args: Namespace) -> Iterator[None]:
    """Turn a failure to bind (address, port or permission) into a StartError of one line."""
    where = f"--uds {args.uds}" if args.uds is not None else f"--host {args.host or '0.0.0.0'} --port {args.port}"
    try:
        yield
    except OSError as error:
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from None
    except (OverflowError, UnicodeError, ValueError) as error:  # no port, no name of a host
        raise StartError(f"cannot listen on {where}: {error}") from None


def _family(args: Namespace) -> AddressFamily:
    if args.uds is not None:
        return AF_UNIX
    return AF_INET6 if is_valid_ipv6_address(args.host or "") else AF_INET


class _EncryptedError(Exception):
    """The key asks for a password, which only a person at the terminal has."""


def _check_certificates(args: Namespace) -> None:
    if not args.ssl_certfile and not args.ssl_keyfile:
        return
    if not args.ssl_certfile:
        raise StartError("--ssl-keyfile needs --ssl-certfile")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with suppress(_EncryptedError):
            context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=_ask_nobody)
        if args.ssl_ca_certs:
            context.load_verify_locations(args.ssl_ca_certs)
        if args.ssl_ciphers:
            context.set_ciphers(args.ssl_ciphers)
    except (OSError, ValueError) as error:
        files = " ".join(name for name in (args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs) if name)
        raise StartError(f"cannot use {files} for TLS: {getattr(error, 'strerror', None) or error}") from None


def _ask_nobody() -> str:
    raise _EncryptedError
