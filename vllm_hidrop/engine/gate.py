"""The compatibility gate: settings that pruning would silently break are refused at start, each with its reason.

The tables of docs/limits.md are generated from :data:`RULES` and :data:`CHECKED`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform

from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import Cached


@dataclass(frozen=True)
class Rule:
    """A ``setting``, by its command-line name, that is refused, and why it cannot be combined with pruning.

    ``is_set`` says whether a ``VllmConfig`` has it. ``replaces_ours``: it would replace a class of ours, so it is
    refused on a server that never prunes, too.
    """

    setting: str
    reason: str
    is_set: Callable[[Any], bool]
    replaces_ours: bool = False


@dataclass(frozen=True)
class Checked:
    """A ``setting`` that runs with pruning, and the ``test`` below tests/engine that runs it."""

    setting: str
    test: str


def _on_cuda(is_set: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda config: not current_platform.is_cpu() and is_set(config)


def _replays_other_graphs(config: Any) -> bool:
    """Whether graphs are asked for that staged steps could meet; None asks for none, ``configure`` sets it."""
    allowed = {None, CUDAGraphMode.NONE} | ({CUDAGraphMode.FULL_DECODE_ONLY} if config.use_v2_model_runner else set())
    return config.compilation_config.cudagraph_mode not in allowed


def _is_foreign(cls: Any, *known: Any) -> bool:
    """Whether a class, or its name, is neither known nor ours."""
    return cls not in known and not str(cls).startswith("vllm_hidrop.")


def _turns_rounded_keys(config: Any) -> bool:
    planner = Planner.from_vllm_config(config)
    cuts_cache = any(stage.cached is not Cached.KEPT for stage in planner.schedule.stages)
    return planner.positions is PositionScheme.RENUMBERED and cuts_cache and not planner.cache_is_exact


RECURRENT_ON_V2 = "the V2 model runner, with a model that has recurrent layers (Qwen3.5)"
CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")

RULES = (
    Rule(
        "--pipeline-parallel-size > 1",
        "ranks exchange tensors of one fixed row count",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    Rule(
        "--data-parallel-size-local below --data-parallel-size",
        "not run: a server starts all of its engines, on one machine; run several servers behind a router",
        lambda c: c.parallel_config.data_parallel_size_local < c.parallel_config.data_parallel_size,
    ),
    Rule(
        "--decode-context-parallel-size > 1",
        "slots are compact per stage, not split over ranks",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
    ),
    Rule(
        "--prefill-context-parallel-size > 1",
        "slots are compact per stage, not split over ranks",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
    ),
    Rule("--enable-dbo", "micro-batches cut a step's full rows", lambda c: c.parallel_config.use_ubatching),
    Rule(
        "--enable-lora",
        "rows are mapped to adapters once per step; stages run fewer, and a cut changes them between two projections",
        lambda c: c.lora_config is not None,
    ),
    Rule("--speculative-config", "drafts index unpruned rows", lambda c: c.speculative_config is not None),
    Rule(
        "--kv-transfer-config",
        "a connector moves KV by prompt position, stages hold compact slots",
        lambda c: c.kv_transfer_config is not None,
    ),
    Rule(
        "--kv-offloading-size",
        "it moves KV by prompt position, stages hold compact slots",
        lambda c: c.cache_config.kv_offloading_size is not None,
    ),
    Rule(
        "--kv-events-config",
        "each stage stores its own block of a prefix, and no router that counts them has been tried",
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
    ),
    Rule(
        "--ec-transfer-config",
        "what a vision tower reduced does not travel with its features",
        lambda c: c.ec_transfer_config is not None,
    ),
    Rule(
        "--ec-manager-config",
        "the worker forgets what a tower reduced when vLLM's own manager frees it",
        lambda c: c.ec_manager_config.encoder_cache_manager_cls is not None,
    ),
    Rule(
        "--video-pruning-rate",
        "it drops tokens of a video before the plan is made, and rewrites the RoPE ids of those left",
        lambda c: bool(_multimodal(c, "video_pruning_rate")),
    ),
    Rule("--mm-encoder-only", "no language model is loaded to prune in", lambda c: _multimodal(c, "mm_encoder_only")),
    Rule(
        "--kv-cache-dtype other than auto, the model's own or fp8",
        "vLLM's CPU kernel reads another type's bytes as the model's, and answers with noise; no other is tested",
        lambda c: c.cache_config.cache_dtype not in {*CACHE_DTYPES, str(c.model_config.dtype).removeprefix("torch.")},
    ),
    Rule(
        "--kv-cache-dtype other than auto under renumbered positions where a method cuts its cache",
        "keys that stay are rotated once more in the cache, and fp8 would round them twice",
        _turns_rounded_keys,
    ),
    Rule(
        "--kv-cache-dtype-skip-layers",
        "layers that hold the same rows share one attention metadata",
        lambda c: bool(c.cache_config.kv_cache_dtype_skip_layers),
    ),
    Rule(
        "a sliding window (set --disable-sliding-window)",
        "it counts cached tokens, of which stages hold fewer than the prompt has",
        lambda c: c.model_config.get_sliding_window() is not None,
    ),
    Rule(
        "--offload-backend prefetch, --offload-group-size",
        "weights are fetched by a layer's own forward, and stages call its parts",
        lambda c: c.offload_config.offload_backend == "prefetch" or c.offload_config.prefetch.offload_group_size > 0,
    ),
    Rule(
        "--cpu-offload-gb",
        "without unified addressing, weights are fetched by a layer's own forward, and stages call its parts",
        lambda c: c.offload_config.uva.cpu_offload_gb > 0,
    ),
    Rule("--runner pooling", "pooling reads every prompt row", lambda c: c.model_config.runner_type == "pooling"),
    Rule("--enable-prompt-embeds", "spans come from image placeholders", lambda c: c.model_config.enable_prompt_embeds),
    Rule(
        "--long-prefill-token-threshold",
        "it would split a pruned prompt",
        lambda c: c.scheduler_config.long_prefill_token_threshold > 0,
    ),
    Rule(
        "--disable-hybrid-kv-cache-manager",
        "stages are KV cache groups",
        lambda c: bool(c.scheduler_config.disable_hybrid_kv_cache_manager),
    ),
    Rule(
        "--kv-sharing-fast-prefill",
        "it skips prompt rows the cuts score",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
    ),
    Rule(
        "--compilation-config.cudagraph_mode other than NONE or, on the V2 model runner, FULL_DECODE_ONLY",
        "a step that prefills pruned prompts has other row counts every time; only decode steps replay graphs",
        _on_cuda(_replays_other_graphs),
    ),
    Rule(
        "--compilation-config.mode other than NONE on CUDA",
        "the staged loop calls the parts of a layer, and has not been run beside vLLM's compiler there",
        _on_cuda(lambda c: c.compilation_config.mode not in {None, CompilationMode.NONE}),
    ),
    Rule(
        "--compilation-config.cudagraph_mm_encoder",
        "a replayed vision tower encodes as stock does, whatever encoding a request's method needs",
        lambda c: c.compilation_config.cudagraph_mm_encoder,
    ),
    Rule(
        RECURRENT_ON_V2,
        "nobody has read how stages share states there: set VLLM_USE_V2_MODEL_RUNNER=0",
        lambda c: c.model_config.is_hybrid and c.use_v2_model_runner,
    ),
    Rule(
        "--scheduler-cls",
        "pruning and its reports need their own scheduler",
        lambda c: _is_foreign(c.scheduler_config.scheduler_cls, None),
        replaces_ours=True,
    ),
    Rule(
        "--worker-cls",
        "pruning needs its own worker",
        lambda c: _is_foreign(c.parallel_config.worker_cls, "auto"),
        replaces_ours=True,
    ),
)

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER")
"""Attention backends that stages run on. Only the CPU's has been run; the others' builders and caches were read."""
STATE_BACKENDS = ("GDN_ATTN",)
"""Those of recurrent layers."""

CHECKED = (
    Checked("--tensor-parallel-size 2", "test_tensor_parallel.py::test_two_ranks_select_and_answer_as_one_does"),
    Checked(
        "--data-parallel-size 2, also with --api-server-count 2",
        "test_data_parallel.py::test_two_engines_answer_and_count_as_one_does",
    ),
    Checked(
        "--distributed-executor-backend mp, uni",
        "test_tensor_parallel.py::test_a_worker_process_answers_as_the_engine_in_one_process",
    ),
    Checked(
        "--kv-cache-dtype fp8, fp8_e4m3, fp8_e5m2",
        "test_adaptive_blocks.py::test_an_fp8_cache_gives_stocks_tokens_and_survives_preemption",
    ),
    Checked(
        "--kv-cache-dtype bfloat16, float16 (the model's own)",
        "test_settings.py::test_the_models_own_dtype_named_for_the_cache_changes_no_answer",
    ),
    *(
        Checked(settings, "test_settings.py::test_settings_that_leave_every_answer_as_it_is")
        for settings in (
            "--watermark, --no-scheduler-reserve-full-isl, --num-gpu-blocks-override",
            "--max-num-active-seqs, --max-num-scheduled-tokens",
            "--no-enable-chunked-prefill, --disable-chunked-mm-input",
            "--mm-processor-cache-gb 0, --skip-mm-profiling",
        )
    ),
    Checked(
        "--language-model-only, --limit-mm-per-prompt.image 0",
        "test_settings.py::test_a_server_of_text_alone_has_no_tower",
    ),
    Checked(
        "--scheduling-policy priority", "test_settings.py::test_priority_says_who_is_preempted_and_changes_no_answer"
    ),
    Checked("--stream-interval", "test_settings.py::test_a_stream_interval_loses_no_token_and_no_report"),
    Checked("--logits-processors", "test_settings.py::test_a_logits_processor_sees_the_rows_of_pruned_requests"),
    Checked(
        "--enable-mm-embeds (from Python; `hidrop serve` refuses it)",
        "test_settings.py::test_image_embeddings_are_pruned_as_their_image_is",
    ),
)


def _multimodal(config: Any, name: str) -> bool:
    found = config.model_config.multimodal_config
    return found is not None and bool(getattr(found, name))


def check_gate(vllm_config: Any) -> None:
    """Raise ValueError, one line with setting and reason, for a configuration that pruning would silently break."""
    is_staged = Planner.from_vllm_config(vllm_config).is_staged
    for rule in RULES:
        if (is_staged or rule.replaces_ours) and rule.is_set(vllm_config):
            raise ValueError(f"pruning cannot be combined with {rule.setting}: {rule.reason}")


def check_attention_backend(name: str) -> None:
    """Raise ValueError for an attention backend whose metadata and caches stages do not know."""
    if name not in (*BACKENDS, *STATE_BACKENDS):
        raise ValueError(
            f"pruning cannot run on the attention backend {name}: stages need metadata and cached keys of their own, "
            f"and nobody has read how this backend makes them; choose one of {', '.join(BACKENDS)} with "
            "--attention-backend"
        )
