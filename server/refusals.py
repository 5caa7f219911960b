"""The error of media that this server does not take.

Knows vLLM's exception tree, which turns it into a 400.
"""

from vllm.exceptions import VLLMValidationError


class MediaRefused(VLLMValidationError):
    """An image, or a URL, that this server does not take; one line, answered with 400."""
