"""Which cuts can be scored in a model some of whose layers have no attention (recurrent layers)."""

from collections.abc import Iterable, Sequence

from vllm_hidrop.methods.adaptive import Adaptive
from vllm_hidrop.methods.base import Method, ModelShape
from vllm_hidrop.plan.schedule import ALL, Schedule
from vllm_hidrop.plan.signal import Signal


def nearest_cuts(signal: Signal, first_layers: Sequence[int], shape: ModelShape) -> list[int]:
    """For cuts before these layers, rising, the nearest layers before which they can be scored.

    Every cut gets a layer of its own, the lower of two as near, as long as there are any; the rest share the last.
    """
    usable = usable_cuts(signal, shape)
    if not usable:
        return list(first_layers)
    moved: list[int] = []
    for wanted in first_layers:
        free = [layer for layer in usable if not moved or layer > moved[-1]]
        moved.append(min(free, key=lambda layer: (abs(layer - wanted), layer)) if free else moved[-1])
    return moved


def usable_cuts(signal: Signal, shape: ModelShape) -> list[int]:
    """The first layers of stages whose cut this signal can score; all of them where every layer has attention."""
    return [first for first in range(1, shape.num_layers) if signal.under.can_score(first, shape.attention_layers)]


def check_scored_layers(method: Method, schedule: Schedule, shape: ModelShape) -> None:
    """Raise ValueError, which names the usable layers, where a method needs attention of a layer that has none.

    Keeps of 0 or all choose nothing: such cuts may lie anywhere.
    """
    if shape.attention_layers is None:
        return
    under = method.signal.under
    for first in _scored_cuts(method, schedule):
        if not under.can_score(first, shape.attention_layers):
            raise ValueError(
                f"the cut at layer {first} is scored under layer {under.layer(first)}, which has no attention in this "
                f"model; usable for cuts: layers {_listed(usable_cuts(method.signal, shape))}"
            )
    if isinstance(method, Adaptive):
        edited = (layer for layer in range(shape.num_layers) if method.edit(layer) is not None)
        without = [layer for layer in edited if layer not in shape.attention_layers]
        if without:
            raise ValueError(
                f"it edits the attention of layers {_listed(without)}, which have none in this model; usable: layers "
                f"{_listed(shape.attention_layers)}"
            )


def _scored_cuts(method: Method, schedule: Schedule) -> Iterable[int]:
    """First layers of the stages on whose entry the method scores, or decides, which tokens stay."""
    before = ALL
    for stage in schedule.stages:
        if isinstance(method, Adaptive):
            scores = any(method.judges(stage.first_layer, memory) for memory in (None, 0))
        else:
            scores = not stage.keep.is_none and not stage.keep.is_all and stage.keep != before
        if scores:
            yield stage.first_layer
        before = stage.keep


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
