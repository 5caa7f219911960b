"""Block tables in one array: what a group writes stands there, and is copied only to a device of its own."""

import pytest
import torch
from vllm.v1.utils import CpuGpuBuffer

from vllm_hidrop.runners.block_tables import TableView


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
