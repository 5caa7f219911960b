"""The scheduler: plans every request, keeps a pruned prompt in one step, reports what was held.

Rules, on top of vLLM's own:

1. A request is planned once, when it arrives; its stages' managers count by that plan until it is freed.
2. A pruned prompt is prefilled in one step from its first image to its end: scoring needs its last row beside every
   vision row. The text before the first image (the prefix) is chunked as in vLLM, into the room that a step has left.
   Until a step has room for the rest (token budget, encoder budget for all its images, blocks) the request keeps its
   place, at the head of the queue or among the running ones: earlier requests come first, later ones get what it
   leaves. So neither it nor they can starve.
3. Text-only and ``off`` requests are scheduled, chunked and preempted as in vLLM.
4. A preempted request is prefilled again under the same plan. Tokens it had generated may follow in the same step; with
   an adaptive method they follow in the next one, as they attend to what the caches hold after the prompt.
5. For an adaptive method, blocks are allocated for the upper bounds; the blocks that the worker's report shows to be
   unneeded are free again before the next step is scheduled. A preempted prompt keeps the decided counts.
6. Prefix caching is vLLM's: every stage hashes the blocks of the full sequence. Of a pruned prompt only blocks within
   its prefix are cached, and only those are reused, if an earlier step has written them: scoring reads their K. Where
   the method is adaptive, its signal needs every row, or the cache rounds K, the prompt has no such prefix: nothing is
   cached or chunked.
7. A request whose options are invalid ends with an error, whose reason is logged and is the output's ``stop_reason``,
   and touches no other (the server answers 400 before).
8. ``--max-num-batched-tokens`` bounds the rows that a step computes, mean over the layers: an unpruned token is a row,
   a pruned prompt is fewer rows than tokens. A prompt that alone exceeds the bound runs in a step without other
   prefills, beside the decodes. vLLM's own limit on a step's tokens is higher, and sizes its buffers.
9. When the last request has ended, a part of the books is checked; all of them when an idle engine is asked. A fault
   makes the server unready and leaves the engine running.
10. Images are reused up to the first cut: a pruned prompt may start behind any image that an earlier prompt had at the
    same place after the same tokens, see ``engine.image_prefix``. vLLM copies a page that the reused slots end within.
    Only images behind the reused ones are encoded; the step's budget counts the rows that are computed. A prefix is
    reused only where all its blocks and its state are there.
11. As in vLLM, the worker gets no pixels of images that a prompt was admitted behind. If the prompt must run again, and
    neither their blocks nor their features are left, the pixels come with the step that encodes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_hidrop.engine.compat import end_with_error, let_clients_ask
from vllm_hidrop.engine.grids import spans_on_grids
from vllm_hidrop.engine.image_prefix import Entry, ImagePrefixes
from vllm_hidrop.engine.integrity import IntegrityLog, find_faults
from vllm_hidrop.engine.kv_cache import block_size_of, count_by, stage_managers
from vllm_hidrop.engine.records import Record
from vllm_hidrop.engine.report import Costing, Run, tower_images, what_ran, with_blocks
from vllm_hidrop.engine.step_budget import StepBudget
from vllm_hidrop.plan.plan import DENSE, Plan
from vllm_hidrop.plan.planner import Planner

logger = init_logger(__name__)

DEAD_END = "no token of this model's vocabulary can go on with what is asked for"


class StagedScheduler(Scheduler):
    """vLLM's scheduler with the rules above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planner = Planner.from_vllm_config(self.vllm_config)
        self.costing = Costing.of(self.planner, self.vllm_config, self.kv_cache_config)
        self.records: dict[str, Record] = {}
        self.trimmed: dict[str, list[int]] = {}
        """By request id and KV group, the number of blocks left in tables that were trimmed since the last step."""
        self.failures: dict[str, str | None] = {}
        """By request id, why it ended with an error in this step; None where a retry may help."""
        step_rows = self.vllm_config.additional_config["hidrop"]["resolved"]["step_rows"]
        self.budget = StepBudget(step_rows, self.planner.schedule)
        self.integrity = IntegrityLog()
        let_clients_ask()
        if self.planner.is_staged:
            self.planner = replace(self.planner, block_size=block_size_of(self.kv_cache_config))
            if self.kv_cache_manager.enable_caching and self.planner.block_size != self.block_size:
                raise ValueError(
                    f"KV blocks have {self.planner.block_size} slots, the scheduler counts {self.block_size}"
                )
            count_by(self.kv_cache_manager, self.records)
        managers, pool = self.kv_cache_manager.coordinator.single_type_managers, self.kv_cache_manager.block_pool
        model = self.vllm_config.model_config
        hidden_bytes = model.get_hidden_size() * model.dtype.itemsize
        levels_left = (self.planner.num_levels - stage.first_layer for stage in self.planner.schedule.stages)
        row_bytes = [hidden_bytes * (1 + max(0, num_levels)) for num_levels in levels_left]
        self.prefixes = ImagePrefixes(managers, pool, row_bytes, self.planner.state_bytes)

    def add_request(self, request: Request) -> None:
        """Plan the request, then vLLM's admission (rules 1 and 7)."""
        if request.request_id not in self.requests:
            prompt_length, features = request.num_prompt_tokens, request.mm_features
            plan, refusal = self.planner.plan_or_refuse(prompt_length, features, request.sampling_params)
            self.records[request.request_id] = Record.of(plan)
            if plan.is_pruned:
                _rename_features(request, plan, self.hash_block_size)
            if refusal is not None:
                logger.error("request %s refused: %s", request.request_id, refusal)
                end_with_error(self, request.request_id, refusal)
                self.failures[request.request_id] = refusal
        super().add_request(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many tokens of a request the step runs; vLLM calls this last (rules 2, 4 and 8)."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        num_new_tokens = self._chunk(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens:
            request_id = request.request_id
            self.budget.spend(request_id, self.records[request_id].plan, num_computed_tokens, num_new_tokens)
        return num_new_tokens

    def _chunk(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many of the tokens that vLLM has room for may run in this step (rules 2, 4 and 8)."""
        plan = self.records[request.request_id].plan
        num_new_tokens = self.budget.fit(plan, num_computed_tokens, num_new_tokens)
        if plan.is_pruned and num_computed_tokens + num_new_tokens < plan.num_prompt_tokens:
            fits = plan.num_prompt_tokens - plan.carried_from <= self.max_num_scheduled_tokens
            is_reusable = fits and self._reuse_off(plan) is None
            prefix = plan.carried_from if is_reusable else plan.prefix_tokens
            return max(0, min(num_new_tokens, prefix - num_computed_tokens))
        if plan.adaptive and num_computed_tokens == 0:
            return min(num_new_tokens, plan.num_prompt_tokens)
        return num_new_tokens

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Schedule all images of a pruned prompt or none: two requests that hold some each would wait for ever."""
        chunk = self._chunk(request, num_computed_tokens, num_new_tokens)
        if chunk == 0:
            return [], 0, encoder_compute_budget, [], []
        scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, chunk, encoder_compute_budget, *args, **kwargs
        )
        if scheduled[1] < chunk and self.records[request.request_id].plan.is_pruned:
            self.encoder_cache_manager.free(request)
            return [], self._chunk(request, num_computed_tokens, scheduled[1]), encoder_compute_budget, [], []
        return scheduled

    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """The cached blocks that a request may start behind, and their number of tokens (rules 6 and 10)."""
        limit = () if max_cache_hit_length is None else (max_cache_hit_length,)  # from vLLM 0.33 on
        hit = super()._get_local_prefix_cache_hit(request, *limit)
        record = self.records[request.request_id]
        plan = record.plan
        entry = self._find_image_prefix(request, plan)
        if entry is not None and (max_cache_hit_length is None or entry.num_tokens <= max_cache_hit_length):
            hit = self.prefixes.blocks_of(entry), entry.num_tokens, 0, False
        elif plan.is_pruned and hit[1]:
            num_blocks = min(hit[1], plan.prefix_tokens) // self.block_size
            managers = self.kv_cache_manager.coordinator.single_type_managers
            for manager, blocks in zip(managers, hit[0].blocks, strict=True):
                written = (block.block_id not in manager.fresh for block in blocks[:num_blocks])
                num_blocks = len(list(takewhile(bool, written)))
            num_tokens = num_blocks * self.block_size
            hit = self.kv_cache_manager.truncate_computed_blocks(hit[0], num_tokens), num_tokens, 0, False
        # A preempted request may hit tokens that it had generated, too.
        record.num_reused = min(hit[1], request.num_prompt_tokens)
        return hit

    def _find_image_prefix(self, request: Request, plan: Plan) -> Entry | None:
        """The longest reusable prefix that ends with an image; None where the request may not start behind one."""
        if self._reuse_off(plan) or not plan.is_pruned or request.skip_reading_prefix_cache:
            return None
        return self.prefixes.find(request, plan)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The step that vLLM schedules, with tables to trim, states to keep or drop, and pixels (rules 5, 10, 11)."""
        self.budget.start()
        output = super().schedule(*args, **kwargs)
        output.trimmed, self.trimmed = self.trimmed, {}
        self.prefixes.start(self._prompts_ending(output))
        output.prefix_orders = self.prefixes.take_orders()
        output.images_again = self._images_again(output)
        for request_id, images in output.scheduled_encoder_inputs.items():
            self.records[request_id].encoded |= tower_images(self.requests[request_id]).intersection(images)
        # This step tells the worker of the last request's end: a check now delays no answer (rule 9).
        if not self.requests and self.integrity.sample(self):
            self.integrity.record(self.check_integrity())
        return output

    def _images_again(self, output: SchedulerOutput) -> dict[str, dict[int, Any]]:
        """By request id and image, pixels that this step encodes and the worker does not have (rule 11)."""
        for new in output.scheduled_new_reqs:
            features = zip(new.mm_features, self.requests[new.req_id].mm_features, strict=True)
            self.records[new.req_id].withheld = {
                image for image, (sent, own) in enumerate(features) if sent.data is not own.data
            }
        again = {}
        for request_id, encoded in output.scheduled_encoder_inputs.items():
            withheld = self.records[request_id].withheld
            images = withheld.intersection(encoded)
            if images:
                withheld -= images
                again[request_id] = {image: self.requests[request_id].mm_features[image].data for image in images}
        return again

    def integrity_report(self) -> dict[str, Any]:
        """The results of all checks, after another one if the engine is idle and has run since; call between steps."""
        if self.integrity.is_due and not self.requests:
            self.integrity.record(self.check_integrity())
        return self.integrity.dump()

    def check_integrity(self) -> list[str]:
        """Log and return the faults of the books, one line each; call between steps."""
        faults = find_faults(self)
        for fault in faults:
            logger.error("integrity: %s", fault)
        return faults

    def _prompts_ending(self, output: SchedulerOutput) -> Iterator[tuple[Request, Plan, int]]:
        """Pruned prompts whose images can be reused and whose ends run in a step, with the first token that runs."""
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            plan, request = self.records[request_id].plan, self.requests[request_id]
            first = request.num_computed_tokens - num_tokens
            ends_here = first < plan.num_prompt_tokens <= request.num_computed_tokens
            if ends_here and plan.is_pruned and self._reuse_off(plan) is None:
                yield request, plan, first

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset vLLM's prefix cache, and forget the reusable images."""
        is_reset: bool = super().reset_prefix_cache(*args, **kwargs)
        if is_reset:
            self.prefixes.clear()
        return is_reset

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt as vLLM does; the prompt will run again under the same plan (rule 4)."""
        super()._preempt_request(request, *args, **kwargs)
        self.budget.take_back(request.request_id)
        self.trimmed.pop(request.request_id, None)  # its tables are gone
        self.prefixes.gone(request.request_id)
        self.records[request.request_id].preempted()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Read the worker's report of the step, update as vLLM does, then send the first reports."""
        took_ms = 1000 * getattr(model_runner_output, "selection_seconds", 0.0)
        for request_id, rows in getattr(model_runner_output, "rows_run", {}).items():
            if request_id in self.records:  # else aborted since
                self.records[request_id].ran(rows, took_ms)
                plan = self.records[request_id].plan
                if not self._reuse_off(plan):
                    self.prefixes.ran(self.requests[request_id], plan)
        for request_id, patches in getattr(model_runner_output, "patches", {}).items():
            if request_id in self.records:
                self.records[request_id].patches = patches
        for request_id, kept in getattr(model_runner_output, "decided", {}).items():
            if request_id in self.records:
                self._settle(self.requests[request_id], kept)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                self._report_early(output)
                if output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = self.failures.pop(output.request_id, None)
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus, *args: Any, **kwargs: Any) -> Any:
        """Finish as vLLM does; note why on errors: a grammar that cannot be compiled, or None (a retry may help)."""
        if finished_status == RequestStatus.FINISHED_ERROR:
            for request_id in request_ids:
                request = self.requests.get(request_id)
                structured = request.structured_output_request if request is not None else None
                error = structured.grammar if structured is not None else None
                reason = f"the grammar cannot be compiled: {error}" if isinstance(error, Exception) else None
                self.failures.setdefault(request_id, reason)
        return super().finish_requests(request_ids, finished_status, *args, **kwargs)

    def _settle(self, request: Request, kept: Sequence[Sequence[int]]) -> None:
        """Count by what the worker decided from now on, and free the blocks that are not needed (rule 5)."""
        request_id = request.request_id
        record = self.records[request_id]
        record.decided(kept)
        if request.num_computed_tokens == 0:
            return  # preempted since; its blocks are free already
        record.holds(self.planner.schedule)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        staged = stage_managers(managers)
        num_returned = sum(manager.trim(request_id, request.num_computed_tokens) for manager in staged)
        self.kv_cache_manager.forget(request_id)
        if num_returned:
            self.trimmed[request_id] = [len(manager.req_to_blocks[request_id]) for manager in managers]
            record.num_returned += num_returned

    def _report_early(self, output: EngineCoreOutput) -> None:
        """Report with the first token: a request that its client ends (stop string, abort) has no last output."""
        record = self.records.get(output.request_id)
        if record is not None and not record.is_reported and not output.finished:
            record.is_reported = True
            output.kv_transfer_params = {"hidrop": self._report(self.requests[output.request_id])}

    def _report(self, request: Request) -> dict[str, Any]:
        record = self.records[request.request_id]
        if record.report is None:
            plan = record.prefill_plan
            run = Run(record.rows_run, record.num_reused, frozenset(record.encoded), record.patches)
            record.report = what_ran(self.costing, plan, run, request) | {
                "engine": self.vllm_config.parallel_config.data_parallel_index,
                "selection_ms": record.selection_ms,
                "reuse_off": self._reuse_off(plan),
            }
            if plan.explains:
                record.report["spans"] = spans_on_grids(plan.spans, request.mm_features, self.vllm_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        report = with_blocks(record.report, self.costing, managers, request)
        return report | {"kv_blocks_returned": record.num_returned}

    def _reuse_off(self, plan: Plan) -> str | None:
        """Why no image of this prompt can be reused; None where images can."""
        if self.kv_cache_manager.enable_caching:
            return self.planner.reuse_off(plan)
        return "recurrent" if self.planner.attention_layers and self.planner.is_staged else "disabled"

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        """Report what the request held, free it as vLLM does, forget its record."""
        report = self._report(request)
        if request.status == RequestStatus.FINISHED_ERROR:
            # A token was sampled that its grammar forbids: the grammar allowed none.
            self.failures.setdefault(request.request_id, DEAD_END)
        else:
            self.failures.pop(request.request_id, None)
        self.trimmed.pop(request.request_id, None)
        self.prefixes.gone(request.request_id)
        kv_transfer_params, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        del self.records[request.request_id]
        return {**(kv_transfer_params or {}), "hidrop": report}, ec_transfer_params


def _rename_features(request: Request, plan: Plan, hash_block_size: int) -> None:
    """Add the encoding to the identifiers of a pruned prompt's features, and keep block hashes within its prefix only.

    Identifiers without it stay for stock vLLM's features; the request's hashes were made with those (rule 6). Another
    request may share the features (n > 1), so they are not changed but replaced.
    """
    if plan.encoding != DENSE:
        request.mm_features = [
            replace(feature, identifier=f"{feature.identifier}:{plan.encoding}") for feature in request.mm_features
        ]
    request._block_hasher = None
    del request.block_hashes[plan.prefix_tokens // hash_block_size :]


class StagedAsyncScheduler(StagedScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler with the rules above."""
