"""Time our host work in a decode step of vLLM's V2 runner: ``python -m scripts.decode_host_cost``.

Batch 32 under HiDrop's 7B plan, with vLLM's tables and batches, FlashAttention's kind of metadata (one build per stage,
other groups of the stage share it) and no kernel run: what is timed is Python, NumPy and PyTorch on the host. On a
machine without a GPU the tensors are in its memory, so copies and launches cost what they cost there.
"""

import timeit
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu import shm  # noqa: F401 - stubs of streams and pinned memory
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.runners import stage_inputs
from vllm_hidrop.runners.stage_inputs import RequestCounts, StageInputs
from vllm_hidrop.runners.v2 import StageMetadata

BATCH, MAX_REQUESTS, BLOCK, LAYERS_PER_GROUP = 32, 256, 16, 2
REPEATS, RUNS = 15, 200


@dataclass
class Metadata:
    """As FlashAttention's: the common fields, a table and slots."""

    common: CommonAttentionMetadata
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class Builder:
    """As FlashAttention's, without its kernel's schedule."""

    supports_update_block_table = True

    def update_block_table(self, metadata: Metadata, table: torch.Tensor, slots: torch.Tensor) -> Metadata:
        """A copy with other tables."""
        return Metadata(metadata.common, table, slots)


class Group:
    """As vLLM's attention group."""

    def __init__(self) -> None:
        self.builder = Builder()

    def get_metadata_builder(self, _: int) -> Builder:
        """Its only one."""
        return self.builder

    def build_metadata(self, common: CommonAttentionMetadata, _: int) -> Metadata:
        """One build."""
        return Metadata(common, common.block_table_tensor, common.slot_mapping)


def main() -> None:
    """Print medians in microseconds."""
    schedule = METHODS["hidrop"]().schedule(ModelShape(32, 576))
    stages = [
        stage for stage in range(len(schedule.stages)) for _ in range(schedule.layers_in(stage) // LAYERS_PER_GROUP)
    ]
    device = torch.device("cpu")
    tables = BlockTables([BLOCK] * len(stages), MAX_REQUESTS, 8192, [256] * len(stages), device)
    dropped = RequestCounts(len(schedule.stages), MAX_REQUESTS, device)
    inputs = StageInputs(tables, stages, dropped)
    batch: Any = SimpleNamespace(
        num_reqs=BATCH,
        num_reqs_after_padding=BATCH,
        num_tokens=BATCH,
        num_tokens_after_padding=BATCH,
        num_scheduled_tokens=np.ones(BATCH, dtype=np.int32),
        idx_mapping=torch.arange(BATCH),
        idx_mapping_np=np.arange(BATCH),
        seq_lens=torch.full((MAX_REQUESTS,), 700, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((BATCH,), 700, dtype=torch.int32),
        query_start_loc=torch.arange(MAX_REQUESTS + 1, dtype=torch.int32),
        query_start_loc_np=np.arange(MAX_REQUESTS + 1, dtype=np.int32),
        is_prefilling_np=np.zeros(BATCH, dtype=np.bool_),
    )
    runner: Any = SimpleNamespace(inputs=inputs, attn_groups=[[Group()] for _ in stages], max_model_len=4096)
    rows = inputs.full_rows(batch)

    def build() -> None:
        metadata = StageMetadata(runner, batch, tables.input_block_tables, rows, is_graph=True, for_capture=False)
        for group, slots in enumerate(tables.slot_mappings[:, :BATCH].unbind(0)):
            metadata.of_group(group, slots)

    def slots() -> None:
        inputs.write_slots(rows, batch.idx_mapping, BATCH, inputs.all_groups)

    parts = {
        "sequence lengths of all stages": lambda: inputs.full_rows(batch),
        "slots of all groups, one launch": lambda: inputs.write_slots(
            rows, batch.idx_mapping, BATCH, inputs.all_groups
        ),
        "attention metadata of all groups": build,
    }
    total = 0.0
    print(f"HiDrop 7B, {len(schedule.stages)} stages, {len(stages)} KV groups, batch {BATCH}; median of {REPEATS}:")
    with torch.inference_mode(), patch.object(stage_inputs, "write_slots_kernel", _NoKernel()):
        for name, part in parts.items():
            took = median(timeit.repeat(part, number=RUNS, repeat=REPEATS)) / RUNS * 1e6
            total += took
            print(f"  {name:34} {took:7.1f} us")
    print(f"  {'together':34} {total:7.1f} us")


class _NoKernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


if __name__ == "__main__":
    main()
