"""vLLM's block tables, one per KV cache group, laid in one array: a step reads all groups at once.

Knows block tables; not stages.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode


class StackedTables(MultiGroupBlockTable):
    """Block tables [G, R, B] of all groups; each group's own table is a view of it.

    They map no slots themselves: their owner does, see :meth:`slots`.
    """

    stacked: CpuGpuBuffer

    def slots(
        self, groups: Sequence[int], rows: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Slots in the groups' caches, int64 [len(groups), T].

        Args:
            groups: which.
            rows: [T], requests, by their place in the batch.
            places: [T], tokens, by their place among those the groups hold of that request.
        """
        block_size = self.block_tables[0].block_size
        blocks, offsets = np.divmod(places, block_size)
        found = self.stacked.np[np.asarray(groups)[:, None], rows, blocks].astype(np.int64)
        found *= block_size
        found += offsets
        return found

    def commit_block_table(self, num_reqs: int) -> None:
        """As vLLM, where a device has tables of its own."""
        if self.stacked.gpu is not self.stacked.cpu:
            super().commit_block_table(num_reqs)


def adopt(tables: Any) -> None:
    """Lay freshly constructed block tables of one shape into one array."""
    ((num_rows, num_blocks),) = {table.block_table.np.shape for table in tables.block_tables}
    first = tables.block_tables[0]
    stacked = CpuGpuBuffer(
        len(tables.block_tables),
        num_rows,
        num_blocks,
        dtype=torch.int32,
        device=first.device,
        pin_memory=first.pin_memory,
    )
    if first.device.type == "cpu":
        stacked.gpu = stacked.cpu
    for index, table in enumerate(tables.block_tables):
        table.slot_mapping_mode = SlotMappingMode.NONE
        buffer = table.block_table
        buffer.cpu, buffer.gpu, buffer.np = stacked.cpu[index], stacked.gpu[index], stacked.np[index]
    tables.__class__ = StackedTables
    tables.stacked = stacked
