"""Block tables in one array: what a group writes stands there, and is copied only to a device of its own."""

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode
from vllm.v1.worker.utils import AttentionGroup

from vllm_hidrop.runners.attention_metadata import kernel_blocks
from vllm_hidrop.runners.block_tables import StackedTables, TableView


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_view_is_copied_where_the_device_has_tables_of_its_own(is_shared: bool) -> None:
    stacked = CpuGpuBuffer(2, 3, 4, dtype=torch.int32, device=torch.device("cpu"), pin_memory=False)
    if is_shared:
        stacked.gpu = stacked.cpu
    view = TableView(stacked, 1)
    view.np[:2] = 7
    assert stacked.np[1, :2].tolist() == [[7] * 4] * 2
    assert is_shared or not stacked.gpu.any(), "nothing is copied before it is committed"
    assert view.copy_to_gpu(1).tolist() == [[7] * 4]
    assert stacked.gpu[1].tolist() == [[7] * 4, [7 if is_shared else 0] * 4, [0] * 4]
    assert not stacked.gpu[0].any()


def test_a_groups_slots_are_its_own_where_recurrent_layers_have_tables_among_the_groups() -> None:
    modes = [
        SlotMappingMode.NONE,
        SlotMappingMode.TOKEN_TO_KV_SLOT,
        SlotMappingMode.NONE,
        SlotMappingMode.TOKEN_TO_KV_SLOT,
    ]
    tables = MultiGroupBlockTable(2, 64, False, torch.device("cpu"), [1024, 8, 1024, 8], [1, 4, 1, 4], 1, modes)
    stacked = StackedTables(tables)
    tables.add_row(([5], [1, 2], [6], [3, 4]), 0)
    tables.add_row(([7], [8], [9], [10]), 1)
    tables.commit_block_table(2)
    slots = stacked.slots([3, 1], np.array([0, 0, 1]), np.array([0, 9, 3]))
    assert slots.tolist() == [[24, 33, 83], [8, 17, 67]]
    assert [tables[group].get_device_tensor(2)[:, 0].tolist() for group in (0, 2)] == [[5, 7], [6, 9]]


@pytest.mark.parametrize("stride", [0, 9])
def test_kernel_blocks_are_those_of_vllms_table_which_stays_as_it_is(stride: int) -> None:
    spec = FullAttentionSpec(block_size=96, num_kv_heads=1, head_size=32, dtype=torch.float32)
    group = AttentionGroup(object, [], spec, 0)
    blocks = torch.tensor([3, 1], dtype=torch.int32)
    assert kernel_blocks(group, blocks).tolist() == [3, 1]
    group.kernel_block_size, group.kernel_block_stride = 32, stride
    group.kernel_block_table = torch.zeros(1, 1, 6, dtype=torch.int32)
    group.kernel_block_offsets = torch.arange(3, dtype=torch.int32)
    expected = group.map_to_kernel_block_table(blocks[None])[0].tolist()
    group.kernel_block_table.zero_()
    assert kernel_blocks(group, blocks).tolist() == expected
    assert not group.kernel_block_table.any()
