"""An upper bound on the requests per second of one machine, and the machines that a load needs, by arithmetic.

Real servers reach less: they schedule and sample, kernels fall short of the given speed, requests differ in length.
"""

import math
from dataclasses import dataclass

from vllm_hidrop.plan.shapes import TextShape


@dataclass(frozen=True)
class Machine:
    """What one replica can do, as measured on it rather than by its data sheet.

    A prefill reaches ``flops_per_second``, a decode step reads ``bytes_per_second`` from memory; ``kv_bytes`` is the KV
    pool's size, ``most_sequences`` vLLM's ``--max-num-seqs``.
    """

    flops_per_second: float
    bytes_per_second: float
    kv_bytes: float
    most_sequences: int


@dataclass(frozen=True)
class Request:
    """What one request costs; ``prefill_flops`` include the vision tower, every layer caches all ``output_tokens``."""

    prefill_flops: float
    prompt_kv_bytes: float
    output_tokens: int


@dataclass(frozen=True)
class Capacity:
    """What a machine reaches at most under an endless queue of such requests.

    ``sequences`` run at once, as the KV pool or the server's limit allows; a decode step of all takes ``step_seconds``.
    """

    sequences: int
    prefill_seconds: float
    step_seconds: float
    requests_per_second: float

    def machines(self, requests_per_second: float, headroom: float) -> int:
        """Replicas for a load, each used to at most ``1 - headroom`` of what it can."""
        return math.ceil(requests_per_second / (self.requests_per_second * (1 - headroom)))


def capacity(shape: TextShape, machine: Machine, request: Request, bytes_per_weight: float = 2) -> Capacity:
    """The upper bound of one machine; ValueError where not even one request fits into its KV pool.

    A request needs its prefill and its share of the decode steps: ``1 / (prefill + output tokens * step / sequences)``.
    A step takes the longer of two times: to read the weights and the KV of all sequences (on average with half of their
    output), and to compute 2 FLOPs per weight and sequence. Of experts, each sequence computes its own and a step reads
    those that any sequence meets (``Experts.mean_met``). States of recurrent layers are held and read beside the KV.
    """
    token_bytes = shape.num_attention_layers * shape.kv_bytes_per_row
    held_bytes = request.prompt_kv_bytes + shape.state_bytes
    full = held_bytes + request.output_tokens * token_bytes
    sequences = min(int(machine.kv_bytes // full), machine.most_sequences)
    if sequences < 1:
        raise ValueError(f"one request holds {full / 2**30:.2f} GiB of KV, the pool has {machine.kv_bytes / 2**30:.2f}")
    average = held_bytes + request.output_tokens * token_bytes / 2
    reads = (shape.weights_read(sequences) * bytes_per_weight + sequences * average) / machine.bytes_per_second
    computes = 2 * shape.active_weights * sequences / machine.flops_per_second
    step = max(reads, computes)
    prefill = request.prefill_flops / machine.flops_per_second
    return Capacity(sequences, prefill, step, 1 / (prefill + request.output_tokens * step / sequences))
