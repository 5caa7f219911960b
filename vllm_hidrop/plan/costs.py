"""What a schedule costs on paper: rows, KV blocks and prefill FLOPs of one request, stage by stage.

Arithmetic on shapes only; knows no vLLM and measures nothing. The numbers are intent, to compare
schedules before anything runs; what a server reports is read from the engine.

A multiply-add counts as 2 FLOPs. Norms, activations, RoPE, softmax and sampling are left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Signal


@dataclass(frozen=True)
class TextShape:
    """The text model's sizes: a Llama-like decoder with gated MLP and grouped-query attention.

    ``head_size`` is in elements, ``kv_bytes_per_element`` in bytes (2 for float16 and bfloat16).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    kv_bytes_per_element: int = 2

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one row's K and V in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.kv_bytes_per_element

    @property
    def qkv_flops_per_row(self) -> int:
        """FLOPs of one row's Q, K and V projections in one layer: ``2 C (H + 2 G) D``."""
        heads = self.num_heads + 2 * self.num_kv_heads
        return 2 * self.hidden_size * heads * self.head_size

    def layer_flops(self, rows: int) -> int:
        """FLOPs of one decoder layer that prefills ``rows`` rows.

        ``T (2 C (H + 2 G) D + 2 H D C + 6 C M) + 4 H D T (T + 1) / 2`` with T rows, C hidden size,
        H query heads, G key/value heads, D head size and M the MLP's size: 2 per weight and row for
        Q, K, V, output and the three MLP matrices; then, causally, ``Q K^T`` and the sum over V.
        """
        width = self.num_heads * self.head_size
        output_and_mlp = 2 * width * self.hidden_size + 6 * self.hidden_size * self.intermediate_size
        attention = 2 * width * rows * (rows + 1)
        return rows * (self.qkv_flops_per_row + output_and_mlp) + attention

    @property
    def lm_head_flops(self) -> int:
        """FLOPs of the one row whose logits prefill needs: ``2 C vocabulary``."""
        return 2 * self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """Weights of all matrices that a decode step reads, LM head included; each costs a row 2 FLOPs."""
        width = self.num_heads * self.head_size
        per_layer = self.qkv_flops_per_row // 2 + self.hidden_size * (width + 3 * self.intermediate_size)
        return self.num_layers * per_layer + self.hidden_size * self.vocab_size


LLAVA_7B = TextShape(32, 4096, 11008, 32, 32, 128, 32064)
"""LLaVA-1.5-7B's language model, Vicuna-7B."""
LLAVA_13B = TextShape(40, 5120, 13824, 40, 40, 128, 32064)
"""LLaVA-1.5-13B's language model, Vicuna-13B."""


@dataclass(frozen=True)
class VisionShape:
    """A ViT as in CLIP or SigLIP, and LLaVA's two-layer projector behind it.

    ``num_layers`` counts the layers that run (LLaVA reads the last but one, so the last never does).
    ``num_tokens`` are the tower's rows, a class token included; ``num_patches`` of them are
    projected from ``projector_input_size`` to ``text_hidden_size``.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    patch_size: int
    num_patches: int
    num_tokens: int
    projector_input_size: int
    text_hidden_size: int
    num_channels: int = 3

    def flops(self, tokens_left: int | None = None) -> int:
        """FLOPs of one image: ``2 P c p^2 C``, ``L (T (8 C^2 + 4 C M) + 4 C T^2)``, projector.

        P patches of side p and c channels, T rows, L layers, C hidden size, M MLP size; attention
        is bidirectional. The projector is ``2 P (C_in C_text + C_text^2)``.

        Args:
            tokens_left: of the image's patches, those that the layers after the first and the projector still run.
        """
        left = self.num_patches if tokens_left is None else tokens_left
        later = left + self.num_tokens - self.num_patches
        patches = 2 * self.num_patches * self.num_channels * self.patch_size**2 * self.hidden_size
        layers = self._layer_flops(self.num_tokens) + (self.num_layers - 1) * self._layer_flops(later)
        into, out = self.projector_input_size, self.text_hidden_size
        return patches + layers + 2 * left * (into * out + out**2)

    def _layer_flops(self, rows: int) -> int:
        hidden = self.hidden_size
        return rows * (8 * hidden**2 + 4 * hidden * self.intermediate_size) + 4 * hidden * rows**2


LLAVA_7B_VISION = VisionShape(23, 1024, 4096, 14, 576, 577, 1024, 4096)
"""CLIP ViT-L/14 at 336 pixels up to its last but one layer, projected to 4096."""
LLAVA_13B_VISION = VisionShape(23, 1024, 4096, 14, 576, 577, 1024, 5120)
"""The same, projected to 5120."""


def group_size(schedule: Schedule) -> int:
    """Layers of one of vLLM's KV-cache groups when every stage has its own groups.

    The smallest stage's number of layers, or the largest's if that is under 1.5 times as many: the
    rule of vLLM 0.32, ``kv_cache_utils.py``.
    """
    sizes = [schedule.layers_in(stage) for stage in range(len(schedule.stages))]
    return max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)


def num_groups(schedule: Schedule, stage: int) -> int:
    """Groups that the stage's layers fill; the last layers of a group may be padding."""
    return _ceil_div(schedule.layers_in(stage), group_size(schedule))


@dataclass(frozen=True)
class StageCosts:
    """One request in one stage, beside the dense model in the same layers.

    Attributes:
        first_layer: zero-based, inclusive.
        end_layer: exclusive.
        vision_tokens: vision tokens kept, all images together.
        rows: text and kept vision tokens; every layer runs and caches so many.
        layer_blocks: blocks of one layer's K and V each, over the stage's layers.
        kv_blocks: vLLM's blocks; each holds ``block_size`` tokens of ``group_size`` layers.
        dense_kv_blocks: the same stages with everything kept (``off`` on the same server).
        kv_bytes: bytes of ``kv_blocks``, padding layers included.
        dense_kv_bytes: what stock vLLM holds for these layers, in one group without padding.
        kv_token_bytes: bytes of the cached rows alone, without the unused ends of blocks.
        dense_kv_token_bytes: the same with everything kept.
        flops: prefill of the layers, and the scoring at the cut before them.
    """

    first_layer: int
    end_layer: int
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
        """The same with everything kept."""
        return sum(stage.dense_kv_blocks for stage in self.stages)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the blocks held after prefill."""
        return sum(stage.kv_bytes for stage in self.stages)

    @property
    def dense_kv_bytes(self) -> int:
        """The same for stock vLLM."""
        return sum(stage.dense_kv_bytes for stage in self.stages)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the cached rows alone: the least any block size could hold."""
        return sum(stage.kv_token_bytes for stage in self.stages)

    @property
    def dense_kv_token_bytes(self) -> int:
        """The same with everything kept."""
        return sum(stage.dense_kv_token_bytes for stage in self.stages)

    @property
    def flops(self) -> int:
        """Prefill FLOPs of the text model, LM head included."""
        return sum(stage.flops for stage in self.stages) + self.lm_head_flops

    @property
    def dense_flops(self) -> int:
        """The same for the dense model."""
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
        """The same with the vision tower and projector, which run in full unless the method merges tokens there."""
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
) -> RequestCosts:
    """Cost one request's prefill and the KV cache it holds afterwards.

    Args:
        shape: the text model.
        schedule: its stages.
        plan: the request's tokens in every stage of ``schedule``; where a method decides them, the decided ones.
        signal: what the method reads at a cut.
        block_size: tokens of a KV block.
        vision: the tower and projector, run once per image; None if unknown.

    Raises:
        ValueError: schedule and shape disagree on the number of layers, or block_size is under 1.
    """
    if schedule.num_layers != shape.num_layers:
        raise ValueError(f"the schedule has {schedule.num_layers} layers, the model {shape.num_layers}")
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    stages = range(len(schedule.stages))
    return RequestCosts(
        tuple(_stage_costs(shape, schedule, plan, signal, block_size, stage) for stage in stages),
        group_size(schedule),
        shape.lm_head_flops,
        None if vision is None else encoder_flops(vision, plan, range(len(plan.spans))),
        None if vision is None else vision.flops() * len(plan.spans),
    )


def flops_run(
    shape: TextShape, schedule: Schedule, plan: Plan, signal: Signal, rows: Sequence[int], reused: Sequence[int]
) -> int:
    """Prefill FLOPs of the text model for one request, LM head included.

    Args:
        shape: the text model.
        schedule: its stages.
        plan: the request's tokens in every stage; where a method decides them, the decided ones.
        signal: what the method reads at a cut.
        rows: of every stage, the rows of the whole prompt.
        reused: the first so many of them come from the KV cache; the others attend to them.
    """
    layers = sum(
        schedule.layers_in(stage) * (shape.layer_flops(rows[stage]) - shape.layer_flops(reused[stage]))
        for stage in range(len(schedule.stages))
    )
    cuts = sum(_cut_flops(shape, plan, signal, stage) for stage in range(len(schedule.stages)))
    return layers + cuts + shape.lm_head_flops


def encoder_flops(vision: VisionShape, plan: Plan, images: Iterable[int]) -> int:
    """FLOPs of the vision tower and projector for those images of a request that they run."""
    left = tokens_left(plan, vision)
    return sum(vision.flops(left[image]) for image in images)


def ideal_decode_ratio(shape: TextShape, costs: RequestCosts, batch: int, bytes_per_weight: int = 2) -> float:
    """Dense over staged bytes that a decode step of ``batch`` such requests reads: weights once, rows of each."""
    weights = shape.num_weights * bytes_per_weight
    return (weights + batch * costs.dense_kv_token_bytes) / (weights + batch * costs.kv_token_bytes)


def tokens_left(plan: Plan, vision: VisionShape) -> list[int | None]:
    """Per image, the tokens that the tower's later layers run: all, unless a method merged some there."""
    if not plan.adaptive:
        return [None] * len(plan.spans)
    return [vision.num_patches * kept // span.length for kept, span in zip(plan.kept[0], plan.spans, strict=True)]


def _stage_costs(
    shape: TextShape, schedule: Schedule, plan: Plan, signal: Signal, block_size: int, stage: int
) -> StageCosts:
    layers = schedule.layers_in(stage)
    rows, dense_rows = plan.num_prompt_tokens - plan.dropped[stage], plan.num_prompt_tokens
    cached = plan.num_prompt_tokens - plan.after_prefill(schedule).dropped[stage]
    blocks, dense_blocks = _ceil_div(cached, block_size), _ceil_div(dense_rows, block_size)
    groups = num_groups(schedule, stage)
    layer_block_bytes = block_size * shape.kv_bytes_per_row
    return StageCosts(
        first_layer=schedule.stages[stage].first_layer,
        end_layer=schedule.end_layers[stage],
        vision_tokens=sum(plan.kept[stage]),
        dense_vision_tokens=plan.num_vision_tokens,
        rows=rows,
        dense_rows=dense_rows,
        layer_blocks=layers * blocks,
        dense_layer_blocks=layers * dense_blocks,
        kv_blocks=groups * blocks,
        dense_kv_blocks=groups * dense_blocks,
        kv_bytes=groups * blocks * group_size(schedule) * layer_block_bytes,
        dense_kv_bytes=layers * dense_blocks * layer_block_bytes,
        kv_token_bytes=layers * cached * shape.kv_bytes_per_row,
        dense_kv_token_bytes=layers * dense_rows * shape.kv_bytes_per_row,
        flops=layers * shape.layer_flops(rows) + _cut_flops(shape, plan, signal, stage),
        dense_flops=layers * shape.layer_flops(dense_rows),
    )


def _cut_flops(shape: TextShape, plan: Plan, signal: Signal, stage: int) -> int:
    """FLOPs of scoring at the cut before ``stage``; 0 where nothing has to be chosen.

    The one query row meets every row's K: ``2 H D T``. Under the next layer's Q and K, that layer's
    Q, K and V are projected for the rows before the cut, of which its own costs hold the kept ones. What an adaptive
    method reads: the same row with K and twice with V, or all text rows with K.
    """
    if stage == 0 or signal is Signal.NONE:
        return 0
    rows_before = plan.num_prompt_tokens - plan.dropped[stage - 1]
    width = shape.num_heads * shape.head_size
    if plan.adaptive:  # judged on entry to every stage, whether it changes or not
        rows = 3 if signal is Signal.CONTRIBUTION else plan.num_prompt_tokens - plan.num_vision_tokens
        return 2 * width * rows * rows_before if sum(plan.kept[stage - 1]) else 0
    images = zip(plan.kept[stage - 1], plan.kept[stage], strict=True)
    if not any(0 < now < before for before, now in images):
        return 0
    flops = 2 * width * rows_before
    if signal is Signal.NEXT_ATTENTION:
        rows_gone = plan.dropped[stage] - plan.dropped[stage - 1]
        flops += shape.qkv_flops_per_row * rows_gone
    return flops


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
