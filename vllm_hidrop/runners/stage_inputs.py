"""What a step of vLLM's V2 runner tells the device about its stages: sequence lengths, first rows, slots.

The device knows how many tokens each stage has dropped of each request (:class:`RequestCounts`). So a step in which no
pruned prompt is prefilled sends it nothing: one gather, one subtraction and one kernel for all KV cache groups write
what the stages need, into tensors whose addresses a CUDA graph may keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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


class RequestCounts:
    """A column of counts for every request, by vLLM's request index, on the host and on the device: int32 [N, R]."""

    def __init__(self, num_rows: int, num_requests: int, device: torch.device) -> None:
        self.host: IntArray = np.zeros((num_rows, num_requests), dtype=np.int32)
        self.device = torch.zeros(num_rows, num_requests, dtype=torch.int32, device=device)
        self.is_stale = False

    def set(self, index: int, counts: Sequence[int] | int) -> None:
        """Set a request's column."""
        if (self.host[:, index] != counts).any():
            self.host[:, index] = counts
            self.is_stale = True

    def of(self, idx_mapping: torch.Tensor) -> torch.Tensor:
        """The columns of some requests, int32 [N, n], as work that follows in the stream sees them."""
        if self.is_stale:
            async_tensor_h2d(self.host, out=self.device)
            self.is_stale = False
        return self.device.index_select(1, idx_mapping)


class RowsOfStage(NamedTuple):
    """The rows of one stage for R requests, as attention metadata describes them.

    Attributes:
        seq_lens: int32 [R] on the device, tokens in the stage's cache after the step.
        row_starts: int32 [R + 1] on the device, first row of each request, then the number of all rows.
        host_seq_lens: the same as ``seq_lens``.
        host_row_starts: the same as ``row_starts``.
    """

    seq_lens: torch.Tensor
    row_starts: torch.Tensor
    host_seq_lens: torch.Tensor
    host_row_starts: torch.Tensor
    num_rows: int
    max_rows: int
    max_seq_len: int

    @property
    def key(self) -> bytes:
        """Equal for stages that have the same rows."""
        return self.host_seq_lens.numpy().tobytes() + self.host_row_starts.numpy().tobytes()


@dataclass(frozen=True)
class StageRows:
    """The rows of S stages for R requests, padded where a graph wants more of them.

    Attributes:
        seq_lens: int32 [S, R or more] on the device.
        row_starts: int32 [S, R + 1] on the device.
        stages: the rows of each stage.
    """

    seq_lens: torch.Tensor
    row_starts: torch.Tensor
    stages: tuple[RowsOfStage, ...]

    @classmethod
    def of_batches(cls, batches: Sequence[StageBatch], device: torch.device) -> "StageRows":
        """Upload the rows of a step that prefills pruned prompts, in one copy."""
        num_requests = len(batches[0].num_rows)
        host = torch.empty(len(batches), 2 * num_requests + 1, dtype=torch.int32)
        for row, batch in zip(host.numpy(), batches, strict=True):
            row[:num_requests], row[num_requests:] = batch.seq_lens, batch.row_starts
        parts = num_requests, num_requests + 1
        seq_lens, row_starts = async_tensor_h2d(host, device=device).split(parts, dim=1)
        each = zip(seq_lens, row_starts, *host.split(parts, dim=1), batches, strict=True)
        stages = tuple(
            RowsOfStage(
                lengths,
                starts,
                host_lengths,
                host_starts,
                batch.num_tokens,
                int(batch.num_rows.max()),
                int(batch.seq_lens.max()),
            )
            for lengths, starts, host_lengths, host_starts, batch in each
        )
        return cls(seq_lens, row_starts, stages)


class StageInputs:
    """The device's tensors for all stages; their addresses stay.

    Attributes:
        stages: of every KV cache group, its stage.
        dropped: tokens that each stage has dropped of each request; 0 until its prompt has run.
        seq_lens: int32 [S, max requests].
        views: the first n sequence lengths of every stage, by n.
        groups: int32 on the device, the groups of each stage.
    """

    def __init__(self, tables: BlockTables, stages: Sequence[int], dropped: RequestCounts) -> None:
        self.tables = tables
        self.stages = tuple(stages)
        self.dropped = dropped
        device = tables.device
        (self.block_size,) = set(tables.block_sizes)
        self.seq_lens = torch.zeros_like(dropped.device)
        self.views: dict[int, tuple[torch.Tensor, ...]] = {}
        self.stage_of_group = torch.tensor(stages, dtype=torch.int32, device=device)
        self.all_groups = torch.arange(len(stages), dtype=torch.int32, device=device)
        in_stages = ([group for group, of in enumerate(stages) if of == stage] for stage in range(len(self.seq_lens)))
        self.groups = [torch.tensor(groups, dtype=torch.int32, device=device) for groups in in_stages]

    def full_rows(self, batch: InputBatch) -> StageRows:
        """The rows of a step in which every stage runs every row, by what the stages have dropped before."""
        num_requests, num_padded = batch.num_reqs, batch.num_reqs_after_padding
        if num_padded > num_requests:
            self.seq_lens[:, num_requests:num_padded].zero_()
        dropped = self.dropped.of(batch.idx_mapping)
        torch.sub(batch.seq_lens[:num_requests], dropped, out=self.seq_lens[:, :num_requests])
        host = np.zeros((len(self.seq_lens), num_padded), dtype=np.int32)
        lengths = _upper_bounds(batch)[:num_requests].numpy()
        np.subtract(lengths, self.dropped.host[:, batch.idx_mapping_np], out=host[:, :num_requests])
        return self._same_rows(batch, host)

    def dummy_rows(self, batch: InputBatch, max_seq_len: int) -> StageRows:
        """The rows of vLLM's dummy batch, in the tensors that real steps use: a graph is captured on it.

        ``max_seq_len`` is the longest sequence of any later step.
        """
        num_requests = batch.num_reqs_after_padding
        self.seq_lens[:, :num_requests] = batch.seq_lens[:num_requests]
        host = np.tile(_upper_bounds(batch)[:num_requests].numpy(), (len(self.seq_lens), 1))
        rows = self._same_rows(batch, host)
        return replace(rows, stages=tuple(each._replace(max_seq_len=max_seq_len) for each in rows.stages))

    def _same_rows(self, batch: InputBatch, host: IntArray) -> StageRows:
        """All stages' rows where they run the same ones, after sequences of their own lengths, ``host`` [S, R]."""
        num_stages, num_requests = host.shape
        if num_requests not in self.views:
            self.views[num_requests] = self.seq_lens[:, :num_requests].unbind(0)
        starts = batch.query_start_loc[: num_requests + 1]
        host_starts = torch.from_numpy(batch.query_start_loc_np[: num_requests + 1])
        num_rows, max_rows = batch.num_tokens, int(batch.num_scheduled_tokens.max())
        stages = tuple(
            RowsOfStage(lengths, starts, torch.from_numpy(on_host), host_starts, num_rows, max_rows, most)
            for lengths, on_host, most in zip(self.views[num_requests], host, host.max(axis=1).tolist(), strict=True)
        )
        return StageRows(self.seq_lens, starts.expand(num_stages, -1), stages)

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
