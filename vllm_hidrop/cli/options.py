"""Options that several commands share, and how each is read or refused; a command takes them as one dataclass.

Callbacks run before any command, so that no work is lost to a file that cannot be written or a bad address.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from vllm_hidrop.cli.media import MOST_TOKENS
from vllm_hidrop.json_text import parse_object, read_short_text
from vllm_hidrop.outputs import check_file, check_folder
from vllm_hidrop.plan.names import unknown

Result = TypeVar("Result")


def grouped(command: Callable[..., Result]) -> Callable[..., Result]:
    """Let a command take dataclasses of options: each field becomes an option of the command, by its own annotation."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            fields = inspect.signature(groups[parameter.name]).parameters.values()
            parameters += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

    @wraps(command)
    def with_groups(**given: Any) -> Result:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        return command(**made, **given)

    with_groups.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_groups


def output_file(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check a file to be written at the end. Raises ValueError: it cannot be; names the option."""
    return _checked(check_file, param, path)


def output_folder(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check a folder to be written into. Raises ValueError: it cannot be; names the option."""
    return _checked(check_folder, param, path)


def _checked(check: Callable[[Path], None], param: typer.CallbackParam, path: Path | None) -> Path | None:
    try:
        if path is not None:
            check(path)
    except OSError as error:
        above = "" if error.filename == str(path) else f"{error.filename}: "
        raise ValueError(f"{param.opts[-1]} {path}: {above}{error.strerror}") from None
    return path


def server_address(param: typer.CallbackParam, value: str | None) -> str | None:
    """Check the address of a server to ask. Raises ValueError: it is none; names the option."""
    return None if value is None else parse_address(value, param.opts[-1])


def parse_address(text: str, option: str) -> str:
    """As :func:`hidrop_loadtests.addresses.parse_address`. Raises ValueError: no address; names the option."""
    from hidrop_loadtests import addresses

    try:
        return addresses.parse_address(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def parse_counts(text: str, option: str, low: int, high: int) -> tuple[int, ...]:
    """Whole numbers by comma, in order, each once. Raises ValueError: others, or out of range; names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 and low <= int(part) <= high for part in parts):
        raise ValueError(f"{option} must be whole numbers from {low} to {high} like 1,2,4, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_names(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """Known names by comma, in order, each once. Raises ValueError: an unknown one; names option and known names."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in known:
            raise ValueError(unknown(f"{option}: unknown", part, known))
    return tuple(dict.fromkeys(parts))


Method = Annotated[str | None, typer.Option(help="Pruning method.", show_default="the checkpoint's, else none")]
Preset = Annotated[str | None, typer.Option(help="Named schedule of the method.")]
Options = Annotated[str, typer.Option(metavar="JSON", help="The method's options, an object.")]
Force = Annotated[bool, typer.Option(help="Allow a schedule or positions the checkpoint was not trained for.")]
WholeChoice = Annotated[
    str | None,
    typer.Option(
        metavar="JSON|FILE",
        help="The whole choice: method, preset, options, positions, prefix_state_bytes, force, note. Options here win.",
    ),
]
Model = Annotated[str, typer.Argument(help='A directory, a hub name, "embedded", or "7b" or "13b" for LLaVA-1.5.')]
Url = Annotated[
    str | None,
    typer.Option(callback=server_address, help="A running server.", show_default="start one with the embedded model"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=output_file, help="Also write the results to this file.")
]
PngFile = Annotated[Path, typer.Option(callback=output_file, help="The picture to write.")]


@dataclass(frozen=True)
class Choice:
    """The pruning options, the same for every command that asks a checkpoint."""

    method: Method = None
    preset: Preset = None
    options: Options = "{}"
    force: Force = False
    hidrop_config: WholeChoice = None

    def read(self) -> dict[str, Any]:
        """Keys of ``HidropConfig``, unchecked. Raises ValueError: JSON or file is unreadable; names the option."""
        data = {} if self.hidrop_config is None else _read_config(self.hidrop_config)
        options, own = parse_object(self.options, "--options"), data.get("options", {})
        if options and isinstance(own, dict):
            data["options"] = own | options
        data |= {key: value for key, value in (("method", self.method), ("preset", self.preset)) if value is not None}
        return data | ({"force": True} if self.force else {})


@dataclass(frozen=True)
class Prompt:
    """The sizes of one request."""

    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKENS|WxH",
            help="Images, by comma or repeated: vision tokens, or pixels, which the model's processor is asked about.",
            show_default="one image, of a typical size",
        ),
    ] = None
    video: Annotated[
        str | None,
        typer.Option(
            metavar="FRAMES|FRAMESxTOKENS",
            help="A video: its frames, and the vision tokens of each. Frames that share tokens count as one.",
        ),
    ] = None
    text: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Text tokens of the prompt.")] = 64


def _read_config(config: str) -> dict[str, Any]:
    """The JSON object in the text, or in the file that the text names."""
    if config.lstrip().startswith(("{", "[")):
        return parse_object(config, "--hidrop-config")
    try:
        return parse_object(read_short_text(Path(config)), config)
    except ValueError as error:
        raise ValueError(f"--hidrop-config: {error}") from None
