"""vLLM's request handlers, with the `hidrop` object in what they answer."""

import copy
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

from openai.types.responses import ResponseErrorEvent
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GenerationError, RetryableRequestError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from hidrop_server.control.reports import REPORT_KEY, ReportSeen, in_message_delta, report_in_chunk, with_report
from hidrop_server.engine import HidropLLM, begun, spans_in

WISHES: ContextVar[Mapping[str, Any] | None] = ContextVar("WISHES", default=None)
"""The ``vllm_xargs`` of the current request: vLLM does not carry them into a beam search."""


class _WithWishes:
    """The engine client of one beam search, which adds the request's ``vllm_xargs`` to every step."""

    def __init__(self, engine_client: HidropLLM, wishes: Mapping[str, Any] | None) -> None:
        self._engine_client = engine_client
        self._wishes = wishes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    def generate(self, prompt: Any, params: SamplingParams, *args: Any, **kwargs: Any) -> Any:
        """Stock generation of one step, with the options added."""
        params.extra_args = dict(self._wishes or {}) or None
        return self._engine_client.generate(prompt, params, *args, **kwargs)


@contextmanager
def truncating(request: Any) -> Iterator[None]:
    """Raise VLLMValidationError if a truncation cut an image: vLLM truncates first, then asserts the images' places."""
    try:
        yield
    except (AssertionError, RuntimeError):
        if request.truncate_prompt_tokens is None:
            raise
        raise VLLMValidationError(
            f"truncate_prompt_tokens={request.truncate_prompt_tokens} would cut off an image: raise it, or send none",
            parameter="truncate_prompt_tokens",
        ) from None


class _Generating:
    """What all our handlers have in common: beam search, admission, and errors."""

    engine_client: HidropLLM

    def beam_search(self, prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """Stock beam search with the request's options; VLLMValidationError if they are bad or would prune a step."""
        wishes = WISHES.get()
        spans = spans_in(prompt, self.engine_client.planner)
        self.engine_client.check_options(prompt, SamplingParams(extra_args=dict(wishes or {})))
        if spans and self.engine_client.planner.plan(len(prompt["prompt_token_ids"]), spans, wishes).is_pruned:
            self.engine_client.metrics.refused("options")
            raise VLLMValidationError(
                "beam search sends each step as a new prompt, and each would choose other vision tokens: send "
                'vllm_xargs {"hidrop": "off"} with it',
                parameter="use_beam_search",
            )
        steps = copy.copy(self)
        steps.engine_client = _WithWishes(self.engine_client, wishes)  # type: ignore[assignment]
        return super(_Generating, steps).beam_search(prompt, *args, **kwargs)  # type: ignore[misc]

    async def _with_kv_transfer_rejection_cleanup(self, awaitable: Awaitable[Any], *args: Any) -> Any:
        """Wrap a request as vLLM does, but start a stream, with its 200, only once ``HidropLLM.admit`` lets it in."""
        with begun() as asked:
            answer = await super()._with_kv_transfer_rejection_cleanup(awaitable, *args)  # type: ignore[misc]
            if isinstance(answer, AsyncGenerator):
                for params in asked:
                    await self.engine_client.admit(params)
        return answer

    def _convert_generation_error_to_streaming_response(self, e: GenerationError) -> str:
        """The error event of a stream, with the type that belongs to its status."""
        event: str = self.create_streaming_error_response(e)  # type: ignore[attr-defined]
        return event

    def _raise_if_error(self, finish_reason: str | None, request_id: str) -> None:
        """Stock check, but a 503 with ``Retry-After`` where vLLM answers 500 to what it calls retryable itself."""
        try:
            super()._raise_if_error(finish_reason, request_id)  # type: ignore[misc]
        except GenerationError:
            raise RetryableRequestError from None


class HidropServingChat(_Generating, OpenAIServingChatBatch):
    """Chat completions with a report, and batches of chats, admitted as one."""

    async def render_chat_request(self, request: Any) -> Any:
        """Stock rendering; VLLMValidationError for a truncation that cuts an image."""
        WISHES.set(request.vllm_xargs)
        with truncating(request):
            return await super().render_chat_request(request)

    async def render_batch_chat_request(self, request: Any) -> Any:
        """Stock rendering, once there is a place for every conversation."""
        self.engine_client.check_admission(len(request.messages))
        with truncating(request):
            return await super().render_batch_chat_request(request)

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> ErrorResponse | ChatCompletionResponse:
        """Stock response, and ``hidrop`` beside its ``usage``."""
        seen = ReportSeen()
        response = await super().chat_completion_full_generator(request, seen.watch(result_generator), *args, **kwargs)
        if seen.report and isinstance(response, ChatCompletionResponse):
            response.hidrop = seen.report
        return response

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """Stock stream, and ``hidrop`` in its last chunk."""
        seen = ReportSeen()
        chunks = super().chat_completion_stream_generator(request, seen.watch(result_generator), *args, **kwargs)
        return with_report(chunks, seen)


class HidropServingCompletion(_Generating, OpenAIServingCompletion):
    """Completions with a report: that of the first prompt if there are several."""

    async def render_completion_request(self, request: Any) -> Any:
        """Stock rendering, once there is a place for every sequence of every prompt."""
        WISHES.set(request.vllm_xargs)
        prompts = request.prompt
        several = isinstance(prompts, list) and len(prompts) > 0 and not isinstance(prompts[0], int)
        self.engine_client.check_admission((request.n or 1) * (len(prompts) if several else 1))
        return await super().render_completion_request(request)

    def request_output_to_completion_response(
        self, final_res_batch: list[RequestOutput], *args: Any, **kwargs: Any
    ) -> CompletionResponse:
        """Stock response, and ``hidrop`` beside its ``usage``."""
        seen = ReportSeen()
        for index, output in enumerate(final_res_batch):
            seen.see(output, index)
        response = super().request_output_to_completion_response(final_res_batch, *args, **kwargs)
        if seen.report:
            response.hidrop = seen.report
        return response

    def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: list[Any],
        result_generator: AsyncIterator[tuple[int, RequestOutput]],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        """Stock stream, and ``hidrop`` in its last chunk."""
        seen = ReportSeen(len(engine_inputs))
        chunks = super().completion_stream_generator(
            request, engine_inputs, seen.watch(result_generator), *args, **kwargs
        )
        return with_report(chunks, seen)


class HidropServingResponses(_Generating, OpenAIServingResponses):
    """Responses with a report: that of the last turn if tools took several."""

    def _generate_with_builtin_tools(
        self, request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Stock turns, of which the first is checked now: they reach the engine only when they are read."""
        self.engine_client.check(engine_input, sampling_params)
        return super()._generate_with_builtin_tools(request_id, engine_input, sampling_params, *args, **kwargs)

    async def responses_stream_generator(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Stock stream; an error within it is told in its last event, where vLLM breaks the connection."""
        number = 0
        async with aclosing(super().responses_stream_generator(*args, **kwargs)) as events:
            try:
                async for event in events:
                    number = event.sequence_number
                    yield event
            except Exception as error:  # whatever it is, the client is told
                yield self._last_event(error, number + 1)

    def _convert_generation_error_to_streaming_response(self, e: GenerationError) -> str:
        """Raise the error again: what vLLM makes of it is no event of this route."""
        raise e

    def _last_event(self, error: Exception, number: int) -> ResponseErrorEvent:
        told = self.create_error_response(error).error
        return ResponseErrorEvent(
            type="error", code=str(told.code), message=told.message, param=told.param, sequence_number=number
        )

    async def responses_full_generator(self, *args: Any, **kwargs: Any) -> ErrorResponse | ResponsesResponse:
        """Stock response, also the one that ends a stream, and ``hidrop`` beside its ``usage``."""
        response = await super().responses_full_generator(*args, **kwargs)
        params = getattr(response, "kv_transfer_params", None) or {}
        if REPORT_KEY in params:
            response.hidrop = params[REPORT_KEY]
            response.kv_transfer_params = {k: v for k, v in params.items() if k != REPORT_KEY} or None
        return response


class HidropMessage(AnthropicMessagesResponse):
    """A message with a report; vLLM leaves null fields out of messages, and so out of the report."""

    hidrop: dict[str, Any] | None = None


class HidropServingMessages(HidropServingChat, AnthropicServingMessages):
    """Messages with a report."""

    def messages_full_converter(self, generator: ChatCompletionResponse) -> HidropMessage:
        """Stock message, and ``hidrop`` beside its ``usage``."""
        message = super().messages_full_converter(generator)
        return HidropMessage.model_construct(**dict(message), hidrop=getattr(generator, REPORT_KEY, None))

    async def message_stream_converter(self, generator: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
        """Stock events, and ``hidrop`` beside the ``usage`` of ``message_delta``.

        From vLLM 0.33 on, the chunks are no text and have no report: ``with_report`` puts it into the events.
        """
        report: dict[str, Any] | None = None

        async def noting() -> AsyncGenerator[Any, None]:
            nonlocal report
            async with aclosing(generator):
                async for chunk in generator:
                    report = (report_in_chunk(chunk) if isinstance(chunk, str) else None) or report
                    yield chunk

        async with aclosing(super().message_stream_converter(noting())) as events:
            async for event in events:
                yield in_message_delta(event, report)
