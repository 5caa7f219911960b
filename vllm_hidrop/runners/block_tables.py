"""vLLM's block tables, one per KV cache group, stacked in one array, so that a step reads all groups at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import SlotMappingMode


class StackedTables:
    """Block tables of all KV groups, [groups, R, B], from vLLM's freshly constructed ``MultiGroupBlockTable``.

    Each group's own table, all of one shape, becomes a view, and maps no slots itself.
    """

    def __init__(self, tables: Any) -> None:
        ((num_rows, num_blocks),) = {table.block_table.np.shape for table in tables.block_tables}
        first = tables.block_tables[0]
        self.block_size = first.block_size
        self.stacked = CpuGpuBuffer(
            len(tables.block_tables),
            num_rows,
            num_blocks,
            dtype=torch.int32,
            device=first.device,
            pin_memory=first.pin_memory,
        )
        if first.device.type == "cpu":
            self.stacked.gpu = self.stacked.cpu
        for index, table in enumerate(tables.block_tables):
            table.slot_mapping_mode = SlotMappingMode.NONE
            buffer = table.block_table
            buffer.cpu, buffer.gpu = self.stacked.cpu[index], self.stacked.gpu[index]
            buffer.np = self.stacked.np[index]

    def slots(
        self, groups: Sequence[int], rows: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Slots of T tokens in the caches of KV ``groups`` that hold the same tokens, int64 [len(groups), T].

        Per token, ``rows`` is its request's place in the batch and ``places`` its compact slot in the request's cache.
        """
        blocks, offsets = np.divmod(places, self.block_size)
        slots = self.stacked.np[np.asarray(groups)[:, None], rows, blocks].astype(np.int64)
        slots *= self.block_size
        slots += offsets
        return slots
