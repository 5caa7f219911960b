"""`--ssl-certfile` and `--ssl-keyfile` reach uvicorn through our command line; no engine."""

import asyncio
import datetime
import ipaddress
import ssl
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import serve_http, setup_server

from hidrop_server.app import uvicorn_options
from hidrop_server.control.arguments import parse
from vllm_hidrop.cli.local_server import LOOPBACK, free_port


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate for loopback and its key, for an hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = directory / "certificate.pem", directory / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


async def ask_over_tls(arguments: list[str], certificate: Path) -> dict[str, str]:
    args = parse(None, arguments)
    _, sock = setup_server(args, reuse_port=False)
    app = FastAPI()
    app.state.engine_client = None
    app.get("/")(lambda: {"said": "yes"})
    serving = asyncio.create_task(serve_http(app, sock=sock, **uvicorn_options(args)))
    try:
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=certificate)) as http:
            for _ in range(600):
                with suppress(httpx.ConnectError):
                    answer = await http.get(f"https://{LOOPBACK}:{args.port}/")
                    found: dict[str, str] = answer.json()
                    return found
                await asyncio.sleep(0.1)
        pytest.fail("no answer over TLS")
    finally:
        app.state.server.should_exit = True
        await (await serving)
        sock.close()


def test_a_certificate_on_the_command_line_is_served(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    flags = ["--host", LOOPBACK, "--port", str(free_port())]
    flags += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    assert asyncio.run(ask_over_tls(flags, certificate)) == {"said": "yes"}
