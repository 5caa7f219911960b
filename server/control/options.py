"""Which keys of `vllm_xargs` somebody reads."""

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import MAX_OPTION_ELEMENTS
from vllm_hidrop.plan.names import unknown
from vllm_hidrop.plan.planner import REQUEST_KEYS

VLLM_KEYS = ("kv_cache_report_mode", "session_id", "kv_transfer_params", "ec_transfer_params")
"""What vLLM 0.32 itself reads there; its routes put the last two in from fields of their own."""
BOOLEAN_KEY = "hidrop_explain"
SCALARS = {str, int, float, bool}
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
            raise ValueError(unknown("unknown request option", key, (*REQUEST_KEYS, *VLLM_KEYS[:2])))


def check_options(found: Any) -> None:
    """Refuse what a request's ``vllm_xargs`` would lose on its way: the type that vLLM declares for it makes 1 of true.

    Args:
        found: as the body has it.

    Raises:
        BodyRefused: true or false for a word or a number, or a list too long.
    """
    if not isinstance(found, dict):
        return
    for key, value in found.items():
        if isinstance(value, list) and len(value) > MAX_OPTION_ELEMENTS:
            raise BodyRefused(f"vllm_xargs.{key[:80]}: at most {MAX_OPTION_ELEMENTS} elements", "options")
        if isinstance(value, list) and not set(map(type, value)) <= SCALARS:
            raise BodyRefused(f"vllm_xargs.{key[:80]}: must be a list of texts and numbers", "options")
        is_ours = key in REQUEST_KEYS and key != BOOLEAN_KEY
        if is_ours and any(isinstance(each, bool) for each in (value if isinstance(value, list) else [value])):
            raise BodyRefused(f"vllm_xargs.{key}: true and false mean nothing here: {REQUEST_KEYS[key]}", "options")


def others_are_read(model_config: Any) -> bool:
    """Whether the server has logits processors, of ``--logits-processors`` or installed ones."""
    return bool(model_config.logits_processors) or bool(entry_points(group=PROCESSORS))
