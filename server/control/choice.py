"""The user's pruning choice, checked before vLLM is imported, so that a misspelt name is refused at once."""

from collections.abc import Mapping
from typing import Any

from hidrop_server.errors import StartError
from vllm_hidrop.config import HidropConfig


def check_choice(data: Mapping[str, Any]) -> HidropConfig:
    """Check what does not depend on the model; StartError for an unknown key, method, preset or option."""
    try:
        return HidropConfig.checked(data)
    except (TypeError, ValueError) as error:
        raise StartError(str(error)) from None
