"""Costs of one request by arithmetic; models are read, and refused, as by ``hidrop serve``."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hidrop.cli.media import Item, Size, image, image_of_pixels, parse_images, spans_of, video
from vllm_hidrop.cli.options import Prompt
from vllm_hidrop.config import HidropConfig, Resolved, moved_note, provenance, resolve, training_warning
from vllm_hidrop.methods import Adaptive, ModelShape
from vllm_hidrop.plan import costs, shapes
from vllm_hidrop.plan.costs import RequestCosts
from vllm_hidrop.plan.names import nearest
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.shapes import TextShape, text_shape
from vllm_hidrop.plan.vision import LLAVA_7B_VISION, LLAVA_13B_VISION, VisionShape

if TYPE_CHECKING:
    from vllm_hidrop.models.family import Family

EMBEDDED = "embedded"
HUB_SECONDS = 5.0  # for one request to the hub; a download would try six times, for half a minute


@dataclass(frozen=True)
class Model:
    """What planning needs of a checkpoint; ``trained`` is the ``hidrop`` entry of its configuration."""

    text: TextShape
    vision: VisionShape | None  # None where the tower's FLOPs are not counted
    shape: ModelShape
    trained: Mapping[str, Any] | None = None
    hf_config: Any = None  # None where no file was read
    family: "Family | None" = None

    @property
    def tokens_per_image(self) -> int:
        """Of every image, or of a typical one."""
        return self.shape.tokens_per_image


SHAPES = {
    "7b": Model(shapes.LLAVA_7B, LLAVA_7B_VISION, ModelShape(32, 576)),
    "13b": Model(shapes.LLAVA_13B, LLAVA_13B_VISION, ModelShape(40, 576)),
}  # LLaVA-1.5, known without any file


@dataclass(frozen=True)
class Workload:
    """One request: its images and videos, text tokens, and the server's tokens per block."""

    items: tuple[Item, ...]
    text: int
    block_size: int


def planned(
    model: str, choice: Mapping[str, Any], prompt: Prompt, block_size: int
) -> tuple[Model, Resolved, Workload, RequestCosts]:
    """The model, its method, one request of it and that request's costs; warns on standard error as a server does.

    ``model``: "embedded", "7b", "13b", a directory or a hub name; a prompt without images gets one. Raises ValueError:
    the model cannot be read or cannot run staged, or the choice does not fit it.
    """
    config = HidropConfig.checked(choice)  # before a hub is asked
    known = SHAPES.get(model) or read_model(model)
    workload = Workload(_items(model, known, prompt), prompt.text, block_size)
    resolved = resolve(config, known.shape, known.trained)
    left_out = None
    if known.family is not None:
        from vllm_hidrop.engine.model_checks import fitted_to_model

        resolved, left_out = fitted_to_model(resolved, known.family, known.hf_config)
    for warning in (training_warning(resolved, known.trained), left_out, moved_note(resolved)):
        if warning is not None:
            print(f"hidrop: warning: {warning}", file=sys.stderr)
    if note := provenance(resolved, known.shape, known.trained):
        print(f"hidrop: note: {note}", file=sys.stderr)
    return known, resolved, workload, request_costs(known, resolved, workload)


def _items(model: str, known: Model, prompt: Prompt) -> tuple[Item, ...]:
    """The images and the video of a prompt, one image of typical size where it names none."""
    sizes = parse_images(prompt.images or ())
    items = [_image(model, known, size) for size in sizes]
    if prompt.video is not None:
        items.append(video(prompt.video, known.family, known.hf_config, known.vision))
    return tuple(items or [image(known.tokens_per_image)])


def _image(model: str, known: Model, size: int | Size) -> Item:
    if isinstance(size, int):
        return image(size)
    if known.family is None:
        return image(known.tokens_per_image)
    return image_of_pixels(_source(model), known.family, known.hf_config, size)


def request_costs(
    model: Model, resolved: Resolved, workload: Workload, decided: Sequence[int] | None = None
) -> RequestCosts:
    """Costs of a request, images first; ``decided``: vision tokens per stage of an adaptive method, else its bounds."""
    spans = spans_of(workload.items)
    adaptive = isinstance(resolved.method, Adaptive)
    num_tokens = workload.text + sum(span.length for span in spans)
    plan = make_plan(resolved.schedule, num_tokens, spans, adaptive=adaptive)
    if adaptive and decided is not None and spans:
        plan = replace(plan, kept=tuple(_split(count, len(spans)) for count in decided), decided=True)
    schedule, signal = resolved.schedule, resolved.method.signal
    tiles = {index: item.num_tiles for index, item in enumerate(workload.items) if item.num_tiles is not None}
    return costs.request_costs(model.text, schedule, plan, signal, workload.block_size, model.vision, tiles)


def _split(count: int, parts: int) -> tuple[int, ...]:
    """Split a count over images as evenly as it goes: the costs of towers are per image."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


def read_model(model: str) -> Model:
    """Shapes of a directory or hub model. Raises ValueError: it does not exist, or ``hidrop serve`` would refuse it."""
    from vllm_hidrop.models.families import family_of

    config = _read_config(_source(model))
    family = family_of(next(iter(config.architectures or []), None))
    family.check(config)
    text, vision = text_shape(family.text_config(config)), family.vision_shape(config)
    return Model(text, vision, family.shape(config), getattr(config, "hidrop", None), config, family)


def _source(model: str) -> str:
    from vllm_hidrop.embedded import MODEL_DIR

    return str(MODEL_DIR) if model == EMBEDDED else model


def _read_config(source: str) -> Any:
    """The Hugging Face configuration of a directory or hub name; its weights are not read."""
    from transformers import AutoConfig

    is_directory = Path(source).is_dir()
    if source.startswith((".", "/", "~")) and not is_directory:
        raise ValueError(f"no such model directory: {source}")
    try:
        if not is_directory:
            _ask_hub_once(source)
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever file, hub or parser complains
        first_line = str(error).strip().partition("\n")[0]
        hint = "" if is_directory else f"; known without the hub: {', '.join((EMBEDDED, *SHAPES))}"
        near = "" if is_directory else nearest(source, (EMBEDDED, *SHAPES))
        raise ValueError(f"cannot read the shape of model {source!r}: {first_line}{hint}{near}") from error


def _ask_hub_once(name: str) -> None:
    """Raise unless a model's configuration is cached or on the hub, without the many tries of a download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        raise  # they say what is wrong
    except Exception as error:
        raise ValueError(f"the hub cannot be reached ({error})") from error
