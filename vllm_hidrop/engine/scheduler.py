"""The scheduler: plans every request, keeps a pruned prompt in one step, reports what was held.

Rules, on top of vLLM's own:

1. A request is planned once, when it arrives; its stages' managers count by that plan until it is freed.
2. A pruned prompt is prefilled in one step from its first image to its end: scoring needs its last row beside every
   vision row. The text before the first image (its prefix) is chunked as in vLLM: into what room a step has left. Until
   a step has room for the rest (token budget, all images in the encoder's, blocks) the request waits in its place, at
   the head of the queue or among the running ones; requests that came later are served what it leaves, those that came
   earlier come first. So it cannot starve, and neither can they.
3. Text-only and ``off`` requests are scheduled, chunked and preempted as in vLLM.
4. A preempted request is prefilled again under the same plan; tokens it had generated may follow in the same step,
   or, where the method decides the counts, in the next one: they see what the caches hold after the prompt.
5. Where the method decides the counts, blocks are allocated for their upper bounds; the blocks that the worker's
   report shows to be unneeded are free again before the next step is scheduled. What was decided stays so.
6. Prefix caching is vLLM's: every stage hashes the blocks of the full sequence. Of a pruned prompt only blocks within
   its prefix are cached, and only those are reused, if an earlier step has written them: scoring reads their K. Where
   the method decides the counts, or the cache rounds K, the prompt has no such prefix: nothing is cached or chunked.
7. A request whose options are invalid (the server refuses those with a 400 before they get here) ends with an error,
   whose reason is logged and is the output's ``stop_reason``; nothing else is touched.
8. ``--max-num-batched-tokens`` bounds the rows that a step computes, averaged over the layers: a token that is not
   pruned is a row, a pruned prompt is fewer rows than tokens. One that alone exceeds the bound runs in a step without
   other prefills, beside the decodes. vLLM's own limit on a step's tokens is higher, and sizes its buffers.
9. When the last request has ended, a part of the books is checked, and all of them when an idle engine is asked; what
   is found makes the server unready, not the engine dead.
10. Images are reused up to the first cut: a pruned prompt may start behind any image that an earlier prompt had at the
    same place after the same tokens, see ``prefix``. A page that the reused slots end within is copied for it. Only
    images behind that one are encoded, and the step's budget counts the rows that are computed. What is reused is there
    in full, blocks and states, or it is not reused.
11. The worker gets no pixels of images that a prompt was admitted behind, as in vLLM. If the prompt must run again, and
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

from vllm_hidrop.engine.compat import let_clients_ask
from vllm_hidrop.engine.image_prefix import Entry, ImagePrefixes
from vllm_hidrop.engine.integrity import IntegrityLog, find_faults
from vllm_hidrop.engine.kv_cache import block_size_of, count_by
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
        """Blocks that are left of tables that were trimmed since the last step, by request and group."""
        self.failures: dict[str, str | None] = {}
        """Why requests ended with an error in this step; None where a retry may help."""
        step_rows = self.vllm_config.additional_config["hidrop"]["resolved"]["step_rows"]
        self.budget = StepBudget(step_rows, self.planner.schedule)
        self.integrity = IntegrityLog()
        let_clients_ask()
        if self.planner.is_staged:
            self.planner = replace(self.planner, block_size=block_size_of(self.kv_cache_config))
            if self.planner.block_size != self.block_size:
                raise ValueError(
                    f"KV blocks have {self.planner.block_size} slots, the scheduler counts {self.block_size}"
                )
            count_by(self.kv_cache_manager, self.records)
        managers, pool = self.kv_cache_manager.coordinator.single_type_managers, self.kv_cache_manager.block_pool
        model = self.vllm_config.model_config
        row_bytes = model.get_hidden_size() * model.dtype.itemsize
        self.prefixes = ImagePrefixes(managers, pool, row_bytes, self.planner.state_bytes)

    def add_request(self, request: Request) -> None:
        """Plan the request, then vLLM's admission (rules 1 and 7)."""
        if request.request_id not in self.requests:
            plan, refusal = self.planner.plan_or_refuse(request)
            self.records[request.request_id] = Record.of(plan)
            if plan.is_pruned:
                _name_apart(request, plan, self.hash_block_size)
            if refusal is not None:
                logger.error("request %s refused: %s", request.request_id, refusal)
                # vLLM ends the requests of this set with an error at its next update.
                self.grammar_compile_error_reqs.add(request.request_id)
                self.failures[request.request_id] = refusal
        super().add_request(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The last word of vLLM on how many tokens of a request a step runs (rules 2, 4 and 8)."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        num_new_tokens = self._chunk(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens:
            name = request.request_id
            self.budget.spend(name, self.records[name].plan, num_computed_tokens, num_new_tokens)
        return num_new_tokens

    def _chunk(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Of so many tokens that vLLM's step has room for, those that it may run (rules 2, 4 and 8)."""
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
        """The images of a pruned prompt are encoded all or none: two requests must not wait for what both hold."""
        chunk = self._chunk(request, num_computed_tokens, num_new_tokens)
        if chunk == 0:
            return [], 0, encoder_compute_budget, [], []
        found = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, chunk, encoder_compute_budget, *args, **kwargs
        )
        if found[1] < chunk and self.records[request.request_id].plan.is_pruned:
            self.encoder_cache_manager.free(request)
            return [], self._chunk(request, num_computed_tokens, found[1]), encoder_compute_budget, [], []
        return found

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """The cached blocks that a request may start from (rules 6 and 10)."""
        found = super()._get_local_prefix_cache_hit(request)
        record = self.records[request.request_id]
        plan = record.plan
        entry = self._reusable(request, plan)
        if entry is not None:
            found = self.prefixes.blocks_of(entry), entry.num_tokens, 0, False
        elif plan.is_pruned and found[1]:
            num_blocks = min(found[1], plan.prefix_tokens) // self.block_size
            managers = self.kv_cache_manager.coordinator.single_type_managers
            for manager, blocks in zip(managers, found[0].blocks, strict=True):
                written = (block.block_id not in manager.fresh for block in blocks[:num_blocks])
                num_blocks = len(list(takewhile(bool, written)))
            num_tokens = num_blocks * self.block_size
            found = self.kv_cache_manager.truncate_computed_blocks(found[0], num_tokens), num_tokens, 0, False
        # A preempted request may find tokens that it had generated, too.
        record.num_reused = min(found[1], request.num_prompt_tokens)
        return found

    def _reusable(self, request: Request, plan: Plan) -> Entry | None:
        """The longest prefix that ends with an image, if the request may start behind one."""
        if self._reuse_off(plan) or not plan.is_pruned or request.skip_reading_prefix_cache:
            return None
        return self.prefixes.find(request, plan)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The step that vLLM schedules, and what the worker must forget before it, and keep (rules 5 and 10)."""
        self.budget.start()
        output = super().schedule(*args, **kwargs)
        output.trimmed, self.trimmed = self.trimmed, {}
        self.prefixes.start(self._prompts_ending(output))
        output.prefix_orders = self.prefixes.take_orders()
        output.images_again = self._images_again(output)
        for name, images in output.scheduled_encoder_inputs.items():
            self.records[name].encoded |= tower_images(self.requests[name]).intersection(images)
        # The step that tells the worker of the last request's end; its answer is on its way already (rule 9).
        if not self.requests and self.integrity.sample(self):
            self.integrity.record(self.check_integrity())
        return output

    def _images_again(self, output: SchedulerOutput) -> dict[str, dict[int, Any]]:
        """Pixels of images that this step encodes and the worker has not got, by request and image (rule 11)."""
        for new in output.scheduled_new_reqs:
            self.records[new.req_id].withheld = {
                image for image, feature in enumerate(new.mm_features) if feature.data is None
            }
        again = {}
        for name, encoded in output.scheduled_encoder_inputs.items():
            withheld = self.records[name].withheld
            images = withheld.intersection(encoded)
            if images:
                withheld -= images
                again[name] = {image: self.requests[name].mm_features[image].data for image in images}
        return again

    def integrity_report(self) -> dict[str, Any]:
        """What the checks came to, after one if the engine is idle and has run since the last; for between steps."""
        if self.integrity.is_due and not self.requests:
            self.integrity.record(self.check_integrity())
        return self.integrity.dump()

    def check_integrity(self) -> list[str]:
        """What is wrong with the books, one line each, also logged; for between steps, see ``engine.integrity``."""
        faults = find_faults(self)
        for fault in faults:
            logger.error("integrity: %s", fault)
        return faults

    def _prompts_ending(self, output: SchedulerOutput) -> Iterator[tuple[Request, Plan, int]]:
        """Pruned prompts whose ends run in a step, and the first token of each that does."""
        for name, num_tokens in output.num_scheduled_tokens.items():
            plan, request = self.records[name].plan, self.requests[name]
            first = request.num_computed_tokens - num_tokens
            ends_here = first < plan.num_prompt_tokens <= request.num_computed_tokens
            if ends_here and plan.is_pruned and self._reuse_off(plan) is None:
                yield request, plan, first

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """The reset of vLLM, and of what is remembered of images."""
        is_reset: bool = super().reset_prefix_cache(*args, **kwargs)
        if is_reset:
            self.prefixes.clear()
        return is_reset

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Its prompt will run again, by the plan it ran by (rule 4)."""
        super()._preempt_request(request, *args, **kwargs)
        self.budget.take_back(request.request_id)
        self.prefixes.gone(request.request_id)
        self.records[request.request_id].preempted()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take the worker's word on the rows it ran, then vLLM's update, then the first reports."""
        took_ms = 1000 * getattr(model_runner_output, "selection_seconds", 0.0)
        for name, rows in getattr(model_runner_output, "rows_run", {}).items():
            if name in self.records:  # else aborted since
                self.records[name].ran(rows, took_ms)
                plan = self.records[name].plan
                if not self._reuse_off(plan):
                    self.prefixes.ran(self.requests[name], plan)
        for name, patches in getattr(model_runner_output, "patches", {}).items():
            if name in self.records:
                self.records[name].patches = patches
        for name, kept in getattr(model_runner_output, "decided", {}).items():
            if name in self.records:
                self._settle(self.requests[name], kept)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                self._report_early(output)
                if output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = self.failures.pop(output.request_id, None)
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus, *args: Any, **kwargs: Any) -> Any:
        """Stock, by which vLLM ends by this what could not be compiled, and what lost its caches or features."""
        if finished_status == RequestStatus.FINISHED_ERROR:
            for name in request_ids:
                structured = self.requests[name].structured_output_request if name in self.requests else None
                error = structured.grammar if structured is not None else None
                why = f"the grammar cannot be compiled: {error}" if isinstance(error, Exception) else None
                self.failures.setdefault(name, why)
        return super().finish_requests(request_ids, finished_status, *args, **kwargs)

    def _settle(self, request: Request, kept: Sequence[Sequence[int]]) -> None:
        """Go on by the counts that the worker decided, and take back the blocks beyond them (rule 5)."""
        name = request.request_id
        record = self.records[name]
        record.decided(kept)
        if request.num_computed_tokens == 0:
            return  # preempted since; its blocks are free already
        record.holds(self.planner.schedule)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        returned = sum(manager.trim(name, request.num_computed_tokens) for manager in managers)
        self.kv_cache_manager.forget(name)
        if returned:
            self.trimmed[name] = [len(manager.req_to_blocks[name]) for manager in managers]
            record.num_returned += returned

    def _report_early(self, output: EngineCoreOutput) -> None:
        """Report with a request's first token too: one that the client ends (stop string, abort) has no last output."""
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
                "selection_ms": record.selection_ms,
                "reuse_off": self._reuse_off(plan),
            }
        managers = self.kv_cache_manager.coordinator.single_type_managers
        report = with_blocks(record.report, self.costing, managers, request)
        return report | {"kv_blocks_returned": record.num_returned}

    def _reuse_off(self, plan: Plan) -> str | None:
        """Why no image of this prompt could have been reused."""
        return self.planner.reuse_off(plan) if self.kv_cache_manager.enable_caching else "disabled"

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        """Report what the request held, free it as vLLM does, forget its record."""
        report = self._report(request)
        if request.status == RequestStatus.FINISHED_ERROR:
            # A token was sampled against its grammar: none was allowed.
            self.failures.setdefault(request.request_id, DEAD_END)
        else:
            self.failures.pop(request.request_id, None)
        self.trimmed.pop(request.request_id, None)
        self.prefixes.gone(request.request_id)
        kv_transfer_params, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        del self.records[request.request_id]
        return {**(kv_transfer_params or {}), "hidrop": report}, ec_transfer_params


def _name_apart(request: Request, plan: Plan, hash_block_size: int) -> None:
    """Name a pruned prompt's features by how its tower makes them, and keep the hashes of its prefix only (rule 6).

    Stock vLLM's names stay for features that are stock vLLM's; the request's hashes were made with those names. The
    features may be shared with another request (n > 1), so they are not changed but replaced.
    """
    if plan.encoding != DENSE:
        request.mm_features = [
            replace(feature, identifier=f"{feature.identifier}:{plan.encoding}") for feature in request.mm_features
        ]
    request._block_hasher = None
    del request.block_hashes[plan.prefix_tokens // hash_block_size :]


class StagedAsyncScheduler(StagedScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler with the rules above."""
