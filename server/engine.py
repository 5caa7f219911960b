"""vLLM's asynchronous engine client; plans requests before they enter, and counts reports when they end."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.outputs import RequestOutput
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestOutputCollector, RequestState
from vllm.v1.metrics.stats import RequestStateStats

from hidrop_server.control.grammars import PARAMETER, Grammars
from hidrop_server.control.options import check_keys, others_are_read
from hidrop_server.control.reports import REPORT_KEY
from hidrop_server.http.exchanges import GOING_AWAY, InFlight
from hidrop_server.metrics import HidropMetrics, Times
from vllm_hidrop import __version__
from vllm_hidrop.engine.compat import INTEGRITY_CALL
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.planner import Planner

ENGINE_ANSWER_SECONDS = 1.0  # how long readiness waits for the engine, which answers between two steps
END_SECONDS = 5.0  # for the idle engine's processes to end; vLLM's own default


class HidropLLM(AsyncLLM):
    """``AsyncLLM`` that plans in :meth:`generate`, which every route calls, and counts in its output processor."""

    input_processor: InputProcessor
    output_processor: OutputProcessor
    grammars: Grammars  # set once the engine has started
    has_died = False  # whether the engine had ended by itself before the server was stopped

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.planner = Planner.from_vllm_config(vllm_config)
        self.metrics = metrics_of(vllm_config, self.planner)
        self.integrity: dict[str, Any] = {}
        self.in_flight = InFlight()
        self.others_are_read = others_are_read(vllm_config.model_config)
        super().__init__(vllm_config, *args, **kwargs)
        self.planner = Planner.from_vllm_config(vllm_config)  # the engine has told its size of a block

    async def why_unready(self) -> str | None:
        """Why no request should be sent here (draining, a dead engine, failed integrity checks), or None.

        An engine in the midst of a long step answers late; that is no reason, and the last answer of all stands.
        """
        if self.in_flight.draining:
            return GOING_AWAY
        if not self.errored:
            try:
                asked = self.engine_core.call_utility_all_async(INTEGRITY_CALL)
                self.integrity = merged(await asyncio.wait_for(asked, ENGINE_ANSWER_SECONDS))
            except TimeoutError:
                pass
            except EngineDeadError as error:
                return str(error)
            except Exception as error:  # vLLM's word for an engine that shuts down
                return f"the engine does not answer: {error}"
        if self.errored:
            return str(self.dead_error)
        if self.integrity.get("findings"):
            return "the engine's integrity check failed: restart this server"
        return self.grammars.why_unready

    def shutdown(self, timeout: float | None = None) -> None:
        """Stock shutdown, once the requests in flight have been answered, or given up after ``timeout`` seconds.

        vLLM calls this in a thread when it is told to stop, and goes on serving meanwhile. Its own drain knows the
        engine's requests only, and leaves those that are not done by then without an answer.
        """
        if timeout is not None and not self.in_flight.draining:
            self.has_died = self.errored
            self.in_flight.drain(timeout, is_lost=lambda: self.errored)
        super().shutdown(timeout=None if timeout is None else END_SECONDS)

    @property
    def allowed_media(self) -> Mapping[str, int]:
        """The most images and other media of one prompt, by modality; empty where only text is served."""
        processor = self.renderer.mm_processor
        return {} if processor is None else processor.info.allowed_mm_limits

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Stock check (503 for what may fit later); VLLMValidationError for more sequences than ever fit."""
        most = self.scheduler_config.max_num_queued_reqs
        if most is not None and n > most:
            raise VLLMValidationError(
                f"{n} sequences in one request never fit: this server holds at most {most} (--max-num-queued-reqs)"
            )
        super().check_admission(n, request_id)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Plan first; VLLMValidationError while the route can still answer 400, before a stream has sent its 200."""
        self.check(prompt, sampling_params)
        return super().generate(prompt, sampling_params, request_id, **kwargs)

    def check(self, prompt: Any, params: SamplingParams) -> None:
        """Note the parameters for :func:`begun` and plan the request; what takes time is left to :meth:`admit`."""
        _begun.get([]).append(params)
        self.check_options(prompt, params)

    def check_options(self, prompt: Any, params: SamplingParams) -> None:
        """Plan a rendered prompt, only to see whether it can be; VLLMValidationError if its pruning options are bad."""
        try:
            check_keys(params.extra_args or (), self.others_are_read)
            if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
                self.planner.plan(
                    len(prompt["prompt_token_ids"]),
                    spans_in(prompt, self.planner),
                    params.extra_args,
                    wants_prompt_logprobs=params.prompt_logprobs is not None,
                )
            # Else a raw prompt, from no route of the server; the scheduler refuses what it cannot plan.
        except ValueError as error:
            self.metrics.refused("options")
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None

    async def admit(self, params: SamplingParams) -> None:
        """Check whether a request with these parameters is let in now, before its stream begins.

        Raises:
            VLLMValidationError: the parameters are bad.
            GracefulHTTPError: the queue is full, or a grammar could not be tried.
        """
        await self._admit_grammar(params)
        self.input_processor._validate_params(params, await self.get_supported_tasks())
        self.check_admission(params.n)

    async def _admit_grammar(self, params: SamplingParams) -> None:
        """Admit the grammar, with the stop tokens that vLLM's input processor will add to the parameters."""
        if params.structured_outputs is not None:
            ending = params.clone()
            ending.update_from_generation_config(
                self.input_processor.generation_config_fields, self.renderer.get_eos_token_id()
            )
            await self.grammars.admit(params, sorted(ending.all_stop_token_ids))

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        """Send the request to the engine once its grammar is admitted."""
        if isinstance(params, SamplingParams):
            await self._admit_grammar(params)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    def _run_output_handler(self) -> None:
        """Start vLLM's output loop, which keeps the output processor it finds, with our processors in place.

        ``AsyncLLM`` names the classes of both processors in its constructor, so ours are made here, with the same
        arguments.
        """
        if self.output_handler is None:
            self.input_processor = HidropInputProcessor(self.vllm_config, self.renderer)
            self.output_processor = HidropOutputProcessor(
                self.metrics,
                self.renderer.tokenizer,
                log_stats=self.log_stats,
                stream_interval=self.scheduler_config.stream_interval,
                tracing_enabled=self.observability_config.otlp_traces_endpoint is not None,
                admission_stats=self.admission_stats,
            )
        super()._run_output_handler()


_begun: ContextVar[list[SamplingParams]] = ContextVar("begun")


@contextmanager
def begun() -> Iterator[list[SamplingParams]]:
    """Collect the parameters of every request that one handler makes of the engine."""
    asked: list[SamplingParams] = []
    token = _begun.set(asked)
    try:
        yield asked
    finally:
        _begun.reset(token)


class HidropInputProcessor(InputProcessor):
    """``InputProcessor`` that does not parse grammars, which would block the event loop."""

    def _validate_params(self, params: Any, supported_tasks: tuple[Any, ...]) -> bool | None:
        """Stock validation of all but the grammar, which ``hidrop_server.control.grammars`` has admitted."""
        structured = getattr(params, "structured_outputs", None)
        if structured is None:
            return super()._validate_params(params, supported_tasks)
        params.structured_outputs = None
        try:
            return super()._validate_params(params, supported_tasks)
        finally:
            params.structured_outputs = structured


class HidropOutputProcessor(OutputProcessor):
    """``OutputProcessor`` that counts each sequence once, when it ends, by the last report the engine sent for it.

    A report that comes before the last output is repeated on every later one: a stop string ends a sequence in this
    process, and the engine's final report for it never arrives.
    """

    def __init__(self, metrics: HidropMetrics, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = metrics
        self.reports: dict[str, dict[str, Any]] = {}

    def process_outputs(
        self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> OutputProcessorOutput:
        """Stock processing, with reports repeated, and failures raised in the handlers of their requests."""
        self._hand_on(engine_core_outputs)
        failed = [
            (self.request_states[output.request_id], output.stop_reason)
            for output in engine_core_outputs
            if output.finish_reason == FinishReason.ERROR and output.request_id in self.request_states
        ]
        processed = super().process_outputs(engine_core_outputs, *args, **kwargs)
        for state, reason in failed:
            processed.reqs_to_abort.extend(self._fail(state, reason))
        return processed

    def _fail(self, state: RequestState, reason: str | int | None) -> list[str]:
        """Raise in the request's handler why it failed; returns its other sequences, which are aborted.

        A failure with a reason would come again: 400. Any other may not: 503.
        """
        if state.queue is None:
            return []
        if isinstance(reason, str):
            self.metrics.refused("grammar")
            state.queue.put(VLLMValidationError(reason, parameter=PARAMETER))
        else:
            state.queue.put(GracefulHTTPError("Request failed; please retry", HTTPStatus.SERVICE_UNAVAILABLE))
        return self.abort_requests([state.parent_req.request_id], internal=True) if state.parent_req else []

    def _hand_on(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            if output.request_id not in self.request_states:
                continue  # aborted already
            params = output.kv_transfer_params
            if params and REPORT_KEY in params:
                self.reports[output.request_id] = params[REPORT_KEY]
            elif output.request_id in self.reports:
                output.kv_transfer_params = {**(params or {}), REPORT_KEY: self.reports[output.request_id]}

    def _finish_request(self, req_state: RequestState) -> None:
        super()._finish_request(req_state)
        self.metrics.ended(self.reports.pop(req_state.request_id, None), times=times_of(req_state.stats))

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        """Stock abort; counts every sequence that was running."""
        before = set(self.request_states)
        aborted = super().abort_requests(request_ids, internal)
        for request_id in before.difference(self.request_states):
            self.metrics.ended(self.reports.pop(request_id, None), aborted=True)
        return aborted


def merged(integrity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The integrity reports of all engines as one; a finding names its engine where there are several."""
    findings = [
        f"engine {index}: {finding}" if len(integrity) > 1 else finding
        for index, report in enumerate(integrity)
        for finding in report["findings"]
    ]
    counts = {name: sum(report[name] for report in integrity) for name in ("checks", "failed_checks")}
    return {**counts, "findings": findings}


def times_of(stats: RequestStateStats | None) -> Times | None:
    """The times of a finished sequence, by vLLM's time stamps; None where vLLM keeps none or no token came."""
    if stats is None or not stats.num_generation_tokens:
        return None
    later = stats.num_generation_tokens - 1
    return Times(
        first_token=stats.first_token_latency,
        prefill=stats.first_token_ts - stats.scheduled_ts,
        per_output_token=(stats.last_token_ts - stats.first_token_ts) / later if later else None,
    )


def spans_in(prompt: dict[str, Any], planner: Planner) -> tuple[Span, ...]:
    """The spans of a rendered prompt's images and frames."""
    data = prompt.get("mm_kwargs", {})
    return planner.spans(
        MultiModalFeatureSpec(item, modality, identifier="", mm_position=place)
        for modality, places in prompt.get("mm_placeholders", {}).items()
        for place, item in zip(places, data.get(modality) or [None] * len(places), strict=True)
    )


def metrics_of(vllm_config: Any, planner: Planner) -> HidropMetrics:
    """The counters of a server, in this process's registry."""
    return HidropMetrics(
        model_name=_served_name(vllm_config.model_config),
        method=planner.method,
        first_layers=[stage.first_layer for stage in planner.schedule.stages],
        info={"preset": planner.preset or "", "positions": str(planner.positions), "version": __version__},
        num_engines=vllm_config.parallel_config.data_parallel_size,
    )


def _served_name(model_config: Any) -> str:
    name = model_config.served_model_name
    return name[0] if isinstance(name, list) else name


@asynccontextmanager
async def run_engine(args: Namespace, vllm_config: Any, client: Mapping[str, Any]) -> AsyncIterator[HidropLLM]:
    """Start the engine's processes, or connect to those that ``client`` names; shut down at the end."""
    addresses = dict(client)
    count, index = addresses.pop("client_count", 1), addresses.pop("client_index", 0)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine = HidropLLM.from_vllm_config(
        vllm_config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
        client_addresses=addresses,
        client_count=count,
        client_index=index,
    )
    try:
        await engine.reset_mm_cache()  # vLLM's own start leaves a dummy image in it
        yield engine
    finally:
        engine.shutdown(timeout=vllm_config.shutdown_timeout)
