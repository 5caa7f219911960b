"""What a server's KV blocks weigh and its prefills compute, for the reports.

Counts with `vllm_hidrop.costs`, by what the engine says it ran and holds; measures no time.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.utils.math_utils import cdiv

from vllm_hidrop.costs import TextShape, VisionShape, encoder_flops, flops_run
from vllm_hidrop.engine.planner import Planner
from vllm_hidrop.pruning import Plan
from vllm_hidrop.scoring import Signal


@dataclass(frozen=True)
class Costing:
    """The sizes that a server's reports need.

    Attributes:
        planner: the server's schedule and methods.
        text: the text model.
        vision: the tower and projector; None where their form is unknown.
        block_bytes: of one block of the pool, on all ranks: the layers of the widest group, whichever group holds it.
        page_bytes: of one block of every layer, by the tokens in it, on all ranks.
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
            pages[spec.block_size] += spec.page_size_bytes * ranks * len(group.layer_names)
        return cls(
            planner,
            TextShape(**shapes["text"]),
            VisionShape(**shapes["vision"]) if shapes["vision"] else None,
            kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks * ranks,
            pages,
        )

    def kv_bytes(self, num_blocks: int) -> int:
        """Bytes of so many blocks of the pool."""
        return num_blocks * self.block_bytes

    def kv_bytes_dense(self, num_tokens: int) -> int:
        """Bytes that stock vLLM holds for so many tokens: one group of all layers, nothing padded."""
        return sum(page * cdiv(num_tokens, block_size) for block_size, page in self.page_bytes.items())

    def flops(self, plan: Plan, rows: Sequence[int], reused: Sequence[int], images: Collection[int]) -> int:
        """Prefill FLOPs of one request: text model, scoring, LM head; vision tower and projector for ``images``.

        Args:
            plan: the request's plan.
            rows: of every stage, the rows of the whole prompt.
            reused: the first so many of them come from the KV cache.
            images: those that the tower ran for this request.
        """
        signal = self.planner.methods[plan.method].signal or Signal.NONE
        text = flops_run(self.text, self.planner.schedule, plan, signal, rows, reused)
        return text + (encoder_flops(self.vision, plan, images) if self.vision else 0)

    def flops_dense(self, plan: Plan, images: Collection[int]) -> int:
        """The same for the dense model with nothing reused and every one of ``images`` encoded."""
        layers = self.planner.schedule.num_layers * self.text.layer_flops(plan.num_prompt_tokens)
        tower = self.vision.flops() * len(images) if self.vision else 0
        return layers + self.text.lm_head_flops + tower
