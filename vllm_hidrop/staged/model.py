"""What a model family gives the runner."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from vllm_hidrop.methods.base import Method
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
