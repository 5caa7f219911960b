"""The KV caches of all stages on a worker: specs, reading cached keys, cutting caches; no runner's type is used."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec

from vllm_hidrop.engine.kv_cache import StageSpec
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.runners.cache_moves import SlotLayout, slots_that_stay
from vllm_hidrop.runners.requests import WorkerRecord
from vllm_hidrop.staged.loop import Decoder
from vllm_hidrop.staged.position_ids import turned

BlockIds = Callable[[int, int], torch.Tensor]
"""(KV group, place in the batch) -> that request's block ids in the group, int32 [B], on the device."""


def stage_specs(specs: Mapping[str, KVCacheSpec], schedule: Schedule) -> dict[str, KVCacheSpec]:
    """Give vLLM's specs, by layer name, their layers' stages.

    A recurrent layer needs none: its state is one block, whatever rows enter it, so layers of several stages may share
    a block table. ValueError where a layer has neither a state nor full attention.
    """
    staged: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        if type(spec) is FullAttentionSpec:
            staged[name] = StageSpec.of(spec, schedule.stage_of_layer(extract_layer_index(name)))
        elif type(spec) is MambaSpec:
            staged[name] = spec
        else:
            raise ValueError(f"staged layers need full attention, {name} has {type(spec).__name__}")
    return staged


def layers_by_stage(group: Any, schedule: Schedule) -> dict[int, list[str]]:
    """The layer names of one of vLLM's KV cache groups by their stage; only recurrent layers are of several."""
    by_stage: dict[int, list[str]] = {}
    for name in group.layer_names:
        by_stage.setdefault(schedule.stage_of_layer(extract_layer_index(name)), []).append(name)
    return by_stage


class StageCaches:
    """Reads and cuts the caches of the requests in a step.

    Attributes:
        groups: vLLM's KV cache groups.
        attentions: the attention modules by layer name.
        layouts: how pages store slots, by (page shape, dtype, kind of attention).
    """

    def __init__(
        self, decoder: Decoder, groups: Sequence[Any], attentions: Mapping[str, Any], block_ids: BlockIds
    ) -> None:
        self.decoder = decoder
        self.groups = groups
        self.attentions = attentions
        self.block_ids = block_ids
        self.group_of_layer = {name: index for index, group in enumerate(groups) for name in group.layer_names}
        self.layouts: dict[Any, SlotLayout] = {}

    def _layout(self, attention: Any) -> SlotLayout:
        """The layer's slot layout, learnt once for all layers whose pages are alike."""
        key = attention.kv_cache.shape[1:], attention.kv_cache.dtype, type(attention.impl)
        if key not in self.layouts:
            self.layouts[key] = SlotLayout.of(attention)
        return self.layouts[key]

    def read_keys(self, index: int, attention: Any, num_slots: int) -> torch.Tensor:
        """See ``step.ReadKeys``; for the request at ``index`` in the batch."""
        block_ids = self.block_ids(self.group_of_layer[attention.layer_name], index)
        return self._layout(attention).read_keys(attention.kv_cache, block_ids, num_slots)

    def close_up(self, index: int, record: WorkerRecord) -> None:
        """Where a stage's cache is cut after the prompt, move the K and V that stay to the request's first slots.

        A row that has entered a recurrent state cannot be taken out of it.
        """
        assert record.survivors is not None
        for group_index, group in enumerate(self.groups):
            if not isinstance(group.kv_cache_spec, StageSpec):
                continue
            stage = group.kv_cache_spec.stage
            num_cut = record.cached.dropped[stage] - record.plan.dropped[stage]
            if not num_cut:
                continue
            stay = slots_that_stay(record.plan, record.survivors, stage, self.decoder.schedule.stages[stage].cached)
            block_ids = self.block_ids(group_index, index)
            source = async_tensor_h2d(stay, device=block_ids.device)
            for name in group.layer_names:
                attention = self.attentions[name]
                layout = self._layout(attention)
                layout.close_up(attention.kv_cache, block_ids, source)
                if record.plan.renumbered:
                    # A generated token's id counts from the cut cache, but it is stored as the full sequence's: to
                    # keep their distance, the keys' ids rise by as many tokens as the cut removes.
                    layer: Any = self.decoder.layers[extract_layer_index(name)]
                    turn = turned(layer.self_attn.rotary_emb, num_cut)
                    layout.change_keys(attention.kv_cache, block_ids, len(stay), turn)
