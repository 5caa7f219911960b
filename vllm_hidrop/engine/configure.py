"""The configuration hook of our architectures: resolves the user's choice for one model and sets vLLM up for it."""

import dataclasses
from typing import Any, ClassVar, Protocol

from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_hidrop.config import (
    HidropConfig,
    Resolved,
    make_method,
    moved_note,
    moved_options,
    provenance,
    resolve,
    training_warning,
)
from vllm_hidrop.engine.gate import check_gate
from vllm_hidrop.engine.model_checks import ModelFamily, fitted_to_model, reduction_of
from vllm_hidrop.engine.step_budget import most_tokens
from vllm_hidrop.methods import METHODS, Adaptive, Method, ModelShape
from vllm_hidrop.methods.scored_layers import check_scored_layers
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.planner import Alternative, Planner
from vllm_hidrop.plan.schedule import Cached, Schedule
from vllm_hidrop.plan.shapes import text_shape
from vllm_hidrop.plan.vision import VisionShape
from vllm_hidrop.runners.tower_attention import KERNEL, has_tower_kernel

logger = init_logger(__name__)


class Family(ModelFamily, Protocol):
    """What the hook asks of a model family, see ``models.family``."""

    has_tower_kernel: ClassVar[bool]

    def check(self, config: Any) -> None:
        """Refuse a checkpoint that cannot run staged."""

    def shape(self, config: Any) -> ModelShape:
        """Layers and tokens per image."""

    def frame_tokens(self, config: Any) -> int | None:
        """Vision tokens of a video's frame, where all are the same."""

    def num_levels(self, config: Any) -> int:
        """Decoder layers behind which a later tower layer's features are added."""

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Sizes of the tower."""


def configure(vllm_config: Any, family: Family) -> None:
    """Resolve the user's choice for this model and set the engine up for it; vLLM calls this once per ``ModelConfig``.

    ValueError where the choice does not fit the model, or a setting cannot be combined with pruning.
    """
    chosen = vllm_config.additional_config.get("hidrop", {})
    hf_config = vllm_config.model_config.hf_config
    family.check(hf_config)
    config = HidropConfig.parse({k: v for k, v in chosen.items() if k != "resolved"})
    shape = family.shape(hf_config)
    resolved = resolve(config, shape, getattr(hf_config, "hidrop", None))
    resolved, left_out = fitted_to_model(resolved, family, hf_config)
    if moved := moved_note(resolved):
        logger.info("%s.", moved)
    _warn_of_trained_positions(config, resolved, getattr(hf_config, "hidrop", None))
    for warning in (training_warning(resolved, getattr(hf_config, "hidrop", None)), left_out):
        if warning is not None:
            logger.warning_once("%s.", warning)
    for line in (provenance(resolved, shape, getattr(hf_config, "hidrop", None)), config.note):
        if line:
            logger.info_once("%s.", line)
    dtype = vllm_config.model_config.dtype
    has_kernel = family.has_tower_kernel and has_tower_kernel(hf_config.vision_config, dtype)
    methods = alternatives(resolved, shape, has_kernel)
    vllm_config.additional_config["hidrop"] = {
        **config.model_dump(mode="json"),
        "resolved": {
            "method": resolved.method.name,
            "preset": resolved.preset,
            "options": resolved.options,
            "methods": {name: method.dump() for name, method in methods.items()},
            "positions": str(resolved.positions),
            "shapes": _shapes(family, hf_config),
            "model_shape": dataclasses.asdict(shape),
            "family": f"{type(family).__module__}:{type(family).__qualname__}",
            "frame_tokens": family.frame_tokens(hf_config),
            "num_levels": family.num_levels(hf_config),
            # The first call's value, where vLLM calls again: _set_limits has raised the limit since.
            "step_rows": chosen.get("resolved", {}).get("step_rows") or _step_tokens(vllm_config.scheduler_config),
        },
    }
    check_gate(vllm_config)
    _set_engine_classes(vllm_config)
    _set_image_cache(vllm_config.model_config.multimodal_config)
    if Planner.from_vllm_config(vllm_config).is_staged:
        if shape.attention_layers is not None:
            _set_no_prefix_cache(vllm_config.cache_config)
        _set_limits(vllm_config, resolved.schedule, shape.tokens_per_image)
        _set_kernels(vllm_config)
        if not current_platform.is_cpu():
            _set_graphs(vllm_config)


def _set_no_prefix_cache(cache_config: Any) -> None:
    """Cache no prefixes where layers are recurrent.

    vLLM caches their states by prompt position, and ends chunks where it caches one; a pruned prompt is one chunk from
    its first image on, so that it would wait for ever.
    """
    if cache_config.enable_prefix_caching:
        logger.info("Prefix caching and the reuse of images are off: states of recurrent layers cannot be shared.")
    cache_config.enable_prefix_caching = False


def _warn_of_trained_positions(config: HidropConfig, resolved: Resolved, checkpoint_entry: Any) -> None:
    """Warn where neither user nor checkpoint names a position scheme, and the authors' own checkpoints need another."""
    authors = resolved.method.trained_positions
    if authors is not None and not checkpoint_entry and config.positions is None:
        logger.warning(
            'Serving %s with %s positions. A checkpoint that its authors\' program trained needs {"positions": "%s"}.',
            resolved.method.name,
            resolved.positions,
            authors,
        )


def _shapes(family: Family, hf_config: Any) -> dict[str, Any]:
    """The sizes that reports count FLOPs by, as JSON values."""
    text, vision = text_shape(family.text_config(hf_config)), family.vision_shape(hf_config)
    return {"text": dataclasses.asdict(text), "vision": vision and dataclasses.asdict(vision)}


def _step_tokens(scheduler_config: Any) -> int:
    return int(scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens)


def _set_engine_classes(vllm_config: Any) -> None:
    worker = "StagedCPUWorker" if current_platform.is_cpu() else "StagedGPUWorker"
    vllm_config.parallel_config.worker_cls = f"vllm_hidrop.runners.worker.{worker}"
    scheduler = "StagedAsyncScheduler" if schedules_ahead(vllm_config) else "StagedScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"vllm_hidrop.engine.scheduler.{scheduler}"


def schedules_ahead(vllm_config: Any) -> bool:
    """Whether the engine will schedule a step before it has read the last one's output; on a CPU vLLM never does."""
    return bool(vllm_config.scheduler_config.async_scheduling) and not current_platform.is_cpu()


def _set_image_cache(multimodal_config: Any) -> None:
    """Cache processed images in the API process only, and send them to the engine with every request.

    vLLM's other caches do not send images that the API process believes the engine to have. A request that is refused
    after its images were processed, or overtaken by another, makes that belief wrong: the next one fails for want of
    its pixels. vLLM itself caches so wherever an engine has several API processes.
    """
    if multimodal_config.mm_processor_cache_type == "shm":
        logger.info("Processed images are not kept in shared memory: the process that processes them keeps them.")
    multimodal_config.mm_processor_cache_type = "processor_only"


def _set_limits(vllm_config: Any, schedule: Schedule, num_image_tokens: int) -> None:
    """Raise vLLM's limits on a step's tokens: pruned prompts compute fewer rows than tokens, and run in one step."""
    scheduler_config = vllm_config.scheduler_config
    num_rows = vllm_config.additional_config["hidrop"]["resolved"]["step_rows"]
    tokens = max(vllm_config.model_config.max_model_len, most_tokens(num_rows, schedule, num_image_tokens))
    if scheduler_config.max_num_batched_tokens < tokens:
        logger.info("A step computes %d rows, averaged over the layers, of at most %d tokens.", num_rows, tokens)
        scheduler_config.max_num_batched_tokens = tokens
        scheduler_config.max_num_scheduled_tokens = None
        scheduler_config.max_num_encoder_input_tokens = tokens
        scheduler_config.encoder_cache_size = tokens


def _set_kernels(vllm_config: Any) -> None:
    """Enable the RoPE kernel: vLLM leaves RoPE to its compiler, and the staged loop runs uncompiled."""
    custom_ops = vllm_config.compilation_config.custom_ops
    if not any(op.endswith("rotary_embedding") for op in custom_ops):
        custom_ops.append("+rotary_embedding")


def _set_graphs(vllm_config: Any) -> None:
    """Replay graphs of decode steps where the V2 model runner may; vLLM's compiler does not run beside the stages."""
    config = vllm_config.compilation_config
    config.mode = CompilationMode.NONE
    if config.cudagraph_mode is None:
        is_v2 = vllm_config.use_v2_model_runner
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if is_v2 else CUDAGraphMode.NONE


def alternatives(resolved: Resolved, shape: ModelShape, has_kernel: bool) -> dict[str, Alternative]:
    """By name, the server's own method, then the methods whose default preset's cuts fall on its stages."""
    own = resolved.method
    methods = {own.name: _alternative(own, resolved.schedule, has_kernel)}
    for name in METHODS:
        if own.name not in (name, "none"):
            schedule = _fitted_to_stages(default_method(name, shape), resolved.schedule, shape)
            if schedule is not None:
                methods[name] = _alternative(default_method(name, shape), schedule, has_kernel)
    return methods


def methods_of(vllm_config: Any) -> dict[str, Method]:
    """By name, the methods that a server's requests may use."""
    chosen = vllm_config.additional_config["hidrop"]["resolved"]
    shape = ModelShape(**chosen["model_shape"])
    own = make_method(chosen["method"], chosen["preset"], chosen["options"]).fitted(shape)
    others = {name: default_method(name, shape).fitted(shape) for name in chosen["methods"] if name != own.name}
    return {own.name: own, **others}


def staged_decoder(vllm_config: Any, layers: Any, norm: Any, form: Form) -> Any:
    """A model's decoder layers and final norm as the staged loop runs them, a ``staged.loop.Decoder``."""
    from vllm_hidrop.staged.loop import Decoder
    from vllm_hidrop.staged.position_ids import ids_of

    planner = Planner.from_vllm_config(vllm_config)
    return Decoder(layers, norm, planner.schedule, ids_of(planner.positions), form)


def _alternative(method: Method, schedule: Schedule, has_kernel: bool) -> Alternative:
    signal = None if method.name == "none" else method.signal
    return Alternative(schedule, signal, isinstance(method, Adaptive), _encoding(method, has_kernel))


def _encoding(method: Method, has_kernel: bool) -> str:
    """The name of ``Plan.encoding``: all that makes image features of the method's pruned requests not stock vLLM's."""
    reduction = reduction_of([method])
    return ", ".join([KERNEL] * has_kernel + ([] if reduction is None else [reduction.name]))


def default_method(name: str, shape: ModelShape) -> Method:
    """A method at its default preset; layer numbers that are written for one model are fitted to this one."""
    preset = METHODS[name].preset_for(shape)
    method = make_method(name, preset, moved_options(name, preset, {}, shape))
    return dataclasses.replace(method, scale=True) if hasattr(method, "scale") else method  # type: ignore[call-arg]


def _fitted_to_stages(method: Method, server: Schedule, shape: ModelShape) -> Schedule | None:
    """A method's keeps over the server's stages; None where it cuts within a stage, a cache, or in the tower.

    Also None where it would score under a layer without attention.
    """
    try:
        own = method.schedule(shape)
        check_scored_layers(method.fitted(shape), own, shape)
    except ValueError:
        return None
    firsts = {stage.first_layer for stage in server.stages}
    cuts_no_cache = all(stage.cached is Cached.KEPT for stage in (*own.stages, *server.stages))
    fits = cuts_no_cache and all(stage.first_layer in firsts for stage in own.stages)
    if not fits or reduction_of([method]) is not None:
        return None
    keeps = {s.first_layer: own.stages[own.stage_of_layer(s.first_layer)].keep.dump() for s in server.stages}
    return Schedule.of(keeps, shape.num_layers)
