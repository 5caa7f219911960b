"""The ``hidrop`` object of a response: what the engine ran and held for one request, read from the engine."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, Self

from pydantic import TypeAdapter
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_hidrop.plan.costs import dense_encoder_flops, encoder_flops, flops_run
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.shapes import TextShape
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.plan.vision import VisionShape
from vllm_hidrop.staged.explain import Patches, every_patch

EMBEDDINGS = "image_embeds"
"""vLLM's key for image features that a client sends instead of an image."""


@dataclass(frozen=True)
class Costing:
    """The sizes that a server's reports need.

    Attributes:
        vision: the tower and projector; None where their form is unknown.
        block_bytes: bytes of one block of the pool, on all ranks: as many layers as the widest group has.
        page_bytes: by block size, bytes of one block of all layers with attention together, on all ranks.
    """

    planner: Planner
    text: TextShape
    vision: VisionShape | None
    block_bytes: int
    page_bytes: Mapping[int, int]

    @classmethod
    def of(cls, planner: Planner, vllm_config: Any, kv_cache_config: Any) -> Self:
        """Read what the model's configuration hook resolved, and the pool as vLLM made it."""
        shapes = vllm_config.additional_config["hidrop"]["resolved"]["shapes"]
        ranks = vllm_config.parallel_config.tensor_parallel_size
        pages: Counter[int] = Counter()
        for group in kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            if isinstance(spec, MambaSpec):
                continue
            pages[spec.block_size] += spec.page_size_bytes * ranks * len(group.layer_names)
        return cls(
            planner,
            TypeAdapter(TextShape).validate_python(shapes["text"]),
            TypeAdapter(VisionShape | None).validate_python(shapes["vision"]),
            kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks * ranks,
            pages,
        )

    def kv_bytes(self, num_blocks: int) -> int:
        """Bytes of ``num_blocks`` blocks of the pool."""
        return num_blocks * self.block_bytes

    def kv_bytes_dense(self, num_tokens: int) -> int:
        """Bytes that stock vLLM holds for ``num_tokens`` tokens: one group of all layers, nothing padded."""
        return sum(page * cdiv(num_tokens, block_size) for block_size, page in self.page_bytes.items())

    def flops(
        self, plan: Plan, rows: Sequence[int], reused: Sequence[int], images: Collection[int], tiles: Mapping[int, int]
    ) -> int:
        """Prefill FLOPs of one request: text model, scoring, LM head; vision tower and projector for ``images``.

        ``rows[s]`` are the whole prompt's rows in stage ``s``; the first ``reused[s]`` come from the KV cache;
        ``tiles`` as :func:`num_tiles` has them.
        """
        signal = self.planner.methods[plan.method].signal or Signal.NONE
        text = flops_run(self.text, self.planner.schedule, plan, signal, rows, reused)
        return text + (encoder_flops(self.vision, plan, images, tiles) if self.vision else 0)

    def flops_dense(self, plan: Plan, images: Collection[int], tiles: Mapping[int, int]) -> int:
        """Prefill FLOPs of the dense model, with nothing reused and all ``images`` encoded."""
        layers = self.text.layers_flops(plan.num_prompt_tokens, range(self.planner.schedule.num_layers))
        tower = dense_encoder_flops(self.vision, plan, images, tiles) if self.vision else 0
        return layers + self.text.lm_head_flops + tower


@dataclass(frozen=True)
class Run:
    """What the engine did for one request.

    Attributes:
        rows: per stage, the whole prompt's rows, as the worker reported; None when the prompt ran dense.
        reused: prompt tokens that came from the prefix cache.
        images: images that the vision tower ran for this request; the others were cached, or not needed.
        patches: vision tokens that every stage ran; None unless the request asks and its pruned prompt has run.
    """

    rows: tuple[int, ...] | None
    reused: int = 0
    images: frozenset[int] = frozenset()
    patches: Patches | None = None


def what_ran(costing: Costing, plan: Plan, run: Run, request: Any) -> dict[str, Any]:
    """The part of a report that no longer changes once the prompt has run, as JSON values.

    ``layer_tokens`` are rows summed over layers; ``request`` is vLLM's.
    """
    planner, reused = costing.planner, run.reused
    schedule = planner.schedule
    tiles = num_tiles(request.mm_features)
    rows = run.rows or (plan.num_prompt_tokens,) * len(schedule.stages)
    num_text_tokens = plan.num_prompt_tokens - plan.num_vision_tokens
    held = [plan.stage_tokens(i, reused) for i in range(len(rows))]
    cached = plan.after_prefill(schedule).kept
    ends = schedule.end_layers
    stages: list[dict[str, Any]] = [
        {
            "first_layer": stage.first_layer,
            "end_layer": ends[i],
            "kept": rows[i] - num_text_tokens,
            "rows": rows[i],
            "reused": held[i],
            "cached": sum(cached[i]),
        }
        for i, stage in enumerate(schedule.stages)
    ]
    patches = every_patch(plan) if plan.explains and not plan.is_pruned else run.patches
    if patches is not None:
        for stage, of_stage in zip(stages, patches, strict=True):
            stage["patches"] = of_stage
    return {
        "method": plan.method,
        "preset": planner.preset if plan.method == planner.method else None,
        "mode": _mode(plan),
        "fallback": plan.fallback,
        "prompt_tokens": plan.num_prompt_tokens,
        "vision_tokens": plan.num_vision_tokens,
        "reused_tokens": reused,
        "stages": stages,
        **_cut_and_exit(stages, plan.num_vision_tokens),
        "encoded_images": len(run.images),
        "prefill_flops": costing.flops(plan, rows, held, run.images, tiles),
        "prefill_flops_dense": costing.flops_dense(plan, tower_images(request), tiles),
        "layer_tokens": sum((stage["rows"] - stage["reused"]) * _num_layers(stage) for stage in stages),
        "layer_tokens_dense": plan.num_prompt_tokens * schedule.num_layers,
    }


def with_blocks(report: dict[str, Any], costing: Costing, managers: Sequence[Any], request: Any) -> dict[str, Any]:
    """A copy of the report of what ran, with the blocks of the shared pool that vLLM's ``request`` holds now.

    Called for the last time just before the blocks are freed; ``managers`` are vLLM's, one per KV group. Blocks that
    hold states of recurrent layers, however many tokens have entered them, are booked apart.
    """
    num_tokens = request.num_computed_tokens
    blocks = [0] * len(report["stages"])
    num_states = 0
    attending = []
    for manager in managers:
        held = len(manager.req_to_blocks.get(request.request_id, ()))
        if isinstance(manager.kv_cache_spec, MambaSpec):
            num_states += held
            continue
        attending.append(manager)
        blocks[getattr(manager.kv_cache_spec, "stage", 0)] += held
    num_blocks = sum(blocks)
    return report | {
        "stages": [{**stage, "kv_blocks": count} for stage, count in zip(report["stages"], blocks, strict=True)],
        "kv_blocks": num_blocks,
        "kv_blocks_dense": sum(cdiv(num_tokens, manager.block_size) for manager in attending),
        "kv_bytes": costing.kv_bytes(num_blocks),
        "kv_bytes_dense": costing.kv_bytes_dense(num_tokens),
        "state_bytes": costing.kv_bytes(num_states),
    }


def _num_layers(stage: dict[str, Any]) -> int:
    return int(stage["end_layer"] - stage["first_layer"])


def _cut_and_exit(stages: Sequence[dict[str, Any]], num_vision_tokens: int) -> dict[str, int | None]:
    """After injection, the first layer that runs fewer vision tokens than the prompt has, and the first without any."""
    kept_from = [(stage["first_layer"], stage["kept"]) for stage in stages]
    since_injection = list(dropwhile(lambda stage: not stage[1], kept_from))
    cut = (layer for layer, kept in since_injection if kept < num_vision_tokens)
    exits = (layer for layer, kept in since_injection if not kept)
    return {"cut_layer": next(cut, None), "exit_layer": next(exits, None)}


def tower_images(request: Any) -> frozenset[int]:
    """Indices of the images of vLLM's request that the tower encodes: not those that a client sent as features."""
    return frozenset(i for i, feature in enumerate(request.mm_features) if EMBEDDINGS not in (feature.data or ()))


def num_tiles(mm_features: Sequence[Any]) -> dict[int, int]:
    """By index, the tiles that the tower runs of each image that was cut into some, with those that pad a batch."""
    pixels = {i: (feature.data or {}).get("pixel_values") for i, feature in enumerate(mm_features)}
    return {i: len(each.data) for i, each in pixels.items() if each and getattr(each.data, "ndim", None) == 4}


def _mode(plan: Plan) -> str:
    if plan.fallback:
        return "fallback"
    if not plan.spans:
        return "text"
    return "pruned" if plan.is_pruned else "off"
