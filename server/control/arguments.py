"""Parse the rest of the command line with vLLM's parser, and write our pruning choice where the engine reads it."""

from argparse import Namespace
from typing import Any, NoReturn

from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hidrop_server.control.choice import check_choice
from hidrop_server.control.settings import API_KEY, add_flags, find_refused, flag_defaults, keys_of
from hidrop_server.errors import StartError
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.embedded import CHECKPOINTS, MODEL_DIR, MODEL_METHOD
from vllm_hidrop.models.families import family_of

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ModuleNotFoundError:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args

LOOPBACK = "127.0.0.1"


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with one-line errors instead of four screens of usage."""

    def error(self, message: str) -> NoReturn:
        raise StartError(f"{message} (vLLM's flags: hidrop serve --vllm-help all)")


def parse(model: str | None, vllm_args: list[str], method: str | None = None) -> Namespace:
    """Parse vLLM's flags and ours; StartError for what vLLM or ``settings.REFUSED`` refuses.

    Without a model, an embedded one is served with its own defaults: the checkpoint trained for ``method``, or the
    dense one if the method needs no training.
    """
    parser = _make_parser(_Parser(prog="hidrop serve", add_json_tip=False))
    argv = [model, *vllm_args] if model else vllm_args
    args = parser.parse_args(argv)
    named = args.model_tag or (args.model if _has_model_flag(vllm_args) else None)
    if named is None:
        parser.set_defaults(**flag_defaults(embedded=True), **_dtype())
        args = parser.parse_args(argv)
        named = str(MODEL_DIR if method in (None, MODEL_METHOD) else CHECKPOINTS["dense"])
    args.model = named
    refused = find_refused(args)
    if refused is not None:
        raise StartError(f"{refused.name} is not supported by hidrop serve: {refused.reason}")
    args.limit_mm_per_prompt = {**flag_defaults(embedded=False)["limit_mm_per_prompt"], **args.limit_mm_per_prompt}
    _listen_on_loopback(args)
    _count_processes(args)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise StartError(str(error)) from None
    return args


def print_vllm_help(topic: str) -> None:
    """Print vLLM's own help; ``topic`` is "all", "groups", a flag or a group."""
    parser = _make_parser(FlexibleArgumentParser(prog="hidrop serve"))
    parser.parse_args(["--help"] if topic == "groups" else [f"--help={topic}"])


def apply_choice(args: Namespace, choice: HidropConfig) -> None:
    """Write the choice into ``args``; StartError if the model is unreadable or unsupported, or does not fit."""
    choice = _merge_additional_config(args, choice)
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    hf_config = _model_config(args)
    named = overrides.get("architectures") or getattr(hf_config, "architectures", None) or [None]
    try:
        family = family_of(named[0])
        family.check(hf_config)
        trained = getattr(hf_config, "hidrop", None)
        resolve(choice, family.shape(hf_config), trained)
    except ValueError as error:
        raise StartError(str(error)) from None
    args.hf_overrides = {**overrides, "architectures": [family.staged]}
    args.additional_config = {**(args.additional_config or {}), "hidrop": choice.model_dump()}


def _make_parser(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
    """Add vLLM's flags and ours to a parser."""
    make_arg_parser(parser)
    add_flags(parser)
    return parser


def _has_model_flag(argv: list[str]) -> bool:
    return any(arg.split("=")[0] in ("--model", "--config") for arg in argv)


def _dtype() -> dict[str, str]:
    """Float32 works on every CPU; attention on a GPU needs the checkpoint's own type."""
    return {"dtype": "float32"} if current_platform.is_cpu() else {}


def _listen_on_loopback(args: Namespace) -> None:
    """Without an API key, listen on loopback unless the user names an address; vLLM's default is all addresses."""
    if args.host is None and args.uds is None and not keys_of(args, API_KEY):
        args.host = LOOPBACK


def _count_processes(args: Namespace) -> None:
    """Tell the engine's configuration how many API processes there are; rank -1 is their parent, which serves none."""
    args.api_server_count = 1 if args.api_server_count is None else args.api_server_count
    if args.api_server_count < 1:
        raise StartError(f"--api-server-count must be at least 1, got {args.api_server_count}")
    if args.api_server_count > 1:
        args._api_process_count, args._api_process_rank = args.api_server_count, -1


def _merge_additional_config(args: Namespace, choice: HidropConfig) -> HidropConfig:
    own = (args.additional_config or {}).get("hidrop")
    if own is None:
        return choice
    if choice != HidropConfig.parse({}):
        raise StartError('give the pruning choice once: by --method and its like, or by --additional-config "hidrop"')
    return check_choice(own)


def _model_config(args: Namespace) -> Any:
    try:
        return get_config(
            args.hf_config_path or args.model,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            code_revision=args.code_revision,
            config_format=args.config_format,
        )
    except Exception as error:
        # Any error of file, hub or parser: the engine could not read the model either.
        raise StartError(f"cannot read the configuration of model {args.model!r}: {error}") from None
