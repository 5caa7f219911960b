"""What every family shares: the methods that its requests may use, and its staged layer loop."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from vllm_hidrop.config import make_method
from vllm_hidrop.engine.configure import default_method
from vllm_hidrop.methods.adaptive import Chooser
from vllm_hidrop.models.families import family_of
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.staged.loop import StagedForward
from vllm_hidrop.staged.renumbering import CompactedForward, RenumberedForward


def choosers(vllm_config: Any) -> dict[str, Chooser]:
    """By name, the methods that requests may use."""
    hf_config = vllm_config.model_config.hf_config
    shape = family_of(vllm_config.model_config.architecture).shape(hf_config)
    chosen = vllm_config.additional_config["hidrop"]["resolved"]
    own = make_method(chosen["method"], chosen["preset"], chosen["options"]).fitted(shape)
    others = {name: default_method(name, shape).fitted(shape) for name in chosen["methods"] if name != own.name}
    return {own.name: own, **others}


def staged_forward(vllm_config: Any, layers: Sequence[nn.Module], norm: nn.Module) -> StagedForward:
    """The staged layer loop of a model, under the resolved choice."""
    planner = Planner.from_vllm_config(vllm_config)
    forwards = {PositionScheme.COMPACTED: CompactedForward, PositionScheme.RENUMBERED: RenumberedForward}
    return forwards.get(planner.positions, StagedForward)(layers, norm, planner.schedule)
