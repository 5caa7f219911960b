"""vLLM's block tables, one per KV cache group, stacked in one array, so that a step reads all groups at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import SlotMappingMode


class TableView(CpuGpuBuffer):
    """One group's block table inside the array of all groups; a table that has no device copy is not copied."""

    def __init__(self, stacked: CpuGpuBuffer, group: int) -> None:
        self.is_shared = stacked.gpu is stacked.cpu
        self.cpu, self.gpu, self.np = stacked.cpu[group], stacked.gpu[group], stacked.np[group]

    def copy_to_gpu(self, n: int | None = None) -> torch.Tensor:
        """Copy as vLLM does, or nothing: a call for each of 16 groups takes 50 us of every step on a CPU."""
        return self.gpu[:n] if self.is_shared else super().copy_to_gpu(n)


class StackedTables:
    """Block tables of KV groups, [groups, R, B], from vLLM's freshly constructed ``MultiGroupBlockTable``.

    Each group's own table, all of one shape, becomes a view, and maps no slots itself. Tables of recurrent layers map
    none, are of another shape, and stay as they are.
    """

    def __init__(self, tables: Any) -> None:
        mode = SlotMappingMode.NONE
        of_groups = {i: table for i, table in enumerate(tables.block_tables) if table.slot_mapping_mode is not mode}
        ((num_rows, num_blocks),) = {table.block_table.np.shape for table in of_groups.values()}
        first = next(iter(of_groups.values()))
        self.block_size = first.block_size
        self.index_of_group = {group: index for index, group in enumerate(of_groups)}
        self.stacked = CpuGpuBuffer(
            len(of_groups),
            num_rows,
            num_blocks,
            dtype=torch.int32,
            device=first.device,
            pin_memory=first.pin_memory,
        )
        if first.device.type == "cpu":
            self.stacked.gpu = self.stacked.cpu
        for group, table in of_groups.items():
            table.slot_mapping_mode = mode
            table.block_table = TableView(self.stacked, self.index_of_group[group])

    def slots(
        self, groups: Sequence[int], rows: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Slots of T tokens in the caches of KV ``groups`` that hold the same tokens, int64 [len(groups), T].

        Per token, ``rows`` is its request's place in the batch and ``places`` its compact slot in the request's cache.
        """
        blocks, offsets = np.divmod(places, self.block_size)
        tables = np.asarray([self.index_of_group[group] for group in groups])
        slots = self.stacked.np[tables[:, None], rows, blocks].astype(np.int64)
        slots *= self.block_size
        slots += offsets
        return slots
