"""Adapter to vLLM's V1 model runner (CPU; CUDA with ``VLLM_USE_V2_MODEL_RUNNER=0``).

:func:`make_staged` turns a runner that vLLM has constructed into its staged subclass, which overrides the hooks below.
What they call is in ``staged``, ``runners.requests`` and ``runners.stage_caches``.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_hidrop.engine.compat import subclass
from vllm_hidrop.engine.kv_cache import StageSpec, block_size_of
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.runners.attention_metadata import check_attention_backends, kernel_blocks, with_tables
from vllm_hidrop.runners.block_tables import StackedTables
from vllm_hidrop.runners.requests import WorkerRequests, with_report
from vllm_hidrop.runners.stage_caches import StageCaches, layers_by_stage, stage_specs
from vllm_hidrop.staged.adaptive_loop import run_staged
from vllm_hidrop.staged.loop import Outcome
from vllm_hidrop.staged.model import StagedModel
from vllm_hidrop.staged.step import PrunedPrefill, StageBatch, StagedStep, grouped_positions


class StagedRunner(GPUModelRunner):
    """Overrides of a V1 model runner (the CPU runner derives from the GPU one).

    Attributes:
        staged: what the worker knows of its requests.
        step: which rows every stage runs in the running step; None in dummy runs.
        outcome: result of the running step's staged loop, once it has run.
        built: attention metadata of the running step, by the rows it is for.
        layers: per KV cache group, the layer names by stage.
        no_slots: the slots of recurrent layers, which write none.
    """

    model: StagedModel
    planner: Planner
    staged: WorkerRequests
    step: StagedStep | None
    outcome: Outcome | None
    built: dict[Any, Any]
    layers: list[dict[int, list[str]]]
    no_slots: torch.Tensor
    tables: StackedTables
    caches: StageCaches

    # Caches: a spec, block tables and slots per stage.

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The specs of vLLM by layer name, each with its layer's stage."""
        return stage_specs(super().get_kv_cache_spec(), self.planner.schedule)

    def may_reinitialize_input_batch(self, kv_cache_config: Any) -> None:
        """Make vLLM's batch and stack its block tables; from here on the size of a block is final."""
        super().may_reinitialize_input_batch(kv_cache_config)
        check_attention_backends(self.attn_groups)
        self.planner = replace(self.planner, block_size=block_size_of(kv_cache_config))
        self.staged = WorkerRequests(self.planner)
        self.tables = StackedTables(self.input_batch.block_table)
        attentions = self.compilation_config.static_forward_context
        groups = kv_cache_config.kv_cache_groups
        self.layers = [layers_by_stage(group, self.planner.schedule) for group in groups]
        self.no_slots = torch.empty(0, dtype=torch.int64, device=self.device)
        self.caches = StageCaches(self.model.decoder, groups, attentions, self._block_ids)

    def _block_ids(self, group: int, index: int) -> torch.Tensor:
        (attention_group,) = self.attn_groups[group]
        return kernel_blocks(attention_group, self.input_batch.block_table[group].block_table.gpu[index])

    def _holds_slots(self, group: int) -> bool:
        """Whether a KV cache group holds K and V, not states."""
        return isinstance(self.kv_cache_config.kv_cache_groups[group].kv_cache_spec, StageSpec)

    # A step: its requests, rows, slots and attention metadata.

    def _update_states(self, scheduler_output: Any) -> Any:
        """Follow the scheduler's orders and update as vLLM does, also in steps that run nothing."""
        self.staged.begin_step(scheduler_output)
        for request_id, num_blocks in getattr(scheduler_output, "trimmed", {}).items():
            self._trim(request_id, num_blocks)
        updated = super()._update_states(scheduler_output)
        for request_id, images in getattr(scheduler_output, "images_again", {}).items():
            features = self.requests[request_id].mm_features
            for image, pixels in images.items():
                features[image] = replace(features[image], data=pixels)
        return updated

    def _trim(self, request_id: str, num_blocks: Sequence[int]) -> None:
        """Cut a request's tables to ``num_blocks`` per KV group: the scheduler has freed the blocks behind them."""
        for block_ids, left in zip(self.requests[request_id].block_ids, num_blocks, strict=True):
            del block_ids[left:]
        index = self.input_batch.req_id_to_index.get(request_id)
        if index is not None:
            for table, left in zip(self.input_batch.block_table.block_tables, num_blocks, strict=True):
                table.num_blocks_per_row[index] = left

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: npt.NDArray[np.int32]) -> Any:
        """Prepare vLLM's inputs, then the rows of every stage."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        self.step = self.staged.lay_out(batch.req_ids, computed, num_scheduled_tokens, self.model.methods)
        return prepared

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        """The slots of every stage's rows, by KV group and by layer name."""
        if self.step is None:
            return super()._get_slot_mappings(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        sharing: dict[StageBatch, list[int]] = {}
        for index, by_stage in enumerate(self.layers):
            if self._holds_slots(index):
                (stage,) = by_stage
                sharing.setdefault(self.step.stages[stage], []).append(index)
        by_group = dict.fromkeys(range(len(groups)), self.no_slots)
        by_group |= {index: slots for batch, alike in sharing.items() for index, slots in self._slots(alike, batch)}
        by_layer = {name: slots for index, slots in by_group.items() for name in groups[index].layer_names}
        return by_group, by_layer

    def _slots(self, groups: Sequence[int], batch: StageBatch) -> Iterable[tuple[int, torch.Tensor]]:
        """(group, int64 [T]) pairs: slots of a stage's rows in the caches of ``groups``, which hold the same tokens."""
        if not groups:
            return ()
        slots = self.tables.slots(groups, *batch.requests_and_slots)
        return zip(groups, async_tensor_h2d(slots, device=self.device), strict=True)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Attention metadata by layer name, built once per distinct set of rows: groups differ in tables and slots."""
        if self.step is None:
            return super()._build_attention_metadata(*args, **kwargs)
        self.built = {}
        by_layer = {}
        for group, by_stage in enumerate(self.layers):
            slots = kwargs["slot_mappings"][group]
            for stage, names in by_stage.items():
                by_layer.update(dict.fromkeys(names, self._metadata(group, self.step.stages[stage], slots)))
        return by_layer, None

    def _metadata(self, group_index: int, batch: StageBatch, slots: torch.Tensor) -> Any:
        table = self.input_batch.block_table[group_index].get_device_tensor(len(batch.num_rows))
        (attention_group,) = self.attn_groups[group_index]
        key = batch if self._holds_slots(group_index) else batch.state_key
        if key in self.built:
            builder = attention_group.get_metadata_builder(0)
            kernel_table = attention_group.map_to_kernel_block_table(table)
            shared = with_tables(builder, self.built[key], kernel_table, slots)
            if shared is not None:
                return shared
        common = self._common_metadata(batch, table, slots)
        self.built[key] = attention_group.build_metadata(common, 0)
        return self.built[key]

    def _common_metadata(self, batch: StageBatch, table: torch.Tensor, slots: torch.Tensor) -> CommonAttentionMetadata:
        row_starts = torch.from_numpy(batch.row_starts)
        seq_lens = torch.from_numpy(batch.seq_lens)
        num_requests = len(batch.num_rows)
        computed = self.input_batch.num_computed_tokens_cpu_tensor[:num_requests]
        return CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(row_starts, device=self.device),
            query_start_loc_cpu=row_starts,
            seq_lens=async_tensor_h2d(seq_lens, device=self.device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=num_requests,
            num_actual_tokens=batch.num_tokens,
            max_query_len=int(batch.num_rows.max()),
            max_seq_len=int(batch.seq_lens.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
            is_prefilling=computed < self.input_batch.num_prompt_tokens_cpu_tensor[:num_requests],
        )

    def _enter(self, step: StagedStep, stage: int) -> None:
        """Replace a stage's slots and metadata in the running step: it runs fewer rows than they were made for."""
        context = get_forward_context()
        batch = step.stages[stage]
        of_stage = [group for group, by_stage in enumerate(self.layers) if stage in by_stage]
        slots = dict.fromkeys(of_stage, self.no_slots)
        slots |= dict(self._slots([group for group in of_stage if self._holds_slots(group)], batch))
        for group in of_stage:
            names, metadata = self.layers[group][stage], self._metadata(group, batch, slots[group])
            context.slot_mapping.update(dict.fromkeys(names, slots[group]))
            context.attn_metadata.update(dict.fromkeys(names, metadata))

    # The model: tower, layers, cuts of caches, sampling.

    def _execute_mm_encoder(self, scheduler_output: Any) -> Any:
        """Run vLLM's vision tower once for each encoding among this step's requests.

        The scheduler has added the encoding to the features' identifiers, so that requests share only equal features.
        """
        outputs: list[torch.Tensor] = []
        for encoding, inputs in self.staged.by_encoding(scheduler_output.scheduled_encoder_inputs).items():
            alike = replace(scheduler_output, scheduled_encoder_inputs=inputs)
            with self.model.encoding(encoding) as reduced:
                outputs += super()._execute_mm_encoder(alike)
            self.staged.keep_reduced(self._batch_mm_inputs_from_scheduler(alike)[0] if reduced else (), reduced)
        return outputs

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the staged loop when a pruned prompt is prefilled; else every layer runs every row, by vLLM's forward."""
        step = self.step
        if step is not None and self.planner.positions is PositionScheme.GROUPED:
            self._write_grouped_ids(step, positions)
        if step is None or step.is_uniform:
            return super()._model_forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        assert inputs_embeds is not None
        assert positions is not None
        step = replace(step, prefills=tuple(map(self._with_caches, step.prefills)))
        carrying = (prefill for prefill in step.prefills if prefill.carried is not None)
        carried = [async_tensor_h2d(self._carried_ids(prefill), device=self.device) for prefill in carrying]
        num_tokens = step.full.num_tokens
        positions = torch.cat((positions[..., :num_tokens], *carried), dim=-1)
        embeds = inputs_embeds[:num_tokens]
        with self.model.levels(num_tokens) as levels:
            self.outcome = run_staged(self.model.decoder, step, embeds, positions, self._enter, levels)
        for index, record in self.staged.ran(self.outcome):
            self.caches.close_up(index, record)
        return self.outcome.hidden

    def _carried_ids(self, prefill: PrunedPrefill) -> Any:
        """RoPE ids of the rows that a prompt carries into its first cut, int64 [n], or [3, n] under M-RoPE."""
        if not self.uses_mrope:
            return self.staged.carried_ids(prefill)
        places = prefill.plan.places_carried(prefill.num_computed)
        return self.requests[prefill.request_id].mrope_positions[:, places]

    def _with_caches(self, prefill: PrunedPrefill) -> PrunedPrefill:
        """The prompt with what the tower left of its images, and the function that reads its K from the caches."""
        prefill = self.staged.with_reduced(prefill, self.requests[prefill.request_id].mm_features)
        read_keys = partial(self.caches.read_keys, prefill.index) if prefill.num_computed else None
        return replace(prefill, read_keys=read_keys)

    def _write_grouped_ids(self, step: StagedStep, positions: torch.Tensor | None) -> None:
        """Write the rows' grouped ids over vLLM's, in the buffer that vLLM fills anew in every step."""
        assert positions is not None
        ids = grouped_positions(step.full, [self.staged.records[name].plan for name in self.input_batch.req_ids])
        async_tensor_h2d(ids, out=positions[: len(ids)])

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as vLLM does, and attach the report of the step to its output."""
        with self._generators_of_discarded_rows_removed():
            output = super().sample_tokens(grammar_output)
        self.step, outcome, self.outcome = None, self.outcome, None
        return with_report(output, outcome)

    @contextmanager
    def _generators_of_discarded_rows_removed(self) -> Iterator[None]:
        """On a CPU, keep requests in the midst of their prompt, whose token is discarded, from using their generator.

        vLLM lets them draw and then turns the generator back by its offset. CPU generators have no offset: there a
        seeded prompt in chunks would end the engine.
        """
        generators = self.input_batch.generators
        removed: dict[int, torch.Generator] = {}
        if generators and self.device.type == "cpu":
            discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
            removed = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            yield
        finally:
            generators.update(removed)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        """Run vLLM's own forward: dummy runs have no requests."""
        self.step = None
        return super()._dummy_run(*args, **kwargs)


def make_staged(runner: Any, planner: Planner) -> None:
    """Turn a freshly constructed V1 model runner into a subclass of its class with :class:`StagedRunner` in front."""
    staged = type(f"Staged{type(runner).__name__}", (StagedRunner, type(runner)), {})
    why = "a worker's init_device names its runner's class; until a worker takes one"
    subclass(runner, staged, why=why, planner=planner, step=None, outcome=None)
