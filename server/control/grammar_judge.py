"""A process that tries grammars before the engine meets them, each in a child of its own that the kernel ends in time.

Compilers of grammars are C++ in a thread: once begun, nothing in their process can stop them. Here each runs in a fork
that has bounds for CPU time, wall time and memory, so that a grammar can cost that much and no more, and holds up no
other.
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

MEMORY_MIB = 512
"""What compiling one grammar may add to the process."""
MASK_SECONDS = 0.1
"""CPU time of one token's mask, which the engine makes between two steps, while every other request waits."""
WALK_TOKENS = 100
"""How far each of the two walks through a grammar goes."""
PATIENCE = 4
"""Wall time for each second of CPU time: the machine may have other work."""
NICENESS = 10

PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""Time and line of the C++ file that a message of XGrammar begins with."""

SPELLS_NOTHING = "no token of this model's vocabulary can begin what is asked for"
IS_SLOW = (
    f"a token's mask takes more than {MASK_SECONDS:g} s, which would hold up every other request: "
    "ask for fewer nested repetitions and choices that begin alike"
)


def wall_seconds(cpu_seconds: int) -> int:
    """How long a child may live."""
    return PATIENCE * cpu_seconds + 1


def question(structured: StructuredOutputsParams, stop_token_ids: Sequence[int]) -> bytes:
    """What a child is asked: the constraint, and the tokens that may end it."""
    fields = {name: value for name, value in asdict(structured).items() if not name.startswith("_")}
    return json.dumps({"fields": fields, "stop": sorted(stop_token_ids)}, sort_keys=True).encode()


def serve_judge(control: socket.socket, inherited: Sequence[socket.socket], config: VllmConfig, seconds: int) -> None:
    """Be the process: fork a child for every connection that comes over ``control``, until that closes.

    Args:
        control: sends one byte and one connected socket for each grammar.
        inherited: sockets of the parent that must not stay open here.
        config: of the engine.
        seconds: CPU time of one child.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to the whole group; the parent ends, then so do we
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
    """What vLLM and a short walk say of one constraint.

    Returns:
        ``refused``: the reason; or ``backend`` and ``grammar``: what vLLM's validation makes of the constraint.
    """
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
    """Why a grammar that compiled cannot be used: no way through it has tokens, or its masks take too long.

    Two walks look at masks: one takes any allowed token, one always the first, which goes deep into repetitions.
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
    """Token ids of one row of a mask, which has 32 tokens in each word."""
    bits = np.unpackbits(bitmask[0].numpy().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def _manager(config: VllmConfig) -> StructuredOutputManager:
    """VLLM's own, which compiles at once; its backend is made now, for the children to inherit."""
    manager = StructuredOutputManager(config)
    manager._use_async_grammar_compilation = False
    warm = StructuredOutputsParams(regex="a")
    params = SamplingParams(structured_outputs=warm)
    with suppress(Exception):  # no tokenizer, or one that cannot spell it; then the backend is there
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
    """One line; vLLM keeps the parser's own words as the cause."""
    cause = error.__cause__
    said = f"{error} {cause}" if cause is not None and str(cause) not in str(error) else str(error)
    return " ".join(PLACE.sub("", said).split())[:400]


def _be_child(
    control: socket.socket, connection: socket.socket, answer: Callable[[bytes], dict[str, Any]], seconds: int
) -> None:
    """Answer one question and end; the kernel ends what takes longer."""
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
    """What this process holds already of the memory that ``RLIMIT_DATA`` counts."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
