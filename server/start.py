"""`hidrop serve`: from the command line to a running server, refusing bad choices as early as they can be seen.

Our own names are checked first (no vLLM import), then vLLM's flags and the model's configuration, then the engine's
configuration; processes and weights come last.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hidrop_server.control.choice import check_choice
from hidrop_server.control.settings import set_variables
from hidrop_server.errors import StartError, one_line
from vllm_hidrop.embedded import CHECKPOINTS

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm_hidrop.config import HidropConfig

TORCHVISION = (
    "the installed torchvision is built for CUDA and cannot be imported beside PyTorch for CPUs: pip install "
    "--force-reinstall --no-deps torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu"
)
"""The message where PyPI's build cannot be imported; scripts/mend_torchvision.py says why."""


def main(model: str | None, choice: Mapping[str, Any], vllm_args: list[str]) -> int:
    """Serve until stopped; returns 0 after a requested stop, 1 if the engine died, 2 for a choice that is refused.

    ``model`` is a directory or hub name, or None for the embedded model unless ``vllm_args`` (vLLM's flags and ours)
    name one; ``choice`` has the keys of ``HidropConfig``. A refusal is one line on stderr.
    """
    try:
        return run(*configure(model, check_choice(choice), vllm_args))
    except StartError as error:
        print(f"hidrop serve: {one_line(error)}", file=sys.stderr)
        return 2


def configure(model: str | None, choice: "HidropConfig", vllm_args: list[str]) -> "tuple[Namespace, Any]":
    """Do all that can fail before a process is started; StartError for what vLLM, the model or our gate refuses."""
    _check_installation()
    is_shipped = model in [str(directory) for directory in CHECKPOINTS.values()]
    set_variables(embedded=is_shipped or (not model and not any(arg == "--model" for arg in vllm_args)))

    try:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    except ImportError:  # vLLM 0.33
        from vllm.entrypoints.common.startup import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from hidrop_server.control import arguments
    from hidrop_server.http import listening

    cli_env_setup()
    args = arguments.parse(model, vllm_args, choice.method)
    listening.check_listening(args)
    try:
        configure_logging_from_args(args)
    except Exception as error:  # whatever file or logging complains
        raise StartError(f"--logging-config: {error}") from None
    arguments.apply_choice(args, choice)
    return args, engine_config(args)


def engine_config(args: "Namespace") -> Any:
    """Make the engine's configuration, in which our hook resolves the choice; StartError if the engine refuses it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
            usage_context=UsageContext.OPENAI_API_SERVER
        )
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise StartError(one_line(error)) from error
    structured = vllm_config.structured_outputs_config
    if structured.backend == "auto":
        # With "auto" vLLM chooses anew for each request, but its engine keeps the first one's backend for all.
        structured.backend = "xgrammar"
    if "resolved" not in vllm_config.additional_config.get("hidrop", {}):
        raise StartError(
            "vLLM did not load the hidrop plug-in: install the vllm_hidrop package, and name hidrop in "
            "VLLM_PLUGINS if you set it"
        )
    return vllm_config


def run(args: "Namespace", vllm_config: Any) -> int:
    """Serve until a signal; returns the exit code. StartError if the address has been taken since it was tried."""
    if args.api_server_count > 1:
        from hidrop_server.processes import serve_several

        return serve_several(args, vllm_config)
    import uvloop

    from hidrop_server.app import serve
    from hidrop_server.control.grammars import Judge

    return uvloop.run(serve(args, vllm_config, Judge(vllm_config, args.max_grammar_seconds)))


def _check_installation() -> None:
    from vllm_hidrop.engine.compat import check_vllm_version

    try:
        check_vllm_version()
        import torchvision  # noqa: F401
    except RuntimeError as error:
        raise StartError(TORCHVISION if "torchvision::nms" in str(error) else str(error)) from None
