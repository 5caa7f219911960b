"""Start-up: what is refused and how, what is set, and that registering is safe in any process and twice."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from tests.engine.harness import ARCHITECTURE
from vllm_hidrop.engine import compat, gate
from vllm_hidrop.engine.gate import RULES
from vllm_hidrop.models.families import family_of
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plugin import register
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

FASTV = {"method": "fastv"}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration has a sliding window, set to none."""
    return make_llava(tmp_path_factory.mktemp("mistral"), "mistral")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def configure(model: Path, hidrop: dict[str, Any], **settings: Any) -> Any:
    arguments: dict[str, Any] = {
        "hf_overrides": {"architectures": [ARCHITECTURE]},
        "additional_config": {"hidrop": hidrop},
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
    }
    return EngineArgs(model=str(model), **(arguments | settings)).create_engine_config()


STOCK_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
CUTS_RENUMBERED = {
    "method": "mustdrop",
    "preset": "tok64",
    "options": {"scale": True, "merge_window": 2},
    "positions": "renumbered",
}
REFUSED: dict[str, list[dict[str, Any]]] = {
    "--pipeline-parallel-size > 1": [{"pipeline_parallel_size": 2}],
    "--data-parallel-size-local below --data-parallel-size": [
        {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True},
        {"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_address": "127.0.0.1"},
    ],
    "--decode-context-parallel-size > 1": [{"decode_context_parallel_size": 2, "tensor_parallel_size": 2}],
    "--prefill-context-parallel-size > 1": [{"prefill_context_parallel_size": 2}],
    "--compilation-config.cudagraph_mm_encoder": [{"compilation_config": {"cudagraph_mm_encoder": True}}],
    "--enable-dbo": [{"enable_dbo": True}, {"ubatch_size": 2}],
    "--enable-lora": [{"enable_lora": True}],
    "--speculative-config": [{"speculative_config": NGRAM}, {"spec_method": "ngram", "spec_tokens": 2}],
    "--kv-transfer-config": [{"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}],
    "--kv-offloading-size": [{"kv_offloading_size": 1.0}],
    "--kv-events-config": [{"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}],
    "--ec-transfer-config": [{"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}}],
    "--ec-manager-config": [{"ec_manager_config": {"encoder_cache_manager_cls": "a.Manager"}}],
    "--video-pruning-rate": [{"video_pruning_rate": 0.5}],
    "--mm-encoder-only": [{"mm_encoder_only": True}],
    "--kv-cache-dtype other than auto, the model's own or fp8": [
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "bfloat16", "dtype": "float16"},
        {"kv_cache_dtype": "float16", "dtype": "bfloat16"},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"kv_cache_dtype": "turboquant_k8v4"},
    ],
    "--kv-cache-dtype other than auto under renumbered positions where a method cuts its cache": [
        {"kv_cache_dtype": "fp8", "additional_config": {"hidrop": CUTS_RENUMBERED}},
    ],
    "--kv-cache-dtype-skip-layers": [{"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["2"]}],
    "a sliding window (set --disable-sliding-window)": [{"hf_overrides": {"text_config": {"sliding_window": 256}}}],
    "--offload-backend prefetch, --offload-group-size": [
        {"offload_group_size": 2},
        {"offload_backend": "prefetch", "offload_group_size": 2},
    ],
    "--cpu-offload-gb": [{"cpu_offload_gb": 1.0}],
    "--runner pooling": [{"runner": "pooling"}, {"convert": "embed"}],
    "--enable-prompt-embeds": [{"enable_prompt_embeds": True}],
    "--long-prefill-token-threshold": [{"long_prefill_token_threshold": 64}],
    "--disable-hybrid-kv-cache-manager": [{"disable_hybrid_kv_cache_manager": True}],
    "--kv-sharing-fast-prefill": [{"kv_sharing_fast_prefill": True}],
    "--scheduler-cls": [{"scheduler_cls": STOCK_SCHEDULER}],
    "--worker-cls": [{"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}],
}
GRAPHS = "--compilation-config.cudagraph_mode other than NONE or, on the V2 model runner, FULL_DECODE_ONLY"
COMPILED = "--compilation-config.mode other than NONE on CUDA"
ONLY_ON_CUDA = {GRAPHS, COMPILED, gate.RECURRENT_ON_V2}


@pytest.mark.parametrize(
    ("named", "settings"), [(named, settings) for named, several in REFUSED.items() for settings in several]
)
def test_a_setting_that_pruning_would_break_is_refused_with_its_reason(
    mistral: Path, settings: dict[str, Any], named: str
) -> None:
    (rule,) = [rule for rule in RULES if rule.setting == named]
    overrides = {"architectures": [ARCHITECTURE]} | settings.get("hf_overrides", {})
    with pytest.raises(ValueError, match=re.escape(f"pruning cannot be combined with {named}: {rule.reason}")):
        configure(mistral, FASTV, **(settings | {"hf_overrides": overrides}))


def test_every_rule_of_the_gate_is_tried() -> None:
    assert {rule.setting for rule in RULES} == set(REFUSED) | ONLY_ON_CUDA


@pytest.mark.parametrize(
    ("is_v2", "graphs", "compiles", "refused"),
    [
        (True, None, None, None),
        (True, CUDAGraphMode.FULL_DECODE_ONLY, CompilationMode.NONE, None),
        (True, CUDAGraphMode.FULL_AND_PIECEWISE, None, GRAPHS),
        (True, CUDAGraphMode.PIECEWISE, None, GRAPHS),
        (True, CUDAGraphMode.FULL, None, GRAPHS),
        (False, CUDAGraphMode.NONE, None, None),
        (False, CUDAGraphMode.FULL_DECODE_ONLY, None, GRAPHS),
        (True, None, CompilationMode.VLLM_COMPILE, COMPILED),
    ],
)
def test_what_only_cuda_has_is_refused_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, is_v2: bool, graphs: Any, compiles: Any, refused: str | None
) -> None:
    config = configure(model, FASTV)
    monkeypatch.setattr(gate, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(type(config), "use_v2_model_runner", is_v2)
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", graphs)
    monkeypatch.setattr(config.compilation_config, "mode", compiles)
    if refused is None:
        gate.check_gate(config)
    else:
        with pytest.raises(ValueError, match=re.escape(refused)):
            gate.check_gate(config)


def test_recurrent_layers_are_refused_on_the_v2_runner(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(model, FASTV)
    monkeypatch.setattr(type(config.model_config), "is_hybrid", True)
    gate.check_gate(config)
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    with pytest.raises(ValueError, match=r"the V2 model runner, with a model .*set VLLM_USE_V2_MODEL_RUNNER=0"):
        gate.check_gate(config)


def test_an_attention_backend_that_nobody_has_read_is_refused_by_name() -> None:
    for name in (*gate.BACKENDS, *gate.STATE_BACKENDS):
        gate.check_attention_backend(name)
    with pytest.raises(ValueError, match=r"TRITON_ATTN.*CPU_ATTN, FLASH_ATTN, FLASHINFER"):
        gate.check_attention_backend("TRITON_ATTN")


def test_every_setting_said_to_work_has_its_test() -> None:
    for checked in gate.CHECKED:
        file, name = checked.test.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), checked.test


def test_a_window_that_is_switched_off_is_not_refused(mistral: Path) -> None:
    overrides = {"architectures": [ARCHITECTURE], "text_config": {"sliding_window": 256}}
    config = configure(mistral, FASTV, hf_overrides=overrides, disable_sliding_window=True, max_model_len=None)
    assert config.model_config.max_model_len == 256


@pytest.mark.parametrize("setting", [{"scheduler_cls": STOCK_SCHEDULER}, {"worker_cls": "a.Worker"}])
def test_a_class_in_the_place_of_ours_is_refused_even_without_pruning(model: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs? (its|their) own"):
        configure(model, {"method": "none"}, **setting)


def test_a_server_that_never_prunes_is_not_restricted(model: Path) -> None:
    assert configure(model, {"method": "none"}, enable_lora=True).lora_config is not None


@pytest.mark.parametrize(
    ("hidrop", "message"),
    [
        ({"method": "slow"}, "unknown pruning method 'slow'; known: none, hidrop"),
        ({"method": "hidrop", "preset": "tok1"}, "no preset 'tok1'; known: tok48"),
        ({"metod": "fastv"}, "metod: .*known keys: method, preset"),
        ({"method": "hidrop", "preset": "tok48"}, "is for 32 layers, the model has 8"),
        ({"method": "pyramiddrop", "options": {"keeps": [0.1, 0.5, 0.2]}}, "keep must not rise"),
        ({"method": "fastv", "options": {"layer": 99}}, "layer 99, the model has 8"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused_in_one_line(model: Path, hidrop: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(model, hidrop)


@pytest.mark.parametrize(("part", "name"), [("vision_config", "pixtral"), ("text_config", "gemma3_text")])
def test_an_unsupported_part_of_a_family_is_refused(model: Path, part: str, name: str) -> None:
    config = AutoConfig.from_pretrained(model)
    family = family_of(ARCHITECTURE)
    family.check(config)
    getattr(config, part).model_type = name
    with pytest.raises(ValueError, match=f"'{name}' cannot run staged; supported: "):
        family.check(config)


@pytest.mark.parametrize("caching", [True, False])
def test_a_step_holds_the_longest_prompt_and_prefix_caching_is_as_chosen(model: Path, caching: bool) -> None:
    config = configure(model, FASTV, max_num_batched_tokens=256, enable_prefix_caching=caching)
    assert config.scheduler_config.max_num_batched_tokens == 1024
    assert config.scheduler_config.max_num_encoder_input_tokens == 1024
    assert config.cache_config.enable_prefix_caching is caching


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "prefix_tokens"),
    [("float32", "auto", 40), ("bfloat16", "auto", 40), ("bfloat16", "bfloat16", 40), ("bfloat16", "fp8", 0)],
)
def test_where_the_cache_rounds_k_a_pruned_prompt_starts_at_its_first_token(
    model: Path, dtype: str, cache_dtype: str, prefix_tokens: int
) -> None:
    planner = Planner.from_vllm_config(configure(model, FASTV, dtype=dtype, kv_cache_dtype=cache_dtype, block_size=32))
    plan = planner.plan(110, [Span(40, 64)], None)
    assert plan.is_pruned
    assert plan.prefix_tokens == prefix_tokens
    assert plan.carried_from == prefix_tokens // 32 * 32


def test_a_start_by_a_method_for_trained_checkpoints_warns_of_others(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        "vllm_hidrop.engine.configure.logger.warning_once", lambda text, *args: told.append(text % args)
    )
    configure(model, FASTV)
    assert not told
    configure(model, {"method": "hidrop", "options": {"scale": True}})
    assert len(told) == 1
    assert told[0].startswith("method 'hidrop' is for checkpoints trained with it")


def test_the_log_says_which_numbers_are_not_the_papers_and_repeats_the_users_note(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("vllm_hidrop.engine.configure.logger.info_once", lambda text, *args: told.append(text % args))
    configure(model, {"method": "visipruner", "options": {"scale": True}, "note": "from my images"})
    assert any("scaled, not tuned: shallow_layers is" in line and "unpublished: cosine" in line for line in told)
    assert "from my images." in told
    told.clear()
    configure(model, FASTV)
    assert not told


def test_memory_for_states_is_as_chosen(model: Path) -> None:
    assert Planner.from_vllm_config(configure(model, FASTV)).state_bytes == 1 << 28
    assert Planner.from_vllm_config(configure(model, FASTV | {"prefix_state_bytes": 7})).state_bytes == 7
    with pytest.raises(ValueError, match=r"prefix_state_bytes: .*greater than or equal to 0"):
        configure(model, FASTV | {"prefix_state_bytes": -1})


def test_another_vllm_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm_version", lambda: "0.33.1")
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.32\.0, found 0\.33\.1"):
        register()


def test_a_version_that_was_read_and_never_run_needs_a_word_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm_version", lambda: "0.33.0")
    with pytest.raises(RuntimeError, match=r"found 0\.33\.0, which is read, not run: HIDROP_ALLOW_UNRUN_VLLM=1 tries"):
        register()
    monkeypatch.setenv("HIDROP_ALLOW_UNRUN_VLLM", "1")
    with pytest.warns(RuntimeWarning, match=r"vLLM 0\.33\.0 is read, not run"):
        register()
    monkeypatch.setattr(compat, "installed_vllm_version", lambda: "0.34.0")
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.32\.0, found 0\.34\.0$"):
        register()


@pytest.mark.parametrize("failing", [set(), {}], ids=["0.32", "0.33"])
def test_a_request_can_be_ended_with_an_error_in_either_version(failing: Any) -> None:
    compat.end_with_error(SimpleNamespace(grammar_compile_error_reqs=failing), "r", "no such method")
    assert set(failing) == {"r"}
    if isinstance(failing, dict):
        assert (failing["r"].code, failing["r"].message) == ("validation_error", "no such method")


def test_registering_first_in_a_fresh_process_and_twice_leaves_vllms_own_specs_known() -> None:
    program = """
from vllm_hidrop.models.families import family_of
from vllm_hidrop.plugin import register
register()
register()
import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm_hidrop.engine.kv_cache import StageManager, StageSpec
spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
assert KVCacheSpecRegistry.get_manager_class(spec) is FullAttentionManager
staged = StageSpec.of(spec, 3)
assert KVCacheSpecRegistry.get_manager_class(staged) is StageManager
assert staged.is_uniform_with_collection({"a": staged}) and not staged.is_uniform_with_collection(
    {"a": staged, "b": StageSpec.of(spec, 4)}
)
from vllm.model_executor.models import ModelRegistry
assert "HidropLlavaForConditionalGeneration" in ModelRegistry.get_supported_archs()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().endswith("fine"), done.stderr[-2000:]
