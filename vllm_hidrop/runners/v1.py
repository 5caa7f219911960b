"""Adapter to vLLM's V1 model runner (CPU; CUDA with ``VLLM_USE_V2_MODEL_RUNNER=0``).

The runner stays vLLM's own: :func:`adopt` turns a constructed one into its staged subclass, which overrides the few
hooks below. Everything they call is in ``batch``, ``kv_cache`` and ``forward``.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_hidrop.engine.image_prefix import Orders
from vllm_hidrop.engine.kv_cache import StageSpec, block_size_of
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.positions import PositionScheme, grouped_ids
from vllm_hidrop.runners import block_tables as tables
from vllm_hidrop.runners.cache_moves import SlotLayout, places_cached
from vllm_hidrop.staged.explain import Patches
from vllm_hidrop.staged.loop import Outcome
from vllm_hidrop.staged.merging import Reduced
from vllm_hidrop.staged.step import PrunedPrefill, StageBatch, StagedStep, Survivors, grouped_positions, make_step


@dataclasses.dataclass
class Tracked:
    """What the worker knows of a request."""

    plan: Plan
    """Of its prompt's prefill."""
    cached: Plan
    """What its caches hold afterwards."""
    survivors: Survivors | None = None
    """What was decided, once it was; a preempted prompt runs by it again."""

    def at(self, num_computed_tokens: int) -> Plan:
        """What counts the stages' tokens in a step that starts there."""
        return self.cached if num_computed_tokens >= self.plan.num_prompt_tokens else self.plan


class StagedRunner(GPUModelRunner):
    """Overrides of a V1 model runner (the CPU runner derives from the GPU one); state is set by :func:`adopt`."""

    planner: Planner
    tracked: dict[str, Tracked]
    reduced: dict[str, Reduced]
    step: StagedStep | None
    selection_seconds: float
    patches: dict[str, Patches]
    built: dict[StageBatch, Any]
    slot_layouts: dict[Any, SlotLayout]
    states: dict[int, torch.Tensor]
    orders: Orders
    carried: dict[str, torch.Tensor]

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The specs vLLM finds, each with its layer's stage."""
        return {name: self._stage_spec(name, spec) for name, spec in super().get_kv_cache_spec().items()}

    def _stage_spec(self, layer_name: str, spec: KVCacheSpec) -> KVCacheSpec:
        if type(spec) is not FullAttentionSpec:
            raise ValueError(f"staged layers need full attention, {layer_name} has {type(spec).__name__}")
        return StageSpec.of(spec, self.planner.schedule.stage_of_layer(extract_layer_index(layer_name)))

    def may_reinitialize_input_batch(self, kv_cache_config: Any) -> None:
        """The batch, with its block tables in one array and no slots of their own: see :meth:`_get_slot_mappings`.

        The caches' form is final now, and so is the size of a block.
        """
        super().may_reinitialize_input_batch(kv_cache_config)
        self.planner = dataclasses.replace(self.planner, block_size=block_size_of(kv_cache_config))
        tables.adopt(self.input_batch.block_table)

    def _update_states(self, scheduler_output: Any) -> Any:
        """Forget what is finished and freed, then vLLM's update; also in steps that run nothing."""
        for request_id in scheduler_output.finished_req_ids:
            self.tracked.pop(request_id, None)
        for identifier in scheduler_output.free_encoder_mm_hashes:
            self.reduced.pop(identifier, None)
        for request_id, num_blocks in getattr(scheduler_output, "trimmed", {}).items():
            self._trim(request_id, num_blocks)
        self.orders = getattr(scheduler_output, "prefix_orders", Orders())
        self.carried = {name: self.states[each.state][: each.num_rows] for name, each in self.orders.reuse.items()}
        for state in self.orders.drop:
            self.states.pop(state, None)
        updated = super()._update_states(scheduler_output)
        for request_id, images in getattr(scheduler_output, "images_again", {}).items():
            features = self.requests[request_id].mm_features
            for image, pixels in images.items():
                features[image] = dataclasses.replace(features[image], data=pixels)
        return updated

    def _trim(self, request_id: str, num_blocks: Sequence[int]) -> None:
        """Forget the last blocks of a request's tables: the scheduler has taken them back."""
        for blocks, left in zip(self.requests[request_id].block_ids, num_blocks, strict=True):
            del blocks[left:]
        index = self.input_batch.req_id_to_index.get(request_id)
        if index is not None:
            for table, left in zip(self.input_batch.block_table.block_tables, num_blocks, strict=True):
                table.num_blocks_per_row[index] = left

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: npt.NDArray[np.int32]) -> Any:
        """The inputs vLLM prepares, then this step's layout."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        tracked = [self._track(request_id) for request_id in batch.req_ids]
        self.step = make_step(
            batch.req_ids,
            [each.at(num_computed) for each, num_computed in zip(tracked, computed, strict=True)],
            computed,
            num_scheduled_tokens,
            self.model.choosers,
            lambda request_id: self.tracked[request_id].survivors,
        )
        if self.step.prefills:
            prefills = tuple(map(self._with_prefix, self.step.prefills))
            self.step = dataclasses.replace(self.step, prefills=prefills)
        return prepared

    def _with_prefix(self, prefill: PrunedPrefill) -> PrunedPrefill:
        """The prompt with what earlier steps computed of it, and what is to be kept of it."""
        name = prefill.request_id
        return dataclasses.replace(
            prefill,
            read_keys=partial(self._read_keys, prefill.index) if prefill.num_computed else None,
            carried=self.carried.get(name),
            keeps_state=name in self.orders.keep,
        )

    def _read_keys(self, index: int, attention: Any, num_slots: int) -> torch.Tensor:
        """See ``batch.ReadKeys``; of the request at ``index`` in the batch."""
        group = self.group_of_layer[attention.layer_name]
        blocks = self.input_batch.block_table[group].block_table.np[index]
        return self._slot_layout(attention).read_keys(attention.kv_cache, blocks, num_slots)

    @cached_property
    def group_of_layer(self) -> dict[str, int]:
        """KV cache group by layer name."""
        groups = self.kv_cache_config.kv_cache_groups
        return {name: index for index, group in enumerate(groups) for name in group.layer_names}

    def _track(self, request_id: str) -> Tracked:
        tracked = self.tracked.get(request_id)
        if tracked is None:
            plan, _ = self.planner.plan_or_refuse(self.requests[request_id])
            tracked = self.tracked[request_id] = Tracked(plan, plan.after_prefill(self.planner.schedule))
        return tracked

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        """Compact slots of every group's stage, by group and by layer."""
        if self.step is None:
            return super()._get_slot_mappings(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        sharing: dict[StageBatch, list[int]] = {}
        for index, group in enumerate(groups):
            sharing.setdefault(self.step.stages[group.kv_cache_spec.stage], []).append(index)
        by_group = {index: slots for batch, each in sharing.items() for index, slots in self._slots(each, batch)}
        by_layer = {name: slots for index, slots in by_group.items() for name in groups[index].layer_names}
        return by_group, by_layer

    def _slots(self, groups: Sequence[int], batch: StageBatch) -> Iterable[tuple[int, torch.Tensor]]:
        """(group, int64 [T]): the slots of a stage's rows in the caches of groups that hold the same tokens."""
        slots = self.input_batch.block_table.slots(groups, *batch.requests_and_slots)
        return zip(groups, torch.from_numpy(slots).to(self.device), strict=True)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Metadata built once per distinct set of rows; groups that share it differ in tables and slots only."""
        if self.step is None:
            return super()._build_attention_metadata(*args, **kwargs)
        self.built = {}
        by_layer = {}
        for group_index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            slots = kwargs["slot_mappings"][group_index]
            metadata = self._metadata(group_index, self.step.stages[group.kv_cache_spec.stage], slots)
            by_layer.update(dict.fromkeys(group.layer_names, metadata))
        return by_layer, None

    def _metadata(self, group_index: int, batch: StageBatch, slots: torch.Tensor) -> Any:
        table = self.input_batch.block_table[group_index].get_device_tensor(len(batch.num_rows))
        if batch in self.built:
            return dataclasses.replace(self.built[batch], block_table=table, slot_mapping=slots)
        (attention_group,) = self.attn_groups[group_index]
        common = self._common_metadata(batch, table, slots)
        self.built[batch] = attention_group.build_metadata(common, 0)
        return self.built[batch]

    def _enter(self, step: StagedStep, stage: int) -> None:
        """Lay a stage out anew in the running step: it has fewer rows than were planned for."""
        context = get_forward_context()
        batch = step.stages[stage]
        groups = self.kv_cache_config.kv_cache_groups
        here = [index for index, group in enumerate(groups) if group.kv_cache_spec.stage == stage]
        for index, slots in self._slots(here, batch):
            metadata = self._metadata(index, batch, slots)
            context.slot_mapping.update(dict.fromkeys(groups[index].layer_names, slots))
            context.attn_metadata.update(dict.fromkeys(groups[index].layer_names, metadata))

    def _common_metadata(self, batch: StageBatch, table: torch.Tensor, slots: torch.Tensor) -> CommonAttentionMetadata:
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
            block_table_tensor=table,
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
        step = self._with_reduced(self.step)
        positions = torch.cat((positions[:num_tokens], *map(self._carried_positions, step.first_carried)))
        outcome = self.model.forward_staged(step, inputs_embeds[:num_tokens], positions, self._enter)
        self.step, self.selection_seconds, self.patches = outcome.step, outcome.selection_seconds, outcome.patches
        self.states.update({self.orders.keep[name]: state for name, state in outcome.states.items()})
        self._settle(outcome)
        return outcome.hidden

    def _carried_positions(self, index: int) -> torch.Tensor:
        """RoPE ids of the rows that the request at ``index`` carries into its first cut, int64 [n]."""
        plan = self.tracked[self.input_batch.req_ids[index]].plan
        ids = np.array(plan.places_carried(int(self.input_batch.num_computed_tokens_cpu[index])), dtype=np.int64)
        if self.planner.positions is PositionScheme.GROUPED:
            ids = grouped_ids(ids, plan.spans)
        elif plan.renumbered:
            ids = np.arange(len(ids)) + plan.carried_from + plan.dropped[plan.first_cut - 1]
        return torch.from_numpy(ids).to(self.device)

    def _with_reduced(self, step: StagedStep) -> StagedStep:
        """The step with what the vision tower left of its images."""
        if not self.reduced:
            return step
        return dataclasses.replace(step, prefills=tuple(self._prefill_with_reduced(p) for p in step.prefills))

    def _prefill_with_reduced(self, prefill: PrunedPrefill) -> PrunedPrefill:
        features = sorted(self.requests[prefill.request_id].mm_features, key=lambda feature: feature.mm_position.offset)
        found = [self.reduced[each.identifier] for each in features if each.identifier in self.reduced]
        if len(found) < len(features):
            return prefill  # features came with the request: nothing was merged, and no patch is a key
        return dataclasses.replace(prefill, reduced=tuple(found))

    def _execute_mm_encoder(self, scheduler_output: Any) -> Any:
        """The vision tower of vLLM, once for each way in which this step's requests have their images encoded.

        The scheduler has named the features by it, so that each are found by who may use them.
        """
        by_encoding: dict[str, dict[str, list[int]]] = {}
        for request_id, images in scheduler_output.scheduled_encoder_inputs.items():
            by_encoding.setdefault(self._track(request_id).plan.encoding, {})[request_id] = images
        outputs: list[torch.Tensor] = []
        for encoding, inputs in by_encoding.items():
            alike = dataclasses.replace(scheduler_output, scheduled_encoder_inputs=inputs)
            with self.model.encoding(encoding) as found:
                outputs += super()._execute_mm_encoder(alike)
            if found:
                identifiers = self._batch_mm_inputs_from_scheduler(alike)[0]
                reduced = zip(identifiers, found, strict=True)
                self.reduced.update({name: each for name, each in reduced if each is not None})
        return outputs

    def _settle(self, outcome: Outcome) -> None:
        """Remember what was decided, and close up the caches that hold less than ran."""
        for prefill in outcome.step.prefills:
            if prefill.plan.adaptive:
                tracked = self.tracked[prefill.request_id]
                tracked.survivors = outcome.survivors[prefill.request_id]
                tracked.plan = dataclasses.replace(prefill.plan, decided=True)
                tracked.cached = tracked.plan.after_prefill(self.planner.schedule)
                self._close_up(prefill.index, tracked)

    def _close_up(self, index: int, tracked: Tracked) -> None:
        """Move the K and V that stay in each stage's caches to a request's first slots."""
        assert tracked.survivors is not None
        for group_index, group in enumerate(self.kv_cache_config.kv_cache_groups):
            stage = group.kv_cache_spec.stage
            if tracked.cached.dropped[stage] == tracked.plan.dropped[stage]:
                continue
            table = self.input_batch.block_table[group_index]
            source = places_cached(tracked.plan, tracked.survivors, stage, self.planner.schedule.stages[stage].cached)
            blocks = table.block_table.np[index]
            dropped = tracked.cached.dropped[stage] - tracked.plan.dropped[stage]
            for name in group.layer_names:
                attention = self.compilation_config.static_forward_context[name]
                layout = self._slot_layout(attention)
                layout.close_up(attention.kv_cache, blocks, source)
                if tracked.plan.renumbered:
                    # Generated tokens count on from what is left, and have the full sequence's ids: keys stand further.
                    turn = self.model.turned_keys(extract_layer_index(name), dropped)
                    layout.change_keys(attention.kv_cache, blocks, len(source), turn)

    def _slot_layout(self, attention: Any) -> SlotLayout:
        """Learnt once for all layers whose pages are alike."""
        key = attention.kv_cache.shape[1:], attention.kv_cache.dtype, type(attention.impl)
        if key not in self.slot_layouts:
            self.slot_layouts[key] = SlotLayout.of(attention)
        return self.slot_layouts[key]

    def _group(self, step: StagedStep, positions: torch.Tensor | None) -> None:
        """Number the step's rows the grouped way, in place in the buffer that vLLM fills anew in every step."""
        assert positions is not None
        ids = grouped_positions(step.full, [self.tracked[name].plan for name in self.input_batch.req_ids])
        positions[: len(ids)].copy_(torch.from_numpy(ids))

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sampling by vLLM, with the rows this step ran attached to its output."""
        with self._generators_at_rest():
            output = super().sample_tokens(grammar_output)
        step, self.step = self.step, None
        if step is not None and step.prefills:
            # The asynchronous wrapper carries the plain output inside.
            plain = getattr(output, "_model_runner_output", output)
            plain.rows_run = step.rows_run()
            plain.selection_seconds, plain.patches = self.selection_seconds, self.patches
            plain.decided = {p.request_id: p.plan.kept for p in step.prefills if p.plan.adaptive}
        return output

    @contextmanager
    def _generators_at_rest(self) -> Iterator[None]:
        """Rows in the midst of a prompt, whose token is thrown away, draw nothing from their request's generator.

        vLLM lets them draw and then turns the generator back by its offset. CPU generators have none: there a seeded
        prompt in chunks would end the engine.
        """
        generators = self.input_batch.generators
        resting: dict[int, torch.Generator] = {}
        if generators and self.device.type == "cpu":
            discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
            resting = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            yield
        finally:
            generators.update(resting)

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
    runner.tracked = {}
    runner.reduced = {}
    runner.slot_layouts = {}
    runner.states = {}
    runner.orders = Orders()
    runner.carried = {}
    runner.step = None
