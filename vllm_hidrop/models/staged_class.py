"""The staged model class of a family: vLLM's class with :class:`StagedVisionLanguageModel` in front of it.

``HidropX`` of this module is made when it is first asked for, of vLLM's class ``X``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import StageMissingLayer

from vllm_hidrop.engine.configure import methods_of, staged_decoder
from vllm_hidrop.models.families import family_of
from vllm_hidrop.models.family import Family
from vllm_hidrop.plan.plan import DENSE
from vllm_hidrop.runners.tower_attention import TowerKernel, has_tower_kernel
from vllm_hidrop.staged.levels import Levels
from vllm_hidrop.staged.merging import Reduced
from vllm_hidrop.staged.model import StagedForward


class StagedVisionLanguageModel(StagedForward):
    """In front of a vLLM model class: decoder layers can also run stage by stage, see ``staged.model.StagedModel``."""

    family: ClassVar[Family]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        parent: Any = super()
        parent.__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config
        text = self.family.text_model(self)
        self.decoder = staged_decoder(vllm_config, text.layers, text.norm, self.family.form(hf_config))
        self.methods = methods_of(vllm_config)
        self.tower_kernel = self._tower_kernel(vllm_config) if self.family.has_tower_kernel else None

    def _tower_kernel(self, vllm_config: VllmConfig) -> TowerKernel | None:
        tower: Any = self.vision_tower  # type: ignore[attr-defined]
        is_loaded = not isinstance(tower, StageMissingLayer)  # a server of text alone loads none
        vision_config, dtype = vllm_config.model_config.hf_config.vision_config, vllm_config.model_config.dtype
        return TowerKernel.of(tower) if is_loaded and has_tower_kernel(vision_config, dtype) else None

    @contextmanager
    def encoding(self, name: str) -> Iterator[list[Reduced | None]]:
        """See ``StagedModel.encoding``."""
        if self.tower_kernel is None or name == DENSE:
            yield []
            return
        with self.tower_kernel.entered():
            yield []

    def levels(self, num_rows: int) -> AbstractContextManager[Levels]:
        """See ``StagedModel.levels``."""
        return self.family.levels(self, num_rows)


def __getattr__(name: str) -> type:
    """The staged class of that name; AttributeError where no family has it."""
    try:
        family = family_of(name)
    except ValueError:
        raise AttributeError(name) from None
    stock = ModelRegistry.models[family.stock].load_model_cls()
    doc = f"vLLM's {stock.__name__}, staged."
    fields = {"family": family, "__module__": __name__, "__doc__": doc}
    globals()[name] = type(name, (StagedVisionLanguageModel, stock), fields)
    made: type = globals()[name]
    return made
