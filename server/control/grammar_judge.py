"""The process that compiles grammars before the engine does, each in a forked child with limits of time and memory.

Grammar compilers are C++ threads: once begun, nothing in their process can stop them. The kernel ends a child that
passes its CPU time or wall time and denies it more memory, so one grammar can cost no more, and delays no other.
"""

import json
import os
import random
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from vllm_hidrop.engine.scheduler import DEAD_END

MEMORY_MIB = 512  # what compiling one grammar may add to its process
MASK_SECONDS = 0.1  # CPU time of one token's mask; the engine makes masks between two steps, while every request waits
WALK_TOKENS = 100  # length of each of the two walks through a grammar
PATIENCE = 4  # seconds of wall time for each second of CPU time: the machine may have other work
NICENESS = 10

PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # time and C++ source line at the start of XGrammar's messages

SPELLS_NOTHING = "no token of this model's vocabulary can begin what is asked for"
IS_SLOW = (
    f"a token's mask takes more than {MASK_SECONDS:g} s, which would hold up every other request: "
    "ask for fewer nested repetitions and choices that begin alike"
)


def wall_seconds(cpu_seconds: int) -> int:
    """Wall time, in seconds, after which a child is ended."""
    return PATIENCE * cpu_seconds + 1


def question(structured: StructuredOutputsParams, stop_token_ids: Sequence[int]) -> bytes:
    """The message to a child: the constraint, and the tokens that may end it."""
    fields = {name: value for name, value in asdict(structured).items() if not name.startswith("_")}
    return json.dumps({"fields": fields, "stop": sorted(stop_token_ids)}, sort_keys=True).encode()


def serve_judge(control: socket.socket, inherited: Sequence[socket.socket], config: VllmConfig, seconds: int) -> None:
    """Run the process: fork a child for every connection that arrives over ``control``, until ``control`` closes.

    ``control`` carries one byte and one connected socket for each grammar; ``inherited`` are the parent's sockets,
    closed here; ``seconds`` is the CPU time of one child.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; we end after the parent
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for each in inherited:
        each.close()
    manager = _manager(config)
    while True:
        received, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not received:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                _be_child(control, connection, lambda asked: judge(manager, config, asked), seconds)


def judge(manager: StructuredOutputManager, config: VllmConfig, asked: bytes) -> dict[str, Any]:
    """Judge one constraint: ``refused`` with the reason, or the ``backend`` and ``grammar`` that vLLM makes of it."""
    parts = json.loads(asked)
    try:
        structured = StructuredOutputsParams(**parts["fields"])
        params = SamplingParams(structured_outputs=structured)
        params._all_stop_token_ids = set(parts["stop"])
        params._validate_structured_outputs(config.model_config, config.structured_outputs_config, manager.tokenizer)
        grammar = _compile(manager, params)
    except Exception as error:  # whatever parser or compiler complains
        return {"refused": _reason(error)}
    fault = find_fault(grammar, manager, frozenset(parts["stop"]))
    if fault is not None:
        return {"refused": fault}
    return {"backend": structured._backend, "grammar": structured.grammar}


def find_fault(
    grammar: StructuredOutputGrammar, manager: StructuredOutputManager, stop_token_ids: frozenset[int]
) -> str | None:
    """Why a grammar that compiled cannot be used (no way through it has tokens, or its masks take too long), or None.

    Two walks look at masks: one takes random allowed tokens, one always the first, which goes deep into repetitions.
    """
    backend = manager.backend
    assert backend is not None
    bitmask = backend.allocate_token_bitmask(1)
    for choose in (random.Random(0).choice, lambda allowed: allowed[0]):
        is_only_way = True
        for step in range(WALK_TOKENS):
            began = time.thread_time()
            grammar.fill_bitmask(bitmask, 0)
            took = time.thread_time() - began
            allowed = _allowed(bitmask)
            if is_only_way and not allowed.size:
                return DEAD_END if step else SPELLS_NOTHING
            is_only_way = is_only_way and allowed.size == 1
            going_on = [token for token in allowed.tolist() if token not in stop_token_ids]
            if not going_on:
                break
            began = time.thread_time()
            grammar.accept_tokens("", [choose(going_on)])
            if max(took, time.thread_time() - began) > MASK_SECONDS:
                return IS_SLOW
            if grammar.is_terminated():
                break
        grammar.reset()
    return None


def _allowed(bitmask: Any) -> Any:
    """Ids of the tokens that a mask of one row allows, one bit for each token."""
    bits = np.unpackbits(bitmask[0].numpy().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def _manager(config: VllmConfig) -> StructuredOutputManager:
    """A manager of vLLM that compiles synchronously, and whose backend already exists when children are forked."""
    manager = StructuredOutputManager(config)
    manager._use_async_grammar_compilation = False
    warm = StructuredOutputsParams(regex="a")
    params = SamplingParams(structured_outputs=warm)
    with suppress(Exception):  # no tokenizer, or one that cannot spell it; the backend is made nevertheless
        params._validate_structured_outputs(config.model_config, config.structured_outputs_config, manager.tokenizer)
        _compile(manager, params)
    return manager


def _compile(manager: StructuredOutputManager, params: SamplingParams) -> StructuredOutputGrammar:
    assert params.structured_outputs is not None
    compiled = StructuredOutputRequest(params.structured_outputs)
    request: Any = SimpleNamespace(request_id="", sampling_params=params, structured_output_request=compiled)
    manager.grammar_init(request)
    grammar = compiled.grammar
    if isinstance(grammar, Exception):
        raise grammar
    assert grammar is not None
    matcher = getattr(grammar, "ll_matcher", None)  # llguidance's says its errors only when asked
    if matcher is not None and matcher.get_error():
        raise ValueError(matcher.get_error())
    return grammar


def _reason(error: Exception) -> str:
    """The error as one line; vLLM keeps the parser's own words as its cause."""
    cause = error.__cause__
    said = f"{error} {cause}" if cause is not None and str(cause) not in str(error) else str(error)
    return " ".join(PLACE.sub("", said).split())[:400]


def _be_child(
    control: socket.socket, connection: socket.socket, answer: Callable[[bytes], dict[str, Any]], seconds: int
) -> None:
    """Answer one question and exit; the kernel ends a child that takes longer."""
    try:
        control.close()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds(seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        limit = _data_bytes() + (MEMORY_MIB << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(NICENESS)
        with connection.makefile("rb") as lines:
            asked = lines.read()
        connection.sendall(json.dumps(answer(asked)).encode())
    finally:
        os._exit(0)


def _data_bytes() -> int:
    """Memory that this process already holds, as ``RLIMIT_DATA`` counts it."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
