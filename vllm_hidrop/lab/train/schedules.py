"""The schedules that embedded checkpoints train with: the two that ship, and the rows of the ablation table.

HiDrop's numbers are its preset ``embedded``'s; a row names only what it changes.
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Any

from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.train.decoder import Decoder
from vllm_hidrop.lab.train.model import NUM_LLM_LAYERS
from vllm_hidrop.lab.train.scenes import NUM_PATCHES
from vllm_hidrop.lab.train.staged import Selection, StagedTraining
from vllm_hidrop.methods import Method, ModelShape
from vllm_hidrop.methods.controls import Random
from vllm_hidrop.methods.hidrop import HiDrop
from vllm_hidrop.methods.none import NoPruning
from vllm_hidrop.methods.pyramiddrop import PyramidDrop
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.signal import Signal

SHAPE = ModelShape(NUM_LLM_LAYERS, NUM_PATCHES)
PRESET = "embedded"
DENSE = NoPruning()
HIDROP = HiDrop.from_preset(PRESET)
LATE_INJECTION = replace(HIDROP, filter_layers=(), keeps=(), exit_layer=None)
"""Late injection only, in half of the base model's training steps."""
FLAT_KEEP = 38
"""Keep of one cut at HiDrop's first filter: 63.8 in the mean over the layers, the nearest to HiDrop's 64."""
EARLY_LAYER = 1
EARLY_KEEP = 17
"""All in layer 0 and 17 in the other 11: 63.6 in the mean over the layers, the nearest to HiDrop's 64."""


@dataclass(frozen=True)
class Form:
    """What a checkpoint's last stage trains with; ``summary`` is a line for the tables.

    ``method`` must not score by the layer before: the shared image pass does not give that signal. ``selection`` is the
    backward pass's view of a cut, ``position_scheme`` the survivors' RoPE ids, ``seed`` this stage's order of the data.
    """

    method: Method
    summary: str
    selection: Selection = Selection.DIFFERENTIABLE
    position_scheme: PositionScheme = PositionScheme.PERSISTENT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method.signal is Signal.PREVIOUS_ATTENTION:
            raise ValueError(f"{self.method.name}: embedded training scores under the layer about to run only")


HIDROP_FORM = Form(HIDROP, "HiDrop's schedule")
_EARLY = PyramidDrop(cuts=(EARLY_LAYER / NUM_LLM_LAYERS,), keeps=(EARLY_KEEP,))
_QUARTERS = PyramidDrop(cuts=(EARLY_LAYER / NUM_LLM_LAYERS, 1 / 3, 2 / 3), keeps=(32, 16, 8))


def _hidrop(summary: str, **changed: Any) -> Form:
    """HiDrop's form with other values of its own or of its method."""
    of_form = {name: changed.pop(name) for name in ("selection", "position_scheme", "seed") if name in changed}
    return Form(replace(HIDROP, **changed), summary, **of_form)


_OTHERS = [one for one in Selection if one is not HIDROP_FORM.selection]
FORMS: dict[str, Form] = {
    "dense": Form(DENSE, "every vision token in every layer"),
    "hidrop": HIDROP_FORM,
    "hidrop_seed1": _hidrop("hidrop with another order of the data: the noise", seed=1),
    **{f"selection_{one}": _hidrop(f"hidrop with selection {one}", selection=one) for one in _OTHERS},
    "no_injection": _hidrop(
        "without late injection: every token from layer 0 on, then the same cuts and exit", inject_layer=1
    ),
    "no_exit": _hidrop("without early exit: the last cut's tokens stay to the end", exit_layer=None),
    "no_pyramid": _hidrop("without cuts: every token from injection to exit", filter_layers=(), keeps=()),
    "flat": _hidrop(
        f"one cut to {FLAT_KEEP} instead of the pyramid, same injection and exit",
        filter_layers=HIDROP.filter_layers[:1],
        keeps=(FLAT_KEEP,),
    ),
    "compacted": _hidrop(
        "survivors renumbered after every cut instead of keeping their positions",
        position_scheme=PositionScheme.COMPACTED,
    ),
    "grouped": _hidrop(
        "text numbered as if there were no image, vision keeps its positions", position_scheme=PositionScheme.GROUPED
    ),
    "pyramiddrop": Form(_QUARTERS, "PyramidDrop: all in layer 0, then three cuts"),
    "early_cut": Form(
        _EARLY, "FastV's schedule (one cut after layer 0), scored by attention under the layer about to run"
    ),
    "random": Form(Random(layer=EARLY_LAYER, keep=EARLY_KEEP), "early_cut with any tokens instead of the best"),
}
"""All forms by name; ``dense`` and ``hidrop`` ship, the others are ablations."""


def method_entry(method: Method) -> dict[str, Any] | None:
    """A method as a ``hidrop`` entry: name, preset, and what differs from preset or defaults; None for no pruning."""
    if isinstance(method, NoPruning):
        return None
    is_ours = isinstance(method, HiDrop)
    usual = HIDROP if is_ours else type(method)()
    names = [field.name for field in dataclasses.fields(method)]
    changed = {name: getattr(method, name) for name in names if getattr(method, name) != getattr(usual, name)}
    entry: dict[str, Any] = {"method": method.name}
    if is_ours:
        entry["preset"] = PRESET
    if changed:
        entry["options"] = json.loads(json.dumps(changed))  # tuples as JSON has them
    return entry


def trained_entry(form: str) -> dict[str, Any] | None:
    """The ``hidrop`` entry of a form's ``config.json``; None for the dense one."""
    chosen = FORMS[form]
    entry = method_entry(chosen.method)
    if entry is not None and chosen.position_scheme is not PositionScheme.PERSISTENT:
        entry["positions"] = str(chosen.position_scheme)
    return entry


def with_schedule(
    model: LlavaForConditionalGeneration,
    method: Method,
    selection: str = Selection.DIFFERENTIABLE,
    position_scheme: str = PositionScheme.PERSISTENT,
) -> StagedTraining:
    """The model's decoder under a method's schedule."""
    return StagedTraining.from_method(Decoder(model.model.language_model), method, SHAPE, selection, position_scheme)
