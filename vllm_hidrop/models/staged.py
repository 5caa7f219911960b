"""What every family shares: the configuration hook of its architecture, and its staged forward."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from vllm.logger import init_logger

from vllm_hidrop.config import HidropConfig, make_method, resolve
from vllm_hidrop.engine.compacted import CompactedForward
from vllm_hidrop.engine.forward import StagedForward
from vllm_hidrop.engine.gate import check_gate
from vllm_hidrop.engine.planner import Planner
from vllm_hidrop.models.families import family_of
from vllm_hidrop.positions import PositionScheme

logger = init_logger(__name__)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those that rotate a row by its one id and nothing else."""


def configure(vllm_config: Any) -> None:
    """Resolve the user's choice for this model and set the engine up for it; vLLM calls this once per configuration.

    Raises:
        ValueError: the choice does not fit the model, or a setting cannot be combined with pruning.
    """
    chosen = vllm_config.additional_config.get("hidrop", {})
    hf_config = vllm_config.model_config.hf_config
    family = family_of(vllm_config.model_config.architecture)
    family.check(hf_config)
    config = HidropConfig.parse({k: v for k, v in chosen.items() if k != "resolved"})
    resolved = resolve(config, family.shape(hf_config), getattr(hf_config, "hidrop", None))
    if resolved.positions is not PositionScheme.PERSISTENT:
        check_rope(hf_config.text_config, resolved.positions)
    name = resolved.method.name
    vllm_config.additional_config["hidrop"] = {
        **config.model_dump(mode="json"),
        "resolved": {
            "method": name,
            "preset": resolved.preset,
            "options": resolved.options,
            "schedule": resolved.schedule.dump(),
            "signal": None if name == "none" else str(resolved.method.signal),
            "positions": str(resolved.positions),
        },
    }
    check_gate(vllm_config)
    _set_engine_classes(vllm_config)
    if Planner.from_vllm_config(vllm_config).is_staged:
        _set_limits(vllm_config)
        _set_kernels(vllm_config)


def check_rope(text_config: Any, positions: PositionScheme) -> None:
    """Refuse ids other than the prompt's where a row's Q and K are not RoPE by its one id.

    Raises:
        ValueError: names what the text model has.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    found = [] if rope_type in ROPE_TYPES else [f"rope type {rope_type!r}"]
    found += ["partial rotary"] if rope.get("partial_rotary_factor", 1) != 1 else []
    found += [key for key in ("mrope_section", "xdrope_section", "use_fope", "full_attention") if rope.get(key)]
    found += [key for key in ("dual_chunk_attention_config", "llama_4_scaling") if getattr(text_config, key, None)]
    if found:
        raise ValueError(f"{positions} positions need plain RoPE in every layer, this text model has {found[0]}")


def _set_engine_classes(vllm_config: Any) -> None:
    from vllm.platforms import current_platform

    worker = "StagedCPUWorker" if current_platform.is_cpu() else "StagedGPUWorker"
    vllm_config.parallel_config.worker_cls = f"vllm_hidrop.engine.worker.{worker}"
    is_async = vllm_config.scheduler_config.async_scheduling and not current_platform.is_cpu()
    scheduler = "StagedAsyncScheduler" if is_async else "StagedScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"vllm_hidrop.engine.scheduler.{scheduler}"


def _set_limits(vllm_config: Any) -> None:
    """A pruned prompt is one step, so a step must hold the longest prompt; prefix caching is not exact yet."""
    if vllm_config.cache_config.enable_prefix_caching:
        logger.info("Prefix caching is off: after a cut, KV depends on the whole prompt.")
        vllm_config.cache_config.enable_prefix_caching = False
    scheduler_config = vllm_config.scheduler_config
    longest = vllm_config.model_config.max_model_len
    if scheduler_config.max_num_batched_tokens < longest:
        logger.warning(
            "Raising max_num_batched_tokens from %d to max_model_len %d: a pruned prompt is prefilled in one step.",
            scheduler_config.max_num_batched_tokens,
            longest,
        )
        scheduler_config.max_num_batched_tokens = longest
        scheduler_config.max_num_encoder_input_tokens = longest
        scheduler_config.encoder_cache_size = longest


def _set_kernels(vllm_config: Any) -> None:
    """Where vLLM compiles, it leaves RoPE to the compiler; the staged loop runs uncompiled and needs the kernel."""
    custom_ops = vllm_config.compilation_config.custom_ops
    if not any(op.endswith("rotary_embedding") for op in custom_ops):
        custom_ops.append("+rotary_embedding")


def staged_forward(vllm_config: Any, layers: Sequence[nn.Module], norm: nn.Module) -> StagedForward:
    """The staged layer loop of a model, under the resolved choice."""
    chosen = vllm_config.additional_config["hidrop"]["resolved"]
    method = make_method(chosen["method"], chosen["preset"], chosen["options"])
    planner = Planner.from_vllm_config(vllm_config)
    forward = CompactedForward if planner.positions is PositionScheme.COMPACTED else StagedForward
    return forward(layers, norm, planner.schedule, method.signal, method.score)
