"""`--api-server-count`: several processes of our application over one engine, with one socket and one `/metrics`.

In the order of vLLM's ``run_multi_api_server``, whose processes would serve its stock application.
"""

import signal
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from socket import socket
from typing import Any

import uvloop
from vllm.logger import configure_logging_from_args
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.system_utils import decorate_logs, set_process_title
from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor import Executor
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

from hidrop_server import app, engine
from hidrop_server.app import answer, hide_keys, interrupt, listen
from hidrop_server.control.grammars import Judge
from hidrop_server.http import exchanges
from hidrop_server.start import engine_config

TO_END_SECONDS = exchanges.END_SECONDS + app.END_SECONDS  # for a process, once its time to answer is over


def serve_several(args: Namespace, vllm_config: Any) -> int:
    """Start the engine and the API processes, serve until a signal; returns 1 if one of them died, else 0."""
    setup_multiprocess_prometheus()
    stop = _Stop(args.shutdown_timeout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address, sock = listen(args)
    with ExitStack() as ending:  # the processes end before the engine does
        listeners = bind_engine_zmq_listeners(vllm_config, args.api_server_count)
        with launch_core_engines(
            vllm_config, Executor.get_class(vllm_config), not args.disable_log_stats, listeners.addresses
        ) as launch:
            coordinator = launch.coordinator  # of several engines
            if coordinator:
                ending.callback(lambda: coordinator.shutdown(timeout=engine.END_SECONDS))
            ending.callback(lambda: launch.engine_manager.shutdown(timeout=engine.END_SECONDS))
            processes = APIServerProcessManager(
                address,
                sock,
                args,
                args.api_server_count,
                listeners.inputs,
                listeners.outputs,
                target_server_fn=_serve_one,
                stats_update_address=coordinator.get_stats_publish_address() if coordinator else None,
                tensor_queue=launch.tensor_queue,
            )
            ending.callback(lambda: processes.shutdown(timeout=stop.seconds_left + TO_END_SECONDS))
            launch.watched_frontend_processes = processes.processes
        sock.close()  # the processes', which inherited it, stay open
        try:
            wait_for_completion_or_failure(
                processes, launch.engine_manager, coordinator
            )  # returns on a KeyboardInterrupt
        except RuntimeError:  # it has logged who died
            return int(stop.deadline is None)
    return 0


class _Stop:
    """Signal handler: the first signal ends the wait, later ones do nothing; a requested stop may take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline: float | None = None  # of `time.monotonic`; None until a stop is requested

    def __call__(self, *_: object) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.seconds
            interrupt()

    @property
    def seconds_left(self) -> float:
        """Seconds left to answer requests that have begun; 0 where no stop was requested."""
        return max(0.0, self.deadline - time.monotonic()) if self.deadline is not None else 0.0


def _serve_one(address: str, sock: socket, args: Namespace, client: dict[str, Any]) -> None:
    """Run one API process; its parent has done what comes before listening.

    ``client`` is vLLM's: the engine's sockets, this process's index, and the loads of all.
    """
    signal.signal(signal.SIGTERM, interrupt)
    configure_logging_from_args(args)
    set_process_title("APIServer", str(client["client_index"]))
    decorate_logs()
    hide_keys(args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    args._api_process_rank = client["client_index"]
    vllm_config = engine_config(args)
    inherited = [sock, *(each for each in client.values() if isinstance(each, socket))]
    judge = Judge(vllm_config, args.max_grammar_seconds, inherited)
    sys.exit(uvloop.run(answer(address, sock, args, vllm_config, judge, client)))
