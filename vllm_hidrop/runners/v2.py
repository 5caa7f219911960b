"""Adapter to vLLM's V2 model runner, its default on CUDA.

:func:`make_staged` turns a runner that vLLM has constructed into its staged subclass, and later the ``ModelState`` that
it makes: the runner lays out a step and computes its slots, the model state builds its attention metadata, also when
graphs are captured, and gives the model the staged loop to run. What they call is in ``staged``, ``runners.requests``,
``runners.stage_caches`` and ``runners.stage_inputs``.

A step that prefills a pruned prompt runs eagerly. Every other step runs every row in every stage, so vLLM may replay a
captured decode graph: its stages read sequence lengths, tables and slots where ``StageInputs`` writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_hidrop.engine.compat import subclass
from vllm_hidrop.engine.kv_cache import block_size_of
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.runners.attention_metadata import check_attention_backends, with_tables
from vllm_hidrop.runners.requests import WorkerRequests, with_report
from vllm_hidrop.runners.stage_caches import StageCaches, stage_specs
from vllm_hidrop.runners.stage_inputs import RequestCounts, StageInputs, StageRows
from vllm_hidrop.staged.adaptive_loop import run_staged
from vllm_hidrop.staged.loop import Outcome
from vllm_hidrop.staged.model import StagedModel
from vllm_hidrop.staged.step import PrunedPrefill, StageBatch, StagedStep, grouped_positions


class StagedModelState(DefaultModelState):
    """Attention metadata per stage, images by their encoding, the staged loop as the model's forward.

    Attributes:
        runner: the staged runner that owns this state.
    """

    runner: "StagedRunner"

    def execute_mm_encoder(self, scheduled_encoder_inputs: Mapping[str, Any]) -> None:
        """Run vLLM's vision tower once for each encoding among this step's requests."""
        staged = self.runner.staged
        for encoding, inputs in staged.by_encoding(scheduled_encoder_inputs).items():
            identifiers, _ = self.encoder_runner.prepare_mm_inputs(inputs)
            with self.runner.model.encoding(encoding) as reduced:
                super().execute_mm_encoder(inputs)
            staged.keep_reduced(identifiers, reduced)

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        """Give the model vLLM's inputs, our RoPE ids, and the staged loop where a pruned prompt is prefilled."""
        inputs = super().prepare_inputs(input_batch, req_states)
        if self.runner.planner.positions is PositionScheme.GROUPED and self.runner.rows is not None:
            inputs["positions"] = self.runner.grouped_ids(input_batch)
        if self.runner.step is not None:
            inputs["staged"] = self.runner.run_staged
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Give a capture vLLM's inputs, and the RoPE ids where real steps write them."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if self.runner.planner.positions is PositionScheme.GROUPED:
            inputs["positions"] = self.runner.ids[:num_tokens]
        return inputs

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Attention metadata by layer name; dummy runs have no rows of ours, captures have the stages' tensors."""
        runner = self.runner
        if runner.rows is None and not for_capture:
            return super().prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config
            )
        rows = runner.rows or runner.inputs.dummy_rows(input_batch, self.max_model_len)
        is_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        runner.metadata = StageMetadata(runner, input_batch, block_tables, rows, is_graph, for_capture)
        by_layer: dict[str, Any] = {}
        for index, slots in enumerate(slot_mappings):
            metadata = runner.metadata.of_group(index, slots)
            by_layer.update(dict.fromkeys(kv_cache_config.kv_cache_groups[index].layer_names, metadata))
        return by_layer


class StageMetadata:
    """Builds the attention metadata of one step, once per distinct set of rows.

    A graph keeps the addresses of its capture, so under graphs every stage has its own, whatever rows it runs. A replay
    reads tables and slots where they are: there a builder runs only for what it writes to tensors of its own.
    """

    def __init__(
        self,
        runner: "StagedRunner",
        batch: InputBatch,
        tables: Sequence[torch.Tensor],
        rows: StageRows,
        is_graph: bool,
        for_capture: bool,
    ) -> None:
        self.runner = runner
        self.batch = batch
        self.tables = tables
        self.rows = rows
        self.is_graph = is_graph
        self.for_capture = for_capture
        self.is_prefilling = torch.from_numpy(batch.is_prefilling_np)
        self.built: dict[int | bytes, Any] = {}

    def of_group(self, group: int, slots: torch.Tensor) -> Any:
        """The metadata of a KV cache group whose rows have these slots, int64 [T]."""
        stage = self.runner.inputs.stages[group]
        (attention_group,) = self.runner.attn_groups[group]
        builder = attention_group.get_metadata_builder(0)
        key, table = self.key(stage), self.tables[group]
        if key in self.built:
            if self.is_graph and not self.for_capture and builder.supports_update_block_table:
                return self.built[key]
            shared = with_tables(builder, self.built[key], table, slots)
            if shared is not None:
                return shared
        build = attention_group.build_metadata
        if self.for_capture:
            build = attention_group.build_metadata_for_cudagraph_capture
        self.built[key] = build(self._common(stage, table, slots), 0)
        return self.built[key]

    def key(self, stage: int) -> int | bytes:
        """Equal for stages that share metadata."""
        return stage if self.is_graph else self.rows.stages[stage].key

    def _common(self, stage: int, table: torch.Tensor, slots: torch.Tensor) -> CommonAttentionMetadata:
        rows = self.rows.stages[stage]
        return CommonAttentionMetadata(
            query_start_loc=rows.row_starts,
            query_start_loc_cpu=rows.host_row_starts,
            seq_lens=rows.seq_lens,
            seq_lens_cpu_upper_bound=rows.host_seq_lens,
            num_reqs=len(rows.host_seq_lens),
            num_actual_tokens=self.batch.num_tokens_after_padding if self.is_graph else rows.num_rows,
            max_query_len=rows.max_rows,
            max_seq_len=rows.max_seq_len,
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
            is_prefilling=self.is_prefilling,
        )


class StagedRunner(GPUModelRunner):
    """Overrides of a V2 model runner (the CPU runner derives from the GPU one).

    Attributes:
        staged: what the worker knows of its requests.
        rows: the rows of the running step's stages; None in dummy runs.
        step: the running step where it prefills pruned prompts, which the staged loop runs; None elsewhere.
        outcome: result of the running step's staged loop, once it has run.
        ids: int64 [max rows], RoPE ids of the grouped scheme.
        vision_tokens: of every request's prompt, under the grouped scheme.
    """

    model: StagedModel
    planner: Planner
    staged: WorkerRequests
    inputs: StageInputs
    caches: StageCaches
    rows: StageRows | None
    step: StagedStep | None
    batch: InputBatch | None
    metadata: StageMetadata
    outcome: Outcome | None
    ids: torch.Tensor
    vision_tokens: RequestCounts

    # Model and caches.

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, and make its model state staged."""
        super().load_model(*args, **kwargs)
        state = self.model_state
        staged = type(f"Staged{type(state).__name__}", (StagedModelState, type(state)), {})
        why = "a runner's load_model names its model state's class, or asks each model for it; until it takes a mixin"
        subclass(state, staged, why=why, runner=self)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The specs of vLLM by layer name, each with its layer's stage."""
        return stage_specs(super().get_kv_cache_spec(), self.planner.schedule)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Make vLLM's caches and tables, and the stages' tensors; from here on the size of a block is final."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        check_attention_backends(self.attn_groups)
        self.planner = replace(self.planner, block_size=block_size_of(self.kv_cache_config))
        self.staged = WorkerRequests(self.planner)
        groups = self.kv_cache_config.kv_cache_groups
        dropped = RequestCounts(len(self.planner.schedule.stages), self.max_num_reqs, self.device)
        self.inputs = StageInputs(self.block_tables, [group.kv_cache_spec.stage for group in groups], dropped)
        attentions = self.compilation_config.static_forward_context
        self.caches = StageCaches(self.model.decoder, groups, attentions, self._block_ids)
        if self.planner.positions is PositionScheme.GROUPED:
            self.ids = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=self.device)
            self.vision_tokens = RequestCounts(1, self.max_num_reqs, self.device)

    def _block_ids(self, group: int, index: int) -> torch.Tensor:
        assert self.batch is not None
        return self.block_tables.block_tables[group].gpu[int(self.batch.idx_mapping_np[index])]

    # A step: its requests, rows and slots.

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step, or a dummy run, which has no rows of ours."""
        self.rows = self.step = self.batch = None
        return super().execute_model(scheduler_output, *args, **kwargs)

    def finish_requests(self, scheduler_output: Any) -> None:
        """Finish as vLLM does; follow the scheduler's orders first, also in steps that run nothing."""
        self.staged.begin_step(scheduler_output)
        for request_id, num_blocks in getattr(scheduler_output, "trimmed", {}).items():
            index = self.req_states.req_id_to_index.get(request_id)
            if index is not None:
                # The scheduler has freed the blocks behind these.
                self.block_tables.num_blocks.np[:, index] = num_blocks
        super().finish_requests(scheduler_output)

    def add_requests(self, scheduler_output: Any) -> None:
        """Add as vLLM does; no prompt among these, preempted ones included, has run."""
        super().add_requests(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            index = self.req_states.req_id_to_index[new.req_id]
            self.inputs.dropped.set(index, 0)
            if self.planner.positions is PositionScheme.GROUPED:
                self.vision_tokens.set(index, self.staged.records[new.req_id].plan.num_vision_tokens)
        for request_id, images in getattr(scheduler_output, "images_again", {}).items():
            features = self.encoder_cache.mm_features[request_id]
            for image, pixels in images.items():
                features[image] = replace(features[image], data=pixels)

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> Any:
        """Gather vLLM's state of the batch, and lay the step out where it prefills pruned prompts.

        Such a step must not replay a decode graph, as vLLM would where it has one row per request (the image is reused
        and one token follows it): it is not called uniform.
        """
        state, uniform_tokens = super().gather_batch_req_state(scheduler_output, dummy_run)
        if state is None:
            return state, uniform_tokens
        computed = self.req_states.num_computed_tokens_np[state.idx_mapping_np]
        if state.has_prefill and self._prefills_pruned(state, computed):
            self.step = self.staged.lay_out(state.req_ids, computed, state.num_scheduled_tokens, self.model.methods)
            uniform_tokens = None
        return state, uniform_tokens

    def _prefills_pruned(self, state: Any, computed: Any) -> bool:
        plans = (self.staged.records[request_id].plan for request_id in state.req_ids)
        lengths = zip(plans, computed, computed + state.num_scheduled_tokens, strict=True)
        return any(plan.is_pruned and first < plan.num_prompt_tokens <= end for plan, first, end in lengths)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> InputBatch:
        """Prepare vLLM's inputs, and note them: they hold the batch's order."""
        self.batch = super().prepare_inputs(*args, **kwargs)
        return self.batch

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Block tables as vLLM's, and the slots of every group's rows."""
        tables = self.block_tables.gather_block_tables(
            input_batch.idx_mapping, num_reqs_padded=input_batch.num_reqs_after_padding
        )
        if self.step is None:
            self.rows = self.inputs.full_rows(input_batch)
            num_padded = input_batch.num_tokens_after_padding
            self.inputs.write_slots(self.rows, input_batch.idx_mapping, num_padded, self.inputs.all_groups)
            return tables, self.block_tables.slot_mappings[:, :num_padded].unbind(0)
        self.rows = StageRows.of_batches(self.step.stages, self.device)
        self.inputs.write_slots(self.rows, input_batch.idx_mapping, 0, self.inputs.all_groups)
        return tables, [self._slots(group, self.rows) for group in range(len(tables))]

    def _slots(self, group: int, rows: StageRows) -> torch.Tensor:
        return self.block_tables.slot_mappings[group, : rows.stages[self.inputs.stages[group]].num_rows]

    def _enter(self, step: StagedStep, stage: int) -> None:
        """Replace a stage's slots and metadata in the running step: it runs fewer rows than they were made for."""
        assert self.batch is not None
        context = get_forward_context()
        rows = StageRows.of_batches(step.stages, self.device)
        self.inputs.write_slots(rows, self.batch.idx_mapping, 0, self.inputs.groups[stage])
        self.metadata = StageMetadata(self, self.batch, self.metadata.tables, rows, False, False)
        for index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            if self.inputs.stages[index] == stage:
                slots = self._slots(index, rows)
                metadata = self.metadata.of_group(index, slots)
                context.slot_mapping.update(dict.fromkeys(group.layer_names, slots))
                context.attn_metadata.update(dict.fromkeys(group.layer_names, metadata))

    # The model: layers, RoPE ids, sampling.

    def run_staged(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the step's staged loop, given input embeddings [T, C] and RoPE ids int64 [T] or [3, T]; T may be padded.

        Returns:
            The final hidden states [T, C], without padding.
        """
        assert self.step is not None
        step = replace(self.step, prefills=tuple(map(self._with_caches, self.step.prefills)))
        carrying = (prefill for prefill in step.prefills if prefill.carried is not None)
        carried = [self._carried_ids(prefill) for prefill in carrying]
        num_tokens = step.full.num_tokens
        positions = torch.cat((positions[..., :num_tokens], *carried), dim=-1)
        with self.model.levels(num_tokens) as levels:
            self.outcome = run_staged(self.model.decoder, step, embeds[:num_tokens], positions, self._enter, levels)
        for index, record in self.staged.ran(self.outcome):
            self.caches.close_up(index, record)
        for prefill in step.prefills:
            index = self.req_states.req_id_to_index[prefill.request_id]
            self.inputs.dropped.set(index, self.staged.records[prefill.request_id].cached.dropped)
        return self.outcome.hidden

    def _carried_ids(self, prefill: PrunedPrefill) -> torch.Tensor:
        """RoPE ids of the rows that a prompt carries into its first cut, int64 [n], or [3, n] under M-RoPE."""
        rope = self.model_state.rope_state
        if rope is None:
            return async_tensor_h2d(self.staged.carried_ids(prefill), device=self.device)
        places = async_tensor_h2d(prefill.plan.places_carried(prefill.num_computed), device=self.device)
        index = self.req_states.req_id_to_index[prefill.request_id]
        ids = rope.read_prefill_positions(index, prefill.plan.num_prompt_tokens)
        return ids[:, places].to(torch.int64)

    def _with_caches(self, prefill: PrunedPrefill) -> PrunedPrefill:
        """The prompt with what the tower left of its images, and the function that reads its K from the caches."""
        prefill = self.staged.with_reduced(prefill, self.encoder_cache.mm_features[prefill.request_id])
        read_keys = partial(self.caches.read_keys, prefill.index) if prefill.num_computed else None
        return replace(prefill, read_keys=read_keys)

    def grouped_ids(self, batch: InputBatch) -> torch.Tensor:
        """Grouped ids of the step's rows, int64 [T], padded as vLLM's positions are."""
        if not batch.has_prefill:  # one generated token of every request
            ids = self.ids[: batch.num_reqs]
            torch.sub(batch.positions[: batch.num_reqs], self.vision_tokens.of(batch.idx_mapping)[0], out=ids)
            return self.ids[: batch.num_tokens_after_padding]
        full = StageBatch(batch.num_scheduled_tokens, batch.num_computed_tokens_np + batch.num_scheduled_tokens)
        on_host = grouped_positions(full, [self.staged.records[name].plan for name in batch.req_ids])
        async_tensor_h2d(on_host, out=self.ids[: len(on_host)])
        return self.ids[: batch.num_tokens_after_padding]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as vLLM does, and attach the report of the step to its output."""
        output = super().sample_tokens(grammar_output)
        outcome, self.outcome = self.outcome, None
        return with_report(output, outcome)


def make_staged(runner: Any, planner: Planner) -> None:
    """Turn a freshly constructed V2 model runner into a subclass of its class with :class:`StagedRunner` in front."""
    staged = type(f"Staged{type(runner).__name__}", (StagedRunner, type(runner)), {})
    why = "a worker's init_device names its runner's class; until a worker takes one"
    subclass(runner, staged, why=why, planner=planner, rows=None, step=None, batch=None, outcome=None)
