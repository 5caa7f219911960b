"""How many requests per second a machine can hold at most, and how many machines a load needs: arithmetic on a plan.

Real servers reach less: scheduling, sampling, kernels
below the speed that was given, requests of different lengths.
"""

import math
from dataclasses import dataclass

from vllm_hidrop.plan.shapes import TextShape


@dataclass(frozen=True)
class Machine:
    """What one replica can do, as it was measured on it: not what its data sheet says.

    Attributes:
        flops_per_second: of a prefill.
        bytes_per_second: from memory, in a decode step.
        kv_bytes: of the KV pool.
        most_sequences: that the server runs at once, ``--max-num-seqs``.
    """

    flops_per_second: float
    bytes_per_second: float
    kv_bytes: float
    most_sequences: int


@dataclass(frozen=True)
class Request:
    """What one request costs.

    Attributes:
        prefill_flops: towers included.
        prompt_kv_bytes: held after the prefill.
        output_tokens: generated; each is held in every layer.
    """

    prefill_flops: float
    prompt_kv_bytes: float
    output_tokens: int


@dataclass(frozen=True)
class Capacity:
    """What a machine does with such requests when there is always one more.

    Attributes:
        sequences: held at once, by the KV pool or the server's limit.
        prefill_seconds: of one request.
        step_seconds: of a decode step with all of them.
        requests_per_second: at most.
    """

    sequences: int
    prefill_seconds: float
    step_seconds: float
    requests_per_second: float

    def machines(self, requests_per_second: float, headroom: float) -> int:
        """Replicas for a load, each used to at most ``1 - headroom`` of what it can."""
        return math.ceil(requests_per_second / (self.requests_per_second * (1 - headroom)))


def capacity(shape: TextShape, machine: Machine, request: Request, bytes_per_weight: float = 2) -> Capacity:
    """The most that one machine can hold.

    A request needs its prefill and its share of the decode steps: ``1 / (prefill + output tokens * step / sequences)``.
    A step reads all weights and the KV of all sequences, half of their output on average, or computes 2 FLOPs per
    weight and sequence, whichever takes longer.

    Raises:
        ValueError: not even one request fits into the KV pool.
    """
    token_bytes = shape.num_layers * shape.kv_bytes_per_row
    full = request.prompt_kv_bytes + request.output_tokens * token_bytes
    sequences = min(int(machine.kv_bytes // full), machine.most_sequences)
    if sequences < 1:
        raise ValueError(f"one request holds {full / 2**30:.2f} GiB of KV, the pool has {machine.kv_bytes / 2**30:.2f}")
    average = request.prompt_kv_bytes + request.output_tokens * token_bytes / 2
    reads = (shape.num_weights * bytes_per_weight + sequences * average) / machine.bytes_per_second
    computes = 2 * shape.num_weights * sequences / machine.flops_per_second
    step = max(reads, computes)
    prefill = request.prefill_flops / machine.flops_per_second
    return Capacity(sequences, prefill, step, 1 / (prefill + request.output_tokens * step / sequences))
