"""Adapter to vLLM's V1 model runner (CPU; CUDA with ``VLLM_USE_V2_MODEL_RUNNER=0``).

The runner stays vLLM's own: :func:`adopt` turns a constructed one into its staged subclass, which overrides the few
hooks below. Everything they call is in ``batch``, ``kv_cache`` and ``forward``.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.worker.block_table import SlotMappingMode
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_hidrop.engine.batch import StageBatch, StagedStep, grouped_positions, make_step
from vllm_hidrop.engine.kv_cache import StageSpec
from vllm_hidrop.engine.planner import Planner
from vllm_hidrop.positions import PositionScheme
from vllm_hidrop.pruning import Plan


class StagedRunner(GPUModelRunner):
    """Overrides of a V1 model runner (the CPU runner derives from the GPU one); state is set by :func:`adopt`."""

    planner: Planner
    plans: dict[str, Plan]
    step: StagedStep | None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The specs vLLM finds, each with its layer's stage."""
        return {name: self._stage_spec(name, spec) for name, spec in super().get_kv_cache_spec().items()}

    def _stage_spec(self, layer_name: str, spec: KVCacheSpec) -> KVCacheSpec:
        if type(spec) is not FullAttentionSpec:
            raise ValueError(f"staged layers need full attention, {layer_name} has {type(spec).__name__}")
        return StageSpec.of(spec, self.planner.schedule.stage_of_layer(extract_layer_index(layer_name)))

    def may_reinitialize_input_batch(self, kv_cache_config: Any) -> None:
        """The batch, whose block tables need not map slots: :meth:`_get_slot_mappings` does, per stage."""
        super().may_reinitialize_input_batch(kv_cache_config)
        for table in self.input_batch.block_table.block_tables:
            table.slot_mapping_mode = SlotMappingMode.NONE

    def _update_states(self, scheduler_output: Any) -> Any:
        """Forget the plans of finished requests, then vLLM's update; also in steps that run nothing."""
        for request_id in scheduler_output.finished_req_ids:
            self.plans.pop(request_id, None)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: npt.NDArray[np.int32]) -> Any:
        """The inputs vLLM prepares, then this step's layout."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        self.step = make_step(
            batch.req_ids,
            [self._plan(request_id) for request_id in batch.req_ids],
            batch.num_computed_tokens_cpu[: batch.num_reqs],
            num_scheduled_tokens,
        )
        return prepared

    def _plan(self, request_id: str) -> Plan:
        plan = self.plans.get(request_id)
        if plan is None:
            plan, _ = self.planner.plan_or_refuse(self.requests[request_id])
            self.plans[request_id] = plan
        return plan

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        """Compact slots of every group's stage, by group and by layer."""
        if self.step is None:
            return super()._get_slot_mappings(*args, **kwargs)
        by_group = {}
        by_layer = {}
        for group_index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            slots = self._slots(group_index, self.step.stages[group.kv_cache_spec.stage])
            by_group[group_index] = slots
            by_layer.update(dict.fromkeys(group.layer_names, slots))
        return by_group, by_layer

    def _slots(self, group_index: int, batch: StageBatch) -> torch.Tensor:
        table = self.input_batch.block_table[group_index]
        requests, slots = batch.requests_and_slots
        blocks = table.block_table.np[requests, slots // table.block_size].astype(np.int64)
        return torch.from_numpy(blocks * table.block_size + slots % table.block_size).to(self.device)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Metadata built once per distinct set of rows; groups that share it differ in tables and slots only."""
        if self.step is None:
            return super()._build_attention_metadata(*args, **kwargs)
        slot_mappings = kwargs["slot_mappings"]
        built: dict[int, Any] = {}
        by_layer = {}
        for group_index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            batch = self.step.stages[group.kv_cache_spec.stage]
            tables = self.input_batch.block_table[group_index].get_device_tensor(len(batch.num_rows))
            (attention_group,) = self.attn_groups[group_index]
            if id(batch) in built:
                metadata = dataclasses.replace(
                    built[id(batch)], block_table=tables, slot_mapping=slot_mappings[group_index]
                )
            else:
                common = self._common_metadata(batch, tables, slot_mappings[group_index])
                metadata = built[id(batch)] = attention_group.build_metadata(common, 0)
            by_layer.update(dict.fromkeys(group.layer_names, metadata))
        return by_layer, None

    def _common_metadata(self, batch: StageBatch, tables: torch.Tensor, slots: torch.Tensor) -> CommonAttentionMetadata:
        row_starts = torch.from_numpy(batch.row_starts)
        seq_lens = torch.from_numpy(batch.seq_lens)
        num_requests = len(batch.num_rows)
        computed = self.input_batch.num_computed_tokens_cpu_tensor[:num_requests]
        return CommonAttentionMetadata(
            query_start_loc=row_starts.to(self.device, non_blocking=True),
            query_start_loc_cpu=row_starts,
            seq_lens=seq_lens.to(self.device, non_blocking=True),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=num_requests,
            num_actual_tokens=batch.num_tokens,
            max_query_len=int(batch.num_rows.max()),
            max_seq_len=int(batch.seq_lens.max()),
            block_table_tensor=tables,
            slot_mapping=slots,
            causal=True,
            is_prefilling=computed < self.input_batch.num_prompt_tokens_cpu_tensor[:num_requests],
        )

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The staged loop when a pruned prompt is prefilled; else every row runs every layer: vLLM's own forward."""
        if self.step is not None and self.planner.positions is PositionScheme.GROUPED:
            self._group(self.step, positions)
        if self.step is None or self.step.is_uniform:
            return super()._model_forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        num_tokens = self.step.full.num_tokens
        assert inputs_embeds is not None
        assert positions is not None
        return self.model.forward_staged(self.step, inputs_embeds[:num_tokens], positions[:num_tokens])

    def _group(self, step: StagedStep, positions: torch.Tensor | None) -> None:
        """Number the step's rows the grouped way, in place in the buffer that vLLM fills anew in every step."""
        assert positions is not None
        ids = grouped_positions(step.full, [self.plans[name] for name in self.input_batch.req_ids])
        positions[: len(ids)].copy_(torch.from_numpy(ids))

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sampling by vLLM, with the rows this step ran attached to its output."""
        output = super().sample_tokens(grammar_output)
        step, self.step = self.step, None
        if step is not None and step.prefills:
            # The asynchronous wrapper carries the plain output inside.
            getattr(output, "_model_runner_output", output).rows_run = step.rows_run()
        return output

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        """Dummy runs have no requests: vLLM's own path."""
        self.step = None
        return super()._dummy_run(*args, **kwargs)


def adopt(runner: Any, planner: Planner) -> None:
    """Make a freshly constructed V1 model runner staged.

    Its class becomes a subclass of itself with :class:`StagedRunner` in front. vLLM's workers name their runner
    class inside ``init_device``, so there is no constructor to pass a class to.
    """
    runner.__class__ = type(f"Staged{type(runner).__name__}", (StagedRunner, type(runner)), {})
    runner.planner = planner
    runner.plans = {}
    runner.step = None
