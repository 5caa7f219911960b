"""The user's pruning choice, checked without vLLM, so that a misspelt name is refused before vLLM is imported."""

from pathlib import Path
from typing import Any

from hidrop_server.errors import StartError
from vllm_hidrop.config import HidropConfig, make_method
from vllm_hidrop.json_text import parse_object, read_short_text


def read_choice(method: str | None, preset: str | None, config: str | None) -> HidropConfig:
    """Merge ``--method`` and ``--preset`` over ``--hidrop-config``.

    Args:
        method: name of a pruning method.
        preset: name of one of its presets.
        config: a JSON object, or the path of a file that holds one, with the keys of :class:`HidropConfig`.

    Raises:
        StartError: unreadable JSON, unknown key, method, preset or option.
    """
    data = {} if config is None else _read_json(config)
    data |= {k: v for k, v in (("method", method), ("preset", preset)) if v is not None}
    return check_choice(data)


def check_choice(data: dict[str, Any]) -> HidropConfig:
    """Check everything that does not depend on the model.

    Raises:
        StartError: unknown key, method, preset or option.
    """
    try:
        choice = HidropConfig.parse(data)
        if choice.method is not None:
            make_method(choice.method, choice.preset, choice.options)
    except (TypeError, ValueError) as error:
        raise StartError(str(error)) from None
    return choice


def _read_json(config: str) -> dict[str, Any]:
    is_file = not config.lstrip().startswith(("{", "["))
    try:
        return parse_object(read_short_text(Path(config)) if is_file else config, "--hidrop-config")
    except ValueError as error:
        raise StartError(str(error) if not is_file else f"--hidrop-config {config}: {error}") from None
