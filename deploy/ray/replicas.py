"""Ray Serve in front of several `hidrop serve` processes: each replica starts one server and passes requests on to it.

    pip install -r deploy/ray/requirements.txt       # an environment of its own: Ray needs none of our packages
    HIDROP=/opt/hidrop/bin/hidrop python deploy/ray/replicas.py -- --max-num-queued-reqs 64  # flags of hidrop serve

Prometheus scrapes the servers themselves, on ports 8101, 8102 and so on: Ray does not pass their metrics on. When a
server dies, its replica ends: requests in flight get a 500, later ones another replica, and Ray starts a new replica.
"""

import argparse
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

FIRST_PORT = 8101
START_SECONDS = 1200.0
DRAIN_SECONDS = 30.0  # more than --shutdown-timeout, 20 s
OF_ONE_CONNECTION = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "date", "server"}


@serve.deployment(
    max_ongoing_requests=256,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=DRAIN_SECONDS,
    max_queued_requests=256,
)
class Hidrop:
    """One `hidrop serve` process and the HTTP client that passes requests on to it."""

    def __init__(self, command: str, flags: Sequence[str]) -> None:
        port = FIRST_PORT + serve.get_replica_context().rank.rank
        self.url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while self._answers("/health"):  # the server of a replica that was killed still drains
            time.sleep(0.5)
        self.server = subprocess.Popen(
            # The kernel sends SIGTERM to a server whose replica was killed.
            ["setpriv", "--pdeathsig", "TERM", command, "serve", *flags, "--host", "127.0.0.1", "--port", str(port)],
            start_new_session=True,
        )
        while not self._answers("/ready"):
            if self.server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"hidrop serve did not start: exit code {self.server.returncode}")
            time.sleep(0.5)
        self.session: aiohttp.ClientSession | None = None
        threading.Thread(target=self._die_with_server, daemon=True).start()

    def _die_with_server(self) -> None:
        self.server.wait()
        os._exit(1)  # Ray notices at once, where a health check has to fail three times

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5):
                return True
        except OSError:
            return False

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises three times."""
        session = self._session()
        async with session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(10)) as answer:
            answer.raise_for_status()

    async def __call__(self, request: Request) -> Response:
        """Pass a request on to the server, and the server's answer back chunk by chunk."""
        target = f"{self.url}{request.url.path}?{request.url.query}"
        body, headers = await request.body(), _passed_on(request.headers)
        try:
            answer = await self._session().request(request.method, target, data=body, headers=headers)
        except aiohttp.ClientError as error:
            return Response(f"the server of this replica is gone: {error}", 503, {"Retry-After": "1"})
        return StreamingResponse(_chunks(answer), answer.status, _passed_on(answer.headers))

    def _session(self) -> aiohttp.ClientSession:
        """The HTTP client, made on first use: it belongs to the event loop of the replica."""
        if self.session is None:
            no_limit = aiohttp.ClientTimeout(total=None)  # the server has its own: --request-timeout
            connector = aiohttp.TCPConnector(limit=0)
            self.session = aiohttp.ClientSession(timeout=no_limit, connector=connector, auto_decompress=False)
        return self.session


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:  # a client that goes away closes this, and the server aborts its request
        async for chunk in answer.content.iter_any():
            yield chunk


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in OF_ONE_CONNECTION}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="hidrop serve behind Ray Serve, on loopback")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("flags", nargs="*", help="of hidrop serve, after --")
    chosen = parser.parse_args()
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": chosen.port})
    deployment = Hidrop.options(
        num_replicas=chosen.replicas, ray_actor_options={"num_cpus": 1, "num_gpus": chosen.gpus}
    )
    serve.run(deployment.bind(os.environ.get("HIDROP", "hidrop"), chosen.flags), route_prefix="/", blocking=True)
