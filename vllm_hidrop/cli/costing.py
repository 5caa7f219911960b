"""Costs of one request by arithmetic; models are read, and refused, as by ``hidrop serve``."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hidrop.cli.options import Prompt
from vllm_hidrop.config import HidropConfig, Resolved, provenance, resolve, training_warning
from vllm_hidrop.methods import Adaptive, ModelShape
from vllm_hidrop.plan import costs, shapes
from vllm_hidrop.plan.costs import RequestCosts
from vllm_hidrop.plan.names import nearest
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.shapes import TextShape, VisionShape, text_shape

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
    "7b": Model(shapes.LLAVA_7B, shapes.LLAVA_7B_VISION, ModelShape(32, 576)),
    "13b": Model(shapes.LLAVA_13B, shapes.LLAVA_13B_VISION, ModelShape(40, 576)),
}  # LLaVA-1.5, known without any file


@dataclass(frozen=True)
class Workload:
    """One request: vision tokens of each image, text tokens, and the server's tokens per block."""

    images: tuple[int, ...]
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
    workload = Workload(tuple(prompt.images or [known.tokens_per_image]), prompt.text, block_size)
    resolved = resolve(config, known.shape, known.trained)
    if known.family is not None:
        from vllm_hidrop.engine.model_checks import check_model

        check_model(resolved, known.family, known.hf_config)
    if warning := training_warning(resolved, known.trained):
        print(f"hidrop: warning: {warning}", file=sys.stderr)
    if note := provenance(resolved, known.shape, known.trained):
        print(f"hidrop: note: {note}", file=sys.stderr)
    return known, resolved, workload, request_costs(known, resolved, workload)


def request_costs(
    model: Model, resolved: Resolved, workload: Workload, decided: Sequence[int] | None = None
) -> RequestCosts:
    """Costs of a request, images first; ``decided``: vision tokens per stage of an adaptive method, else its bounds."""
    spans, offset = [], 0
    for num_tokens in workload.images:
        spans.append(Span(offset, num_tokens))
        offset += num_tokens
    adaptive = isinstance(resolved.method, Adaptive)
    plan = make_plan(resolved.schedule, offset + workload.text, spans, adaptive=adaptive)
    if adaptive and decided is not None and spans:
        plan = replace(plan, kept=tuple(_split(count, len(spans)) for count in decided), decided=True)
    schedule, signal = resolved.schedule, resolved.method.signal
    return costs.request_costs(model.text, schedule, plan, signal, workload.block_size, model.vision)


def _split(count: int, parts: int) -> tuple[int, ...]:
    """Split a count over images as evenly as it goes: the costs of towers are per image."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


def read_model(model: str) -> Model:
    """Shapes of a directory or hub model. Raises ValueError: it does not exist, or ``hidrop serve`` would refuse it."""
    from vllm_hidrop.embedded import MODEL_DIR
    from vllm_hidrop.models.families import family_of

    config = _read_config(str(MODEL_DIR) if model == EMBEDDED else model)
    family = family_of(next(iter(config.architectures or []), None))
    family.check(config)
    text, vision = text_shape(family.text_config(config)), family.vision_shape(config)
    return Model(text, vision, family.shape(config), getattr(config, "hidrop", None), config, family)


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
