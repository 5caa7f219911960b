"""What a schedule costs on paper: rows, KV blocks and prefill FLOPs of one request, stage by stage.

The numbers compare schedules before anything runs; what a server reports is read from the engine. FLOPs are counted as
in ``plan.shapes``.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.shapes import TextShape
from vllm_hidrop.plan.signal import Signal, Under
from vllm_hidrop.plan.vision import VisionShape

NO_TILES: Mapping[int, int] = MappingProxyType({})


def group_size(schedule: Schedule, recurrent_layers: Collection[int] = ()) -> int:
    """Layers of one of vLLM's KV cache groups, all of one size, when every stage has its own groups.

    The smallest stage's number of layers, or the largest's if that is under 1.5 times as many, as in vLLM 0.32's
    ``kv_cache_utils.py``. Recurrent layers belong to no stage there, and together count as one.
    """
    stages = range(len(schedule.stages))
    sizes = [layers_with_keys(schedule, stage, recurrent_layers) for stage in stages] + [len(recurrent_layers)]
    sizes = [size for size in sizes if size]
    return max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)


def num_groups(schedule: Schedule, stage: int, recurrent_layers: Collection[int] = ()) -> int:
    """Groups that the stage's layers fill; the last layers of a group may be padding."""
    held = layers_with_keys(schedule, stage, recurrent_layers)
    return _ceil_div(held, group_size(schedule, recurrent_layers))


def layers_with_keys(schedule: Schedule, stage: int, recurrent_layers: Collection[int]) -> int:
    """Layers of a stage that hold K and V."""
    return sum(layer not in recurrent_layers for layer in schedule.layer_ranges[stage])


@dataclass(frozen=True)
class StageCosts:
    """One request in one stage; ``dense_`` fields are the dense model's in the same layers.

    Attributes:
        kept: vision tokens of every image or frame.
        vision_tokens: all of them together.
        rows: text and kept vision tokens that every layer of the stage runs.
        layer_blocks: blocks that hold one layer's K and V each, summed over the stage's layers.
        kv_blocks: vLLM's blocks after prefill; each holds ``block_size`` tokens of ``group_size`` layers.
        dense_kv_blocks: those of an ``off`` request on the same server.
        kv_bytes: bytes of ``kv_blocks``, padding layers included.
        dense_kv_bytes: bytes that stock vLLM holds for these layers, in one group without padding.
        kv_token_bytes: bytes of the cached rows alone, without the unused ends of blocks.
        flops: of the prefill in these layers, and of scoring at the cut before them.
    """

    first_layer: int
    end_layer: int
    kept: tuple[int, ...]
    vision_tokens: int
    dense_vision_tokens: int
    rows: int
    dense_rows: int
    layer_blocks: int
    dense_layer_blocks: int
    kv_blocks: int
    dense_kv_blocks: int
    kv_bytes: int
    dense_kv_bytes: int
    kv_token_bytes: int
    dense_kv_token_bytes: int
    flops: int
    dense_flops: int

    @property
    def num_layers(self) -> int:
        """Layers of the stage."""
        return self.end_layer - self.first_layer


@dataclass(frozen=True)
class RequestCosts:
    """One request's costs; the encoder's FLOPs are None where the vision tower's shape is unknown."""

    stages: tuple[StageCosts, ...]
    group_size: int
    lm_head_flops: int
    encoder_flops: int | None
    dense_encoder_flops: int | None

    @property
    def num_layers(self) -> int:
        """Layers of the text model."""
        return self.stages[-1].end_layer

    @property
    def kv_blocks(self) -> int:
        """Blocks of vLLM held after prefill."""
        return sum(stage.kv_blocks for stage in self.stages)

    @property
    def dense_kv_blocks(self) -> int:
        """Blocks that an ``off`` request holds on the same server."""
        return sum(stage.dense_kv_blocks for stage in self.stages)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the blocks held after prefill."""
        return sum(stage.kv_bytes for stage in self.stages)

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes of the blocks that stock vLLM holds."""
        return sum(stage.dense_kv_bytes for stage in self.stages)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the cached rows alone: the least any block size could hold."""
        return sum(stage.kv_token_bytes for stage in self.stages)

    @property
    def dense_kv_token_bytes(self) -> int:
        """Bytes of the dense model's cached rows."""
        return sum(stage.dense_kv_token_bytes for stage in self.stages)

    @property
    def flops(self) -> int:
        """Prefill FLOPs of the text model, LM head included."""
        return sum(stage.flops for stage in self.stages) + self.lm_head_flops

    @property
    def dense_flops(self) -> int:
        """Prefill FLOPs of the dense text model, LM head included."""
        return sum(stage.dense_flops for stage in self.stages) + self.lm_head_flops

    @property
    def vision_token_layers(self) -> int:
        """Vision tokens, summed over layers."""
        return sum(stage.vision_tokens * stage.num_layers for stage in self.stages)

    @property
    def row_layers(self) -> int:
        """Rows, summed over layers."""
        return sum(stage.rows * stage.num_layers for stage in self.stages)

    @property
    def ideal_speedup(self) -> float:
        """Dense over staged FLOPs of the text model: the bound where compute is all that counts."""
        return self.dense_flops / self.flops

    @property
    def ideal_speedup_with_encoder(self) -> float | None:
        """``ideal_speedup`` of text model, vision tower and projector together; None where the tower is unknown."""
        if self.encoder_flops is None or self.dense_encoder_flops is None:
            return None
        return (self.dense_flops + self.dense_encoder_flops) / (self.flops + self.encoder_flops)


def request_costs(
    shape: TextShape,
    schedule: Schedule,
    plan: Plan,
    signal: Signal,
    block_size: int,
    vision: VisionShape | None = None,
    num_tiles: Mapping[int, int] = NO_TILES,
) -> RequestCosts:
    """Cost one request's prefill and the KV cache it holds afterwards.

    ``plan`` is over the stages of ``schedule``, with an adaptive method's decided counts; ``signal`` is what the method
    looks at; a KV block has ``block_size`` tokens; ``vision`` is run once per image or video, ``num_tiles`` as in
    :func:`encoder_flops`. ValueError where schedule and shape disagree on the number of layers, or block_size is under
    1.
    """
    if schedule.num_layers != shape.num_layers:
        raise ValueError(f"the schedule has {schedule.num_layers} layers, the model {shape.num_layers}")
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    stages = range(len(schedule.stages))
    items = {span.item for span in plan.spans}
    return RequestCosts(
        tuple(_stage_costs(shape, schedule, plan, signal, block_size, stage) for stage in stages),
        group_size(schedule, shape.recurrent_layers),
        shape.lm_head_flops,
        None if vision is None else encoder_flops(vision, plan, items, num_tiles),
        None if vision is None else dense_encoder_flops(vision, plan, items, num_tiles),
    )


def flops_run(
    shape: TextShape, schedule: Schedule, plan: Plan, signal: Signal, rows: Sequence[int], reused: Sequence[int]
) -> int:
    """Prefill FLOPs of the text model for one request, LM head included.

    ``rows[s]`` are the rows of the whole prompt in stage ``s``; the first ``reused[s]`` of them come from the KV cache,
    where the others attend to them. The other arguments are those of :func:`request_costs`.
    """
    layers = sum(
        shape.layers_flops(rows[stage], layers) - shape.layers_flops(reused[stage], layers)
        for stage, layers in enumerate(schedule.layer_ranges)
    )
    cuts = sum(_cut_flops(shape, plan, signal, stage) for stage in range(len(schedule.stages)))
    return layers + cuts + shape.lm_head_flops


def encoder_flops(
    vision: VisionShape, plan: Plan, items: Iterable[int], num_tiles: Mapping[int, int] = NO_TILES
) -> int:
    """FLOPs of the vision tower and projector on these images and videos of a request.

    ``items`` are indices, as in ``Span.item``; ``num_tiles`` by index are known tiles, see ``VisionShape.views``.
    """
    total = 0
    for item in items:
        frames = [index for index, span in enumerate(plan.spans) if span.item == item]
        views = vision.views([plan.spans[frame] for frame in frames], num_tiles.get(item))
        total += vision.flops(views, _patches_left(plan, frames, views))
    return total


def dense_encoder_flops(
    vision: VisionShape, plan: Plan, items: Iterable[int], num_tiles: Mapping[int, int] = NO_TILES
) -> int:
    """As :func:`encoder_flops`, with no patch merged."""
    return encoder_flops(vision, replace(plan, adaptive=False), items, num_tiles)


def ideal_decode_ratio(shape: TextShape, costs: RequestCosts, batch: int, bytes_per_weight: int = 2) -> float:
    """Bytes read by a decode step of ``batch`` such requests, dense over staged: the weights once, each one's rows.

    States of recurrent layers are read, whatever is pruned.
    """
    fixed = shape.weights_read(batch) * bytes_per_weight + batch * shape.state_bytes
    return (fixed + batch * costs.dense_kv_token_bytes) / (fixed + batch * costs.kv_token_bytes)


def _patches_left(plan: Plan, frames: Sequence[int], views: Sequence[int]) -> int | None:
    """Patches that the tower's later layers run, by the merging that the plan shows; None: all."""
    if not plan.adaptive or len(views) > 1:  # only a tower of one view merges
        return None
    (frame,) = frames
    return views[0] * plan.kept[0][frame] // plan.spans[frame].length


def _stage_costs(
    shape: TextShape, schedule: Schedule, plan: Plan, signal: Signal, block_size: int, stage: int
) -> StageCosts:
    of_stage = schedule.layer_ranges[stage]
    layers = layers_with_keys(schedule, stage, shape.recurrent_layers)
    rows, dense_rows = plan.num_prompt_tokens - plan.dropped[stage], plan.num_prompt_tokens
    cached = plan.num_prompt_tokens - plan.after_prefill(schedule).dropped[stage]
    blocks, dense_blocks = _ceil_div(cached, block_size), _ceil_div(dense_rows, block_size)
    groups, size = num_groups(schedule, stage, shape.recurrent_layers), group_size(schedule, shape.recurrent_layers)
    layer_block_bytes = block_size * shape.kv_bytes_per_row
    return StageCosts(
        first_layer=schedule.stages[stage].first_layer,
        end_layer=schedule.end_layers[stage],
        kept=plan.kept[stage],
        vision_tokens=sum(plan.kept[stage]),
        dense_vision_tokens=plan.num_vision_tokens,
        rows=rows,
        dense_rows=dense_rows,
        layer_blocks=layers * blocks,
        dense_layer_blocks=layers * dense_blocks,
        kv_blocks=groups * blocks,
        dense_kv_blocks=groups * dense_blocks,
        kv_bytes=groups * blocks * size * layer_block_bytes,
        dense_kv_bytes=layers * dense_blocks * layer_block_bytes,
        kv_token_bytes=layers * cached * shape.kv_bytes_per_row,
        dense_kv_token_bytes=layers * dense_rows * shape.kv_bytes_per_row,
        flops=shape.layers_flops(rows, of_stage) + _cut_flops(shape, plan, signal, stage),
        dense_flops=shape.layers_flops(dense_rows, of_stage),
    )


def _cut_flops(shape: TextShape, plan: Plan, signal: Signal, stage: int) -> int:
    """FLOPs of scoring at the cut before ``stage``; 0 where nothing has to be chosen.

    Every row of attention that the signal costs meets all T rows before the cut: ``2 H D T``. A signal under the next
    layer also projects the dropped rows' Q, K and V there; those of the kept rows are among that layer's own costs.
    """
    if stage == 0 or signal is Signal.NONE:
        return 0
    rows_before = plan.num_prompt_tokens - plan.dropped[stage - 1]
    width = shape.num_heads * shape.head_size
    flops = 2 * width * signal.attention_rows(plan) * rows_before
    if plan.adaptive:  # judged on entry to every stage, whether a count changes or not
        return flops if sum(plan.kept[stage - 1]) else 0
    images = zip(plan.kept[stage - 1], plan.kept[stage], strict=True)
    if not any(0 < now < before for before, now in images):
        return 0
    if signal.under is Under.NEXT_LAYER:
        flops += shape.qkv_flops_per_row * (plan.dropped[stage] - plan.dropped[stage - 1])
    return flops


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
