"""Check the keys and values of ``vllm_xargs``, a request's own options."""

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import MAX_OPTION_ELEMENTS
from vllm_hidrop.plan.names import unknown
from vllm_hidrop.plan.planner import REQUEST_KEYS

VLLM_KEYS = ("kv_cache_report_mode", "session_id", "kv_transfer_params", "ec_transfer_params")
"""Keys that vLLM 0.32 itself reads; its routes fill the last two from request fields of their own."""
BOOLEAN_KEY = "hidrop_explain"
SCALARS = {str, int, float, bool}
PROCESSORS = "vllm.logits_processors"  # entry points of logits processors, which may read any key


def check_keys(keys: Iterable[str], others_are_read: bool) -> None:
    """Refuse keys that nobody reads (a misspelt option would silently do nothing); ValueError names the known ones."""
    for key in keys:
        known = key in REQUEST_KEYS or key in VLLM_KEYS
        if not known and (key.startswith("hidrop") or not others_are_read):
            raise ValueError(unknown("unknown request option", key, (*REQUEST_KEYS, *VLLM_KEYS[:2])))


def check_options(found: Any) -> None:
    """Refuse values that vLLM's types would alter (true becomes 1), and long or nested lists (BodyRefused)."""
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
    """Whether logits processors, of ``--logits-processors`` or installed ones, may read other keys."""
    return bool(model_config.logits_processors) or bool(entry_points(group=PROCESSORS))
