"""Which keys of `vllm_xargs` somebody reads. Knows names; what the values mean is the planner's business."""

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from vllm_hidrop.engine.planner import REQUEST_KEYS

VLLM_KEYS = ("kv_cache_report_mode", "session_id", "kv_transfer_params", "ec_transfer_params")
"""What vLLM 0.32 itself reads there; its routes put the last two in from fields of their own."""
PROCESSORS = "vllm.logits_processors"
"""Entry points of logits processors, which read what they like."""


def check_keys(keys: Iterable[str], others_are_read: bool) -> None:
    """Refuse what nobody would read, because a misspelt option would silently do nothing.

    Args:
        keys: of a request.
        others_are_read: see :func:`others_are_read`.

    Raises:
        ValueError: names the key and the known ones.
    """
    for key in keys:
        known = key in REQUEST_KEYS or key in VLLM_KEYS
        if not known and (key.startswith("hidrop") or not others_are_read):
            raise ValueError(f"unknown request option {key!r}; known: {', '.join((*REQUEST_KEYS, *VLLM_KEYS[:2]))}")


def others_are_read(model_config: Any) -> bool:
    """Whether the server has logits processors, of ``--logits-processors`` or installed ones."""
    return bool(model_config.logits_processors) or bool(entry_points(group=PROCESSORS))
