"""FLOPs as the papers print them: multiply-adds of vision tokens alone, so that their tables can be read beside ours.

``plan.costs`` counts what a request runs; this counts as PyramidDrop, HiDrop (section 4.1) and VisiPruner (appendix M)
do: without text rows, their attention to vision, scoring and the vision tower, a multiply-add once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_hidrop.plan.costs import RequestCosts
from vllm_hidrop.plan.shapes import TextShape

FORMULA = "sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m"
"""n vision tokens of the layer, d hidden size, m size of the MLP, or of the experts that a token runs."""
QUIET = frozenset({"visipruner"})
"""Methods whose paper leaves 2 n^2 d out in the layers before the cut; their released code runs it, as we do."""


@dataclass(frozen=True)
class PaperFlops:
    """A request's FLOPs by :data:`FORMULA`, the dense model's, and how many first layers leave out ``2 n^2 d``."""

    flops: int
    dense_flops: int
    quiet_layers: int
    formula: str = FORMULA


def paper_flops(shape: TextShape, costs: RequestCosts, method: str) -> PaperFlops:
    """What the paper of ``method`` would print for a request; images are counted together."""
    tokens = [stage.vision_tokens for stage in costs.stages for _ in range(stage.num_layers)]
    dense = [stage.dense_vision_tokens for stage in costs.stages for _ in range(stage.num_layers)]
    cut = next((layer for layer, (kept, whole) in enumerate(zip(tokens, dense, strict=True)) if kept < whole), 0)
    quiet = cut if method in QUIET else 0
    sizes = (shape.hidden_size, shape.active_size)
    return PaperFlops(paper_vision_flops(tokens, *sizes, quiet), paper_vision_flops(dense, *sizes), quiet)


def paper_vision_flops(
    vision_tokens_per_layer: Iterable[int], hidden_size: int, intermediate_size: int, quiet_layers: int = 0
) -> int:
    """:data:`FORMULA` over layers, without ``2 n^2 d`` in the first ``quiet_layers``."""
    dim, mlp = hidden_size, intermediate_size
    layers = enumerate(vision_tokens_per_layer)
    return sum(
        4 * n * dim**2 + (2 * n**2 * dim if layer >= quiet_layers else 0) + 3 * n * dim * mlp for layer, n in layers
    )
