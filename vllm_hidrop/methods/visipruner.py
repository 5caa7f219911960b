"""VisiPruner: quiet shallow layers, one cut where vision is first read, an exit where it no longer is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from vllm_hidrop.methods.adaptive import Adaptive, AttentionEdit, Memory, Sight, Verdict
from vllm_hidrop.methods.base import PUBLISHED_FAMILY, PUBLISHED_SIZE, SCALED, ModelShape, check_shape, depth_ratio
from vllm_hidrop.methods.scoring import Contribution, Signals, select_top
from vllm_hidrop.plan.schedule import Cached, Keep, KeepValue, Schedule
from vllm_hidrop.plan.signal import Signal

Part = Literal["shallow", "middle", "deep"]
_SINKS = {"first": Sight.FIRST, "half": Sight.SECOND_HALF}


@dataclass(frozen=True)
class VisiPruner(Adaptive):
    """Edit the shallow layers' attention, find the layer that reads the image, keep what it reads, then leave.

    *Shallow*: in the layers before ``shallow_layers`` text rows see nothing of the images, and in layer 0 only a sink;
    vision rows see no vision in layer 0. *Middle*: from layer ``shallow_layers + 1`` on, c_j is what vision token j
    adds to the last prompt row's attention output o. In the first layer where some cos(o - c_j, o) < ``cosine``, the
    tokens with ||c_j|| > ``norm`` stay, possibly none. *Deep*: after ``exit_count`` later layers in which no token has
    cos(o - c_j, o) < ``exit_cosine``, the rest go. A layer decides for the layers after it; statistics are float32.

    **Source** arXiv 2510.17205 sections 3.3, 3.6, 4.4 and 5.3, equations 6 to 8; layer numbers here are zero-based, as
    in the released code (the paper's are one-based). Thresholds are magnitudes of one model's value space: those for
    LLaVA-1.5-7B are published; the paper reports Qwen2-VL-7B and InternVL2.5-8B too, without their numbers.

    **Differs** every image of a prompt has its own test, cut and exit, its own sink and its own half; the code treats
    all as one. Rows of the shallow edit are not renormalised, as in the code; ``form`` "pre_softmax" renormalises them.
    Vision rows see vision in the layers after the first, as in the code, not in the paper's list. The exit needs
    consecutive layers, as in the paper; the code counts all (``exit_consecutive`` False: then every set and answer is
    the code's on equal float32 weights, while the paper's rule keeps other sets in 12 % of requests at the published
    thresholds). A cut that keeps every token can be left here; in the code the exit then never comes. The preset
    "llava-1.5-13b" has 13B's sink and 7B's thresholds: the authors' scripts name no others, and the thresholds are
    magnitudes of one model's values. Tests are made in float32, the code's in float16.

    **Options** ``parts`` (which of shallow, middle, deep), ``shallow_layers``, ``cosine``, ``norm``, ``exit_cosine``,
    ``exit_count``, ``exit_consecutive``, ``sink`` ("first" token of the image as for 7B, second "half" as for 13B),
    ``form`` ("substitution", "pre_softmax"), ``shape`` and ``scale`` as for HiDrop. Deviations by choice:
    ``test_every`` n-th layer only; ``filter_layer`` fixes the deciding layer, where the ``keep`` (count, fraction or
    share) highest ||c_j|| stay ("calibrated"); ``exit_layer`` fixes the first layer without vision;
    ``drop_shallow_kv`` frees the shallow layers' vision KV after prefill (the paper's claim, section 6, not its code).
    """

    name = "visipruner"
    paper = "arXiv 2510.17205"
    summary = "all, then what the layer that reads the image uses, then nothing"
    signal = Signal.CONTRIBUTION
    layer_options = ("shallow_layers", "filter_layer", "exit_layer")
    tuned_options = ("shallow_layers",)
    elsewhere = f"{SCALED}; thresholds unpublished for all but 7B"
    default_preset = "llava-1.5-7b"
    presets = {  # noqa: RUF012
        "llava-1.5-7b": {},
        "llava-1.5-13b": {"sink": "half", "shape": (40, 576)},
        "embedded": {"shallow_layers": 2, "shape": (12, 576)},
        "embedded-topk": {"shallow_layers": 2, "filter_layer": 5, "keep": 32, "shape": (12, 576)},
    }

    parts: tuple[Part, ...] = ("shallow", "middle", "deep")
    shallow_layers: int = 6
    cosine: float = 0.995
    norm: float = 0.2
    exit_cosine: float = 0.999
    exit_count: int = 2
    exit_consecutive: bool = True
    sink: Literal["first", "half"] = "first"
    form: Literal["substitution", "pre_softmax"] = "substitution"
    test_every: int = 1
    filter_layer: int | None = None
    keep: KeepValue = 16
    exit_layer: int | None = None
    drop_shallow_kv: bool = False
    shape: tuple[int, int] = (32, 576)
    scale: bool = False

    def __post_init__(self) -> None:
        for option in ("cosine", "exit_cosine"):
            if not -1 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} must be in [-1, 1], got {getattr(self, option)}")
        if not self.norm >= 0:
            raise ValueError(f"norm must be >= 0, got {self.norm}")
        if self.exit_layer is not None and "deep" not in self.parts:
            raise ValueError('exit_layer needs "deep" among parts')
        if self.filter_layer is not None and "middle" not in self.parts:
            raise ValueError('filter_layer needs "middle" among parts')
        if self.filter_layer is not None and self.exit_layer is not None and self.exit_layer <= self.filter_layer:
            raise ValueError(f"exit_layer must come after filter_layer, got {self.exit_layer} and {self.filter_layer}")
        check_shape(self.shape)
        for option, least in (("shallow_layers", 0), ("exit_count", 1), ("test_every", 1)):
            if getattr(self, option) < least:
                raise ValueError(f"{option} must be >= {least}, got {getattr(self, option)}")
        Keep.parse(self.keep)

    def unpublished(self, shape: ModelShape) -> Mapping[str, str]:
        """The thresholds that are in use, for all models but LLaVA-1.5-7B."""
        if (shape.size, shape.family) == (PUBLISHED_SIZE, PUBLISHED_FAMILY) or "middle" not in self.parts:
            return {}
        used = ("cosine", "norm") * (self.filter_layer is None) + ("exit_cosine",) * self._tests_exit()
        return dict.fromkeys(used, "LLaVA-1.5-7B")

    def fitted(self, shape: ModelShape) -> "VisiPruner":
        """Layer numbers scaled by depth and rounded."""
        depth = depth_ratio(self.name, self.shape, shape, self.scale)
        if depth == 1:
            return self
        return replace(
            self,
            shallow_layers=round(self.shallow_layers * depth),
            filter_layer=None if self.filter_layer is None else round(self.filter_layer * depth),
            exit_layer=None if self.exit_layer is None else round(self.exit_layer * depth),
            shape=(shape.num_layers, shape.tokens_per_image),
        )

    def schedule(self, shape: ModelShape) -> Schedule:
        """A stage from each layer on where a test may change the count, and one each for a fixed cut and exit."""
        fitted = self.fitted(shape)
        keeps: dict[int, KeepValue] = {0: "all"}
        keeps |= dict.fromkeys(fitted._decided_layers(), "all")
        if fitted.drop_shallow_kv and fitted.shallow_layers:
            keeps[fitted.shallow_layers] = "all"
        if fitted.filter_layer is not None and "middle" in fitted.parts:
            fitted._check_fixed("filter_layer", fitted.filter_layer + 1)
            keeps |= {layer: fitted.keep for layer in (*keeps, fitted.filter_layer + 1) if layer > fitted.filter_layer}
        if fitted.exit_layer is not None:
            fitted._check_fixed("exit_layer", fitted.exit_layer)
            keeps |= {layer: 0 for layer in (*keeps, fitted.exit_layer) if layer >= fitted.exit_layer}
        cached = {0: Cached.NONE} if fitted.drop_shallow_kv and fitted.shallow_layers else {}
        return Schedule.of(keeps, shape.num_layers, cached)

    def _check_fixed(self, option: str, first_layer: int) -> None:
        if not self.shallow_layers < first_layer < self.shape[0]:
            raise ValueError(f"{option} {getattr(self, option)} must leave layers on both sides, past the shallow ones")

    def _decided_layers(self) -> tuple[int, ...]:
        """First layers of the stages on whose entry a test decides; a test in the last layer would change nothing."""
        tests_cut = "middle" in self.parts and self.filter_layer is None
        if not tests_cut and not self._tests_exit():
            return ()
        start = -1 if self.filter_layer is None else self.filter_layer + 1
        end = self.shape[0] if self.exit_layer is None else self.exit_layer
        return tuple(
            layer for layer in range(self.shallow_layers + 2, self.shape[0], self.test_every) if start < layer < end
        )

    def _tests_exit(self) -> bool:
        return "middle" in self.parts and "deep" in self.parts and self.exit_layer is None

    def edit(self, layer: int) -> AttentionEdit | None:
        """In layer 0 text sees only the sinks, vision rows are blind; in other shallow layers text sees no image."""
        if "shallow" not in self.parts or layer >= self.shallow_layers:
            return None
        sees = _SINKS[self.sink] if layer == 0 else Sight.NONE
        return AttentionEdit(sees, vision_is_blind=layer == 0, renormalise=self.form == "pre_softmax")

    def judges(self, layer: int, memory: Memory) -> bool:
        """The middle test until it has cut, then the exit test."""
        if memory is None and self.filter_layer is not None:
            return "middle" in self.parts and layer == self.filter_layer + 1
        return layer in self._decided_layers() and (memory is None or self._tests_exit())

    def judge(self, signals: Signals, memory: Memory) -> Verdict:
        """Before the cut: whether to cut, by the cosine, and what stays, by the norm; after it: whether to exit."""
        norm, cosine = signals.read(Contribution)
        if memory is not None:
            passes = ~(cosine < self.exit_cosine).any()
            return Verdict(~(passes & (memory + 1 >= self.exit_count)).expand(len(norm)), passes)
        if self.filter_layer is not None:
            best = torch.zeros_like(norm, dtype=torch.bool)
            keep = Keep.parse(self.keep).resolve(signals.num_image_tokens)
            best[select_top(norm.nan_to_num(0), min(keep, len(norm)))] = True
            return Verdict(best & ~norm.isnan(), best.new_ones(()))
        triggers = (cosine < self.cosine).any()
        return Verdict((norm > self.norm) | ~triggers, triggers)

    def remember(self, memory: Memory, event: bool) -> Memory:
        """None before the cut; then the number of layers that have passed the exit test, in a row unless all count."""
        if memory is None:
            return 0 if event else None
        if event:
            return memory + 1
        return 0 if self.exit_consecutive else memory
