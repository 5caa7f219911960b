"""The compatibility gate: settings that pruning would silently break are refused at start, each with its reason.

The table in the README is generated from :data:`RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform

from vllm_hidrop.engine.planner import Planner


@dataclass(frozen=True)
class Rule:
    """One refused setting.

    Attributes:
        setting: what the user knows it as.
        reason: why it cannot be combined with staged layers.
        is_set: whether a configuration has it.
    """

    setting: str
    reason: str
    is_set: Callable[[Any], bool]


def _is_cuda_graph(config: Any) -> bool:
    return not current_platform.is_cpu() and not config.model_config.enforce_eager


CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")

RULES = (
    Rule(
        "--pipeline-parallel-size > 1",
        "ranks exchange tensors of one fixed row count",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    Rule(
        "--data-parallel-size > 1",
        "not tested yet; run several servers behind a router",
        lambda c: c.parallel_config.data_parallel_size > 1,
    ),
    Rule(
        "--decode-context-parallel-size > 1",
        "slots are compact per stage, not split over ranks",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
    ),
    Rule("--enable-dbo", "micro-batches cut a step's full rows", lambda c: c.parallel_config.use_ubatching),
    Rule("--enable-lora", "its indices are made once per step, for unpruned rows", lambda c: c.lora_config is not None),
    Rule("--speculative-config", "drafts index unpruned rows", lambda c: c.speculative_config is not None),
    Rule(
        "--kv-transfer-config",
        "a connector moves KV by prompt position, stages hold compact slots",
        lambda c: c.kv_transfer_config is not None,
    ),
    Rule("--ec-transfer-config", "not tested yet", lambda c: c.ec_transfer_config is not None),
    Rule(
        "--kv-cache-dtype other than auto or fp8",
        "not tested yet",
        lambda c: c.cache_config.cache_dtype not in CACHE_DTYPES,
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
        "CUDA graphs (no --enforce-eager on CUDA)",
        "a staged step's row counts vary",
        _is_cuda_graph,
    ),
    Rule(
        "vLLM's V2 model runner",
        "the adapter is for V1; set VLLM_USE_V2_MODEL_RUNNER=0",
        lambda c: c.use_v2_model_runner,
    ),
)


def check_gate(vllm_config: Any) -> None:
    """Refuse a configuration that pruning would silently break; a server that never prunes is not restricted.

    Raises:
        ValueError: one line that names the setting and the reason.
    """
    if not Planner.from_vllm_config(vllm_config).is_staged:
        return
    for rule in RULES:
        if rule.is_set(vllm_config):
            raise ValueError(f"pruning cannot be combined with {rule.setting}: {rule.reason}")
