"""The entry point vLLM loads in every process; the only file that touches vLLM's registries. Imports nothing heavy."""

from typing import Any


def register() -> None:
    """Register KV specs, families and the configuration hook; idempotent. Raises RuntimeError: other vLLM version."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from vllm_hidrop.engine.compat import check_vllm_version, end_with_parent
    from vllm_hidrop.engine.kv_cache import register_stage_spec
    from vllm_hidrop.models.families import FAMILIES

    check_vllm_version()
    end_with_parent()
    register_stage_spec()

    for family in FAMILIES.values():
        if family.staged not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(family.staged, family.path)
        stock = MODELS_CONFIG_MAP.get(family.stock, VerifyAndUpdateConfig)
        MODELS_CONFIG_MAP[family.staged] = _configuring(family, stock)


def _configuring(family: Any, stock: Any) -> Any:
    """The configuration hook of a family: that of vLLM's own architecture, then ours."""

    class HidropModelConfig(stock):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from vllm_hidrop.engine.configure import configure

            stock.verify_and_update_config(vllm_config)
            configure(vllm_config, family)

    return HidropModelConfig
