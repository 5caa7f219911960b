"""vLLM's request handlers for chat, completions and the model list, with the `hidrop` object in what they answer.

Knows vLLM's handlers; not the engine.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelList
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from hidrop_server.engine import HidropLLM, spans_in
from hidrop_server.reports import ReportSeen, with_report


class _NoBeams:
    """Refuses what pruning would silently change."""

    engine_client: HidropLLM

    def beam_search(self, prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """Stock beam search for text.

        Raises:
            VLLMValidationError: the prompt has images and this server prunes.
        """
        if self.engine_client.planner.is_staged and spans_in(prompt):
            self.engine_client.metrics.refused("options")
            raise VLLMValidationError(
                "beam search sends each step as a new prompt, and each would choose other vision tokens: "
                "not with images on a pruning server",
                parameter="use_beam_search",
            )
        return super().beam_search(prompt, *args, **kwargs)  # type: ignore[misc]


class HidropServingChat(_NoBeams, OpenAIServingChat):
    """Chat completions with a report."""

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


class HidropServingCompletion(_NoBeams, OpenAIServingCompletion):
    """Completions with a report: that of the first prompt if there are several."""

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


class HidropServingModels(OpenAIServingModels):
    """The model list with what is pruned."""

    hidrop: dict[str, Any]

    async def show_available_models(self) -> ModelList:
        """Stock list, and ``hidrop`` in every entry."""
        models = await super().show_available_models()
        for card in models.data:
            card.hidrop = self.hidrop
        return models
