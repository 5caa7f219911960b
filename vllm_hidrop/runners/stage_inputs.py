"""What a step of vLLM's V2 runner tells the device about its stages: sequence lengths, first rows, slots.

The device knows how many tokens each stage has dropped of each request (:class:`Dropped`). So a step in which no pruned
prompt is prefilled computes nothing per request and stage on the host: one gather, one subtraction and one kernel for
all KV cache groups, into tensors whose addresses a CUDA graph may keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import _load_ptr
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_hidrop.staged.step import StageBatch

IntArray = npt.NDArray[np.int32]


class Dropped:
    """Tokens that each of S stages has dropped of each request, by vLLM's request index; 0 until a prompt has run."""

    def __init__(self, num_stages: int, num_requests: int, device: torch.device) -> None:
        self.host: IntArray = np.zeros((num_stages, num_requests), dtype=np.int32)
        self.device = torch.zeros(num_stages, num_requests, dtype=torch.int32, device=device)
        self.is_stale = False

    def set(self, index: int, dropped: Sequence[int] | int) -> None:
        """Set a request's column."""
        if (self.host[:, index] != dropped).any():
            self.host[:, index] = dropped
            self.is_stale = True

    def upload(self) -> torch.Tensor:
        """The device's copy, int32 [S, R], which later work in the stream sees."""
        if self.is_stale:
            async_tensor_h2d(self.host, out=self.device)
            self.is_stale = False
        return self.device


@dataclass(frozen=True)
class StageRows:
    """Rows of S stages for R requests, padded where a graph wants more of them, on the device and on the host.

    Attributes:
        seq_lens: int32 [S, R], tokens in the stage's cache after the step.
        row_starts: int32 [S, R + 1], first row of each request, then the number of all rows.
        host_seq_lens: the same as ``seq_lens``.
        host_row_starts: the same as ``row_starts``.
    """

    seq_lens: torch.Tensor
    row_starts: torch.Tensor
    host_seq_lens: torch.Tensor
    host_row_starts: torch.Tensor

    @classmethod
    def of_batches(cls, batches: Sequence[StageBatch], device: torch.device) -> "StageRows":
        """Upload the rows of a step that prefills pruned prompts, in one copy."""
        num_requests = len(batches[0].num_rows)
        host = torch.empty(len(batches), 2 * num_requests + 1, dtype=torch.int32)
        for row, batch in zip(host.numpy(), batches, strict=True):
            row[:num_requests], row[num_requests:] = batch.seq_lens, batch.row_starts
        seq_lens_and_starts = num_requests, num_requests + 1
        uploaded = async_tensor_h2d(host, device=device)
        return cls(*uploaded.split(seq_lens_and_starts, dim=1), *host.split(seq_lens_and_starts, dim=1))

    def key(self, stage: int) -> bytes:
        """Equal for stages that have the same rows."""
        return self.host_seq_lens[stage].numpy().tobytes() + self.host_row_starts[stage].numpy().tobytes()


class StageInputs:
    """The device's tensors for all stages; their addresses stay.

    Attributes:
        stages: of every KV cache group, its stage.
        seq_lens: int32 [S, max requests].
        groups: int32 on the device, the groups of each stage.
    """

    def __init__(self, tables: BlockTables, stages: Sequence[int], dropped: Dropped) -> None:
        self.tables = tables
        self.stages = tuple(stages)
        self.dropped = dropped
        device = tables.device
        (self.block_size,) = set(tables.block_sizes)
        self.seq_lens = torch.zeros_like(dropped.device)
        self.stage_of_group = torch.tensor(stages, dtype=torch.int32, device=device)
        self.all_groups = torch.arange(len(stages), dtype=torch.int32, device=device)
        in_stages = ([group for group, of in enumerate(stages) if of == stage] for stage in range(len(self.seq_lens)))
        self.groups = [torch.tensor(groups, dtype=torch.int32, device=device) for groups in in_stages]

    def full_rows(self, batch: InputBatch) -> StageRows:
        """The rows of a step in which every stage runs every row, by what the stages have dropped before."""
        num_requests, num_padded = batch.num_reqs, batch.num_reqs_after_padding
        dropped = self.dropped.upload()[:, batch.idx_mapping]
        torch.sub(batch.seq_lens[:num_requests], dropped, out=self.seq_lens[:, :num_requests])
        if num_padded > num_requests:
            self.seq_lens[:, num_requests:num_padded].zero_()
        host = torch.zeros(len(self.seq_lens), num_padded, dtype=torch.int32)
        lengths = _upper_bounds(batch)[:num_requests].numpy()
        np.subtract(lengths, self.dropped.host[:, batch.idx_mapping_np], out=host[:, :num_requests].numpy())
        return self._same_rows(batch, num_padded, host)

    def dummy_rows(self, batch: InputBatch) -> StageRows:
        """The rows of vLLM's dummy batch, in the tensors that real steps use: a graph is captured on it."""
        num_requests = batch.num_reqs_after_padding
        self.seq_lens[:, :num_requests] = batch.seq_lens[:num_requests]
        lengths = _upper_bounds(batch)[:num_requests].expand(len(self.seq_lens), -1)
        return self._same_rows(batch, num_requests, lengths)

    def _same_rows(self, batch: InputBatch, num_requests: int, host_seq_lens: torch.Tensor) -> StageRows:
        starts = batch.query_start_loc, torch.from_numpy(batch.query_start_loc_np)
        on_device, on_host = (each[: num_requests + 1].expand(len(self.seq_lens), -1) for each in starts)
        return StageRows(self.seq_lens[:, :num_requests], on_device, host_seq_lens, on_host)

    def write_slots(self, rows: StageRows, idx_mapping: torch.Tensor, num_padded: int, groups: torch.Tensor) -> None:
        """Write the slots of all rows in the caches of ``groups``, int32 [n], and pad them to ``num_padded`` rows.

        ``idx_mapping`` is int64 [R], the requests' indices in vLLM's tables.
        """
        slots = self.tables.slot_mappings
        write_slots_kernel[(len(groups), len(idx_mapping) + 1)](
            groups,
            self.stage_of_group,
            idx_mapping,
            rows.row_starts,
            rows.row_starts.stride(0),
            rows.seq_lens,
            rows.seq_lens.stride(0),
            self.tables.block_table_ptrs,
            self.tables.block_table_strides,
            slots,
            slots.stride(0),
            num_padded,
            BLOCK_SIZE=self.block_size,
            PAD=PAD_SLOT_ID,
            TILE=1024,
        )

    def slots(self, group: int, num_rows: int) -> torch.Tensor:
        """The slots of a group's first rows, int64 [num_rows]."""
        return self.tables.slot_mappings[group, :num_rows]


def _upper_bounds(batch: InputBatch) -> torch.Tensor:
    """Tokens of every request after the step, int32 [R] on the host; exact where nothing is speculated."""
    assert batch.seq_lens_cpu_upper_bound is not None
    return batch.seq_lens_cpu_upper_bound


@triton.jit(do_not_specialize=["num_padded"])
def write_slots_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    groups,  # [n]
    stage_of_group,  # [G]
    idx_mapping,  # [R]
    row_starts,  # [S, R + 1]
    row_starts_stride,
    seq_lens,  # [S, R]
    seq_lens_stride,
    table_ptrs,  # [G], each of [max requests, blocks]
    table_strides,  # [G]
    slots,  # [G, max rows]
    slots_stride,
    num_padded,
    BLOCK_SIZE: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """For every group and request: the slot of row i is that of place seq_len - num_rows + i, in the group's table."""
    group = tl.load(groups + tl.program_id(0))
    request = tl.program_id(1)
    stage = tl.load(stage_of_group + group)
    starts = row_starts + stage * row_starts_stride
    start = tl.load(starts + request)
    out = slots + group * slots_stride
    if request == tl.num_programs(1) - 1:
        for first in range(start, num_padded, TILE):
            rows = first + tl.arange(0, TILE)
            tl.store(out + rows, PAD, mask=rows < num_padded)
        return
    end = tl.load(starts + request + 1)
    place = tl.load(seq_lens + stage * seq_lens_stride + request) - end
    table = _load_ptr(table_ptrs + group, tl.int32)
    table += tl.load(idx_mapping + request) * tl.load(table_strides + group)
    for first in range(start, end, TILE):
        rows = first + tl.arange(0, TILE)
        places = rows + place
        blocks = tl.load(table + places // BLOCK_SIZE, mask=rows < end, other=0).to(tl.int64)
        tl.store(out + rows, blocks * BLOCK_SIZE + places % BLOCK_SIZE, mask=rows < end)
