"""Start-up: what is refused and how, what is set, and that registering is safe in any process and twice."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs

from tests.engine.harness import ARCHITECTURE
from tests.tiny_models import make_llava
from vllm_hidrop.engine import compat
from vllm_hidrop.engine.gate import RULES
from vllm_hidrop.models.families import family_of
from vllm_hidrop.plugin import register

pytestmark = pytest.mark.engine

FASTV = {"method": "fastv"}


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


REFUSED = [
    ({"tensor_parallel_size": 2}, "tensor-parallel-size"),
    ({"pipeline_parallel_size": 2}, "pipeline-parallel-size"),
    ({"enable_lora": True}, "enable-lora"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}, "speculative"),
    ({"kv_cache_dtype": "int8_per_token_head"}, "kv-cache-dtype"),
    ({"enable_prompt_embeds": True}, "enable-prompt-embeds"),
    ({"long_prefill_token_threshold": 64}, "long-prefill-token-threshold"),
    ({"disable_hybrid_kv_cache_manager": True}, "disable-hybrid-kv-cache-manager"),
    ({"kv_sharing_fast_prefill": True}, "kv-sharing-fast-prefill"),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED)
def test_a_setting_that_pruning_would_break_is_refused_with_its_reason(
    model: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"pruning cannot be combined with .*{named}.*: ") as refused:
        configure(model, FASTV, **settings)
    assert any(rule.reason in str(refused.value) for rule in RULES)


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


def test_another_vllm_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm_version", lambda: "0.33.1")
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.32\.0, found 0\.33\.1"):
        register()


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
