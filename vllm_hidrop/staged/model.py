"""What a model family gives the runner."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from vllm_hidrop.methods.base import Method
from vllm_hidrop.staged.loop import Decoder
from vllm_hidrop.staged.merging import Reduced


class StagedModel(Protocol):
    """A vLLM model whose decoder layers can also run stage by stage.

    Attributes:
        decoder: its decoder layers, under the server's schedule.
        methods: by method, what picks tokens.
    """

    decoder: Decoder
    methods: Mapping[str, Method]

    def encoding(self, name: str) -> AbstractContextManager[list[Reduced | None]]:
        """While entered, images are encoded in the way of this name, see ``Plan.encoding``.

        Yields:
            Per image, in order, what a reducing tower left of it; filled as the tower runs.
        """
