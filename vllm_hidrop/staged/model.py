"""What a model family gives the runner."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from vllm_hidrop.methods.base import Method
from vllm_hidrop.staged.levels import Levels
from vllm_hidrop.staged.loop import Decoder
from vllm_hidrop.staged.merging import Reduced


class StagedModel(Protocol):
    """A vLLM model whose decoder layers can also run stage by stage; ``methods`` are the server's, by name."""

    decoder: Decoder
    methods: Mapping[str, Method]

    def encoding(self, name: str) -> AbstractContextManager[list[Reduced | None]]:
        """Encode images in the way of this name (``Plan.encoding``) until exit.

        Yields:
            The list to which a reducing tower adds, for every image that it encodes, which patches it left.
        """

    def levels(self, num_rows: int) -> AbstractContextManager[Levels]:
        """What the model adds behind its first layers to the step's full rows, [num_rows, C] each, until exit."""


class StagedForward:
    """In front of a vLLM model class: its forward may run the staged loop, which the V2 runner calls through it."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        staged: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Final hidden states [T, C], by vLLM's forward or by ``staged`` (input embeddings [T, C], RoPE ids [T])."""
        if staged is None:
            parent: Any = super()
            return parent.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        assert inputs_embeds is not None
        return staged(inputs_embeds, positions)
