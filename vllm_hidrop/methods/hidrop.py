"""HiDrop: late injection, concave pyramid, early exit."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from vllm_hidrop.methods.base import Method, ModelShape, depth_ratio
from vllm_hidrop.methods.scoring import Signals, attention_score
from vllm_hidrop.plan.schedule import KeepValue, Schedule
from vllm_hidrop.plan.signal import Signal

_CONCAVE = {"inject_layer": 9, "exit_layer": 25, "filter_layers": (10, 14, 16, 18)}
_CONCAVE_C1 = {"inject_layer": 9, "exit_layer": 25, "filter_layers": (10, 13, 16, 19)}


@dataclass(frozen=True)
class HiDrop(Method):
    """No vision tokens in the shallow layers, all where fusion begins, few in the middle, none in the deep layers.

    At every filter layer the survivors are scored anew by the head-mean attention of the last prompt row under the
    *next* layer's Q and K, softmax over all current rows in float32; the best ``keep`` stay, in ascending order, with
    the positions of the full prompt. Checkpoints are trained with their schedule on: pair preset and checkpoint.

    **Source** arXiv 2602.23699 sections 3.1 to 3.3; presets from the released scripts. Layer numbers here are the
    paper's one-based ones: ``inject_layer`` 9 is zero-based layer 8, the first with vision; ``filter_layers`` r scores
    after layer r, with zero-based layer r; ``exit_layer`` 25 is zero-based layer 24, the first without.

    **Differs** the paper's text (section 3.3) scores against the vision tokens only; the code, and we, take the softmax
    over the whole row and cut the vision part out of it, which ranks otherwise where heads put weight on text. Exactly
    ``keep`` tokens stay at ties (the code keeps every tied one) and scores are float32. Several images, undefined in
    the paper, keep the counts per image; where images have other numbers of tokens, the same share of them. Against the
    released code on equal float32 weights every set and answer is the same.

    **Options** ``inject_layer`` (one-based, 1 = no late injection), ``filter_layers`` (one-based), ``keeps`` (tokens
    per image after each filter, a count or a fraction), ``exit_layer`` (one-based; None = no early exit), ``shape`` the
    (layers, tokens per image) the numbers are written for, ``scale`` (resize them to the served model, see
    :meth:`scaled`; off: another shape is refused).
    """

    name = "hidrop"
    paper = "arXiv 2602.23699"
    summary = "late injection, concave pyramid, early exit"
    signal = Signal.NEXT_ATTENTION
    needs_training = True
    layer_options = ("inject_layer", "filter_layers", "exit_layer")
    tuned_options = ("inject_layer", "filter_layers", "keeps", "exit_layer")
    elsewhere = "needs a checkpoint trained with it; none is published"
    default_preset = "tok64"
    presets = {  # noqa: RUF012
        "tok48": _CONCAVE | {"keeps": (87, 10, 5, 1)},
        "tok64": _CONCAVE | {"keeps": (215, 10, 5, 1)},
        "tok80": _CONCAVE_C1 | {"keeps": (453, 10, 5, 1)},
        "tok48-c1": _CONCAVE_C1 | {"keeps": (112, 10, 5, 1)},
        "embedded": {
            "inject_layer": 3,
            "filter_layers": (3, 4),
            "keeps": (96, 24),
            "exit_layer": 9,
            "shape": (12, 576),
        },
    }

    inject_layer: int = 9
    filter_layers: tuple[int, ...] = (10, 14, 16, 18)
    keeps: tuple[KeepValue, ...] = (215, 10, 5, 1)
    exit_layer: int | None = 25
    shape: tuple[int, int] = (32, 576)
    scale: bool = False

    def __post_init__(self) -> None:
        if len(self.filter_layers) != len(self.keeps):
            raise ValueError(
                f"filter_layers and keeps must pair up, got {len(self.filter_layers)} and {len(self.keeps)}"
            )
        if self.inject_layer < 1:
            raise ValueError(f"inject_layer is one-based, got {self.inject_layer}")
        firsts = [self.inject_layer - 1, *self.filter_layers]  # zero-based first layers of the stages
        if self.exit_layer is not None:
            firsts.append(self.exit_layer - 1)
        if any(after <= before for before, after in pairwise(firsts)):
            raise ValueError(
                f"inject_layer - 1, filter_layers and exit_layer - 1 (zero-based first layers) must rise, got {firsts}"
            )

    def schedule(self, shape: ModelShape) -> Schedule:
        """The stages as written for ``self.shape``, or scaled to this shape where ``scale`` is set."""
        depth_ratio(self.name, self.shape, shape, self.scale)
        fitted = replace(self, keeps=tuple(map(self._share, self.keeps))) if shape.is_dynamic else self
        if self.scale and shape.size != self.shape:
            fitted = fitted.scaled(shape)
        return fitted._build(shape.num_layers)

    def scaled(self, shape: ModelShape) -> "HiDrop":
        """The method with the same relative depths and shares for another shape.

        Zero-based layers scale by depth and round. A cut that would leave the stage before it without a layer moves to
        the next free layer, and is left out when that reaches the exit. Counts scale by the tokens per image, to at
        least 1.
        """
        depth = shape.num_layers / self.shape[0]
        share = shape.tokens_per_image / self.shape[1]
        inject = round((self.inject_layer - 1) * depth)
        exit_layer = None if self.exit_layer is None else max(round((self.exit_layer - 1) * depth), inject + 1)
        end = shape.num_layers if exit_layer is None else exit_layer
        cuts: dict[int, KeepValue] = {}
        first_free = inject + 1
        for layer, keep in zip(self.filter_layers, self.keeps, strict=True):
            cut = max(round(layer * depth), first_free)
            if cut < end:
                cuts[cut] = max(1, round(keep * share)) if isinstance(keep, int) else keep
                first_free = cut + 1
        return HiDrop(
            inject_layer=inject + 1,
            filter_layers=tuple(cuts),
            keeps=tuple(cuts.values()),
            exit_layer=None if exit_layer is None else exit_layer + 1,
            shape=(shape.num_layers, shape.tokens_per_image),
        )

    def _build(self, num_layers: int) -> Schedule:
        keeps: dict[int, KeepValue] = {0: 0, self.inject_layer - 1: "all"}
        keeps |= dict(zip(self.filter_layers, self.keeps, strict=True))
        if self.exit_layer is not None and self.exit_layer <= num_layers:
            keeps[self.exit_layer - 1] = 0
        return Schedule.of(keeps, num_layers)

    def _share(self, keep: KeepValue) -> KeepValue:
        """A count as a share of the tokens per image for which it is written."""
        return f"{keep}/{self.shape[1]}" if isinstance(keep, int) and 0 < keep <= self.shape[1] else keep

    def score(self, signals: Signals) -> torch.Tensor:
        """The last prompt row's attention under the first layer of the new stage (section 3.3)."""
        return attention_score(signals)
