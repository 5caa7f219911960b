"""What a choice of method and positions asks of a model, read from its Hugging Face configuration; imports no vLLM."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from vllm_hidrop.config import Resolved
from vllm_hidrop.methods import Adaptive, Method
from vllm_hidrop.methods.adaptive import EncoderReduction
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.positions import PositionScheme

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types that rotate a row by its one id and nothing else."""


class ModelFamily(Protocol):
    """What the checks ask of a model family, see ``models.family``."""

    def text_config(self, config: Any) -> Any:
        """The text model's part of a configuration."""

    def form(self, config: Any) -> Form:
        """The form of the decoder layers."""

    def no_reduction(self, config: Any) -> str | None:
        """Why no reduction can run in the vision tower, or None."""

    def check_reduction(self, config: Any, reduction: EncoderReduction) -> None:
        """Refuse a reduction that cannot run in a vision tower that can run others."""


def fitted_to_model(resolved: Resolved, family: ModelFamily, hf_config: Any) -> tuple[Resolved, str | None]:
    """A choice that fits a model's shape, as this model runs it, and a warning of what is left out, or None.

    Raises:
        ValueError: the model cannot run by it; names the obstacle.
    """
    if resolved.positions is not PositionScheme.PERSISTENT:
        if family.form(hf_config) is not Form.STANDARD:
            raise ValueError(f"{resolved.positions} positions need decoder layers of the standard form")
        check_rope(family.text_config(hf_config), resolved.positions)
    method = resolved.method
    if not isinstance(method, Adaptive):
        return resolved, None
    if resolved.positions is PositionScheme.COMPACTED:
        raise ValueError(f"method {method.name!r} needs persistent positions, not compacted ones")
    return _fitted_to_tower(resolved, method, family, hf_config)


def _fitted_to_tower(
    resolved: Resolved, method: Adaptive, family: ModelFamily, hf_config: Any
) -> tuple[Resolved, str | None]:
    """Without the method's reduction where no reduction can run in the tower, unless an option asks for it."""
    if method.reduction is None:
        return resolved, None
    reason = family.no_reduction(hf_config)
    if reason is None:
        try:
            family.check_reduction(hf_config, method.reduction)
        except ValueError as error:
            raise ValueError(f"method {method.name!r}: {error}") from None
        return resolved, None
    off = dict(method.without_reduction)
    asked = [name for name, value in off.items() if resolved.options.get(name, value) != value]
    if asked:
        raise ValueError(f"method {method.name!r}: {reason}; leave out {' and '.join(asked)}")
    left_out = f"method {method.name!r} runs without its part in the vision tower ({', '.join(off)}): {reason}"
    return replace(resolved, method=replace(method, **off), options={**resolved.options, **off}), left_out


def check_rope(text_config: Any, positions: PositionScheme) -> None:
    """Raise ValueError, which names the obstacle, where Q and K depend on more than RoPE by a row's one id."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    obstacles = [] if rope_type in ROPE_TYPES else [f"rope type {rope_type!r}"]
    obstacles += ["partial rotary"] if rope.get("partial_rotary_factor", 1) != 1 else []
    obstacles += [key for key in ("mrope_section", "xdrope_section", "use_fope", "full_attention") if rope.get(key)]
    obstacles += [key for key in ("dual_chunk_attention_config", "llama_4_scaling") if getattr(text_config, key, None)]
    if obstacles:
        raise ValueError(f"{positions} positions need plain RoPE in every layer, this text model has {obstacles[0]}")


def reduction_of(methods: Iterable[Method]) -> EncoderReduction | None:
    """The reduction in the vision tower; at most one of a server's methods, its own one, has any."""
    reductions = (method.reduction for method in methods if isinstance(method, Adaptive))
    return next((reduction for reduction in reductions if reduction is not None), None)
