"""vLLM's block tables, one per KV cache group, laid in one array: a step reads all groups at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import SlotMappingMode


class StackedTables:
    """Block tables [G, R, B] of all groups; each group's own table becomes a view of it, and maps no slots itself.

    Args:
        tables: freshly constructed ones of one shape, vLLM's ``MultiGroupBlockTable``.
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
        """Slots in the groups' caches, int64 [len(groups), T].

        Args:
            groups: which.
            rows: [T], requests, by their place in the batch.
            places: [T], tokens, by their place among those the groups hold of that request.
        """
        blocks, offsets = np.divmod(places, self.block_size)
        found = self.stacked.np[np.asarray(groups)[:, None], rows, blocks].astype(np.int64)
        found *= self.block_size
        found += offsets
        return found
