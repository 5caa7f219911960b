"""``hidrop capacity``: from a plan to requests per second and machines, pruned and dense."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_hidrop.cli.costing import planned
from vllm_hidrop.cli.options import Prompt
from vllm_hidrop.plan.capacity import Capacity, Machine, Request, capacity
from vllm_hidrop.terminal import Terminal

BLOCK_SIZE = 16  # tokens of a KV block on a GPU, vLLM's default


@dataclass(frozen=True)
class Target:
    """The load to be held: its rate, the share of each machine left free, and tokens of an answer."""

    requests_per_second: float
    headroom: float
    output_tokens: int


def run(
    model: str,
    choice: Mapping[str, Any],
    prompt: Prompt,
    machine: Machine,
    target: Target,
    as_json: bool,
) -> None:
    """Print capacities and machines needed. Raises ValueError: bad model or choice, or no request fits the pool."""
    known, resolved, _, costs = planned(model, choice, prompt, BLOCK_SIZE)
    if costs.encoder_flops is None or costs.dense_encoder_flops is None:
        raise ValueError(f"the FLOPs of the vision tower of {model} are not counted, and a machine runs them too")
    requests = {
        "dense": Request(costs.dense_flops + costs.dense_encoder_flops, costs.dense_kv_bytes, target.output_tokens),
        resolved.method.name: Request(costs.flops + costs.encoder_flops, costs.kv_bytes, target.output_tokens),
    }
    found = {name: capacity(known.text, machine, request) for name, request in requests.items()}
    if as_json:
        print(json.dumps({name: _as_json(each, target) for name, each in found.items()}, indent=2))
        return
    table = Table("", "held at once", "prefill", "decode step", "requests/s", "machines", box=SIMPLE_HEAD)
    for name, each in found.items():
        times = (f"{1000 * seconds:.1f} ms" for seconds in (each.prefill_seconds, each.step_seconds))
        rate, machines = f"{each.requests_per_second:.1f}", str(_machines(each, target))
        table.add_row(name, str(each.sequences), *times, rate, machines)
    Terminal().show(table)


def _machines(found: Capacity, target: Target) -> int:
    return found.machines(target.requests_per_second, target.headroom)


def _as_json(found: Capacity, target: Target) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "machines": _machines(found, target)}
