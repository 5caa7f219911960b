"""The schedules the embedded checkpoints train with."""

from transformers import LlavaForConditionalGeneration

from vllm_hidrop.methods import Method, ModelShape
from vllm_hidrop.methods.hidrop import HiDrop
from vllm_hidrop.methods.none import NoPruning
from vllm_hidrop.training.model import NUM_LLM_LAYERS
from vllm_hidrop.training.scenes import NUM_PATCHES
from vllm_hidrop.training.staged import PositionScheme, Selection, StagedTraining

SHAPE = ModelShape(NUM_LLM_LAYERS, NUM_PATCHES)
DENSE = NoPruning()
HIDROP = HiDrop.from_preset("embedded")
LATE_INJECTION = HiDrop(
    inject_layer=HIDROP.inject_layer, filter_layers=(), keeps=(), exit_layer=None, shape=HIDROP.shape
)
"""Late injection only: what half of the base model's steps see."""

FORMS: dict[str, tuple[Method, str, str]] = {
    "dense": (DENSE, Selection.DIFFERENTIABLE, PositionScheme.PERSISTENT),
    "hidrop": (HIDROP, Selection.AS_RELEASED, PositionScheme.PERSISTENT),
}
"""What a checkpoint's last two stages train with: method, selection, positions."""


def trained_entry(form: str) -> dict[str, str] | None:
    """The ``hidrop`` entry of a form's ``config.json``; None for the dense one."""
    return None if form == "dense" else {"method": HIDROP.name, "preset": "embedded"}


def with_schedule(
    model: LlavaForConditionalGeneration,
    method: Method,
    selection: str = Selection.DIFFERENTIABLE,
    position_scheme: str = PositionScheme.PERSISTENT,
) -> StagedTraining:
    """The model's decoder under a method's schedule."""
    return StagedTraining.from_method(model.model.language_model, method, SHAPE, selection, position_scheme)
