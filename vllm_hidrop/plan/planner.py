"""From a request's own wishes and its prompt to its plan; the same function in server, scheduler and worker."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_hidrop.plan.names import nearest, unknown
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import DENSE, Plan, make_plan
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import KeepValue, Schedule
from vllm_hidrop.plan.signal import Signal, Under

REQUEST_KEYS = {
    "hidrop": 'on (default) or off: "off" keeps every vision token in every layer, equal to stock vLLM',
    "hidrop_keep": 'one keep per stage of the server: "all", a count, a fraction, or a share such as "10/576"',
    "hidrop_method": "another method whose cuts fall on the server's stages, at its default preset",
    "hidrop_explain": "true: the report lists the tokens that every stage kept, by image and frame, and their grids",
}
"""The options of a request, in ``vllm_xargs`` or ``SamplingParams.extra_args``, and what each means."""


@dataclass(frozen=True)
class Alternative:
    """A method that requests of a server may use.

    Attributes:
        schedule: the method's keeps over the server's stages.
        signal: what its scorer looks at; None when the method has no scorer, so that keeps must be all or 0.
        adaptive: whether the method decides the counts while a prompt runs; its keeps are then upper bounds.
        encoding: of its pruned requests' images, see ``Plan``.
    """

    schedule: Schedule
    signal: Signal | None
    adaptive: bool
    encoding: str = DENSE

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> "Alternative":
        """Read what :meth:`dump` wrote."""
        signal = data["signal"]
        signal = None if signal is None else Signal[signal]
        return cls(Schedule.load(data["schedule"]), signal, data["adaptive"], data["encoding"])

    def dump(self) -> dict[str, Any]:
        """The fields as JSON values, which vLLM's configuration carries from process to process."""
        signal = None if self.signal is None else self.signal.name
        schedule = self.schedule.dump()
        return {"schedule": schedule, "signal": signal, "adaptive": self.adaptive, "encoding": self.encoding}


@dataclass(frozen=True)
class Planner:
    """Makes plans for one server.

    Attributes:
        method: name of the server's own method, ``preset`` that of its preset.
        methods: by name, the server's own method and those that fit its stages.
        max_prompt_tokens: tokens that one step holds, so the longest prompt part that runs in one step.
        cache_is_exact: whether K is read from the KV cache as it was computed.
        block_size: slots of a KV block.
        state_bytes: upper bound of the worker's carried hidden states, see ``engine.image_prefix``.
        frame_tokens: vision tokens of a video's frame; None where they follow from the prompt or the video's grid.
        num_levels: decoder layers behind which a later tower layer's features are added (deepstack).
        attention_layers: the layers with attention where the others are recurrent; None: all.
    """

    method: str
    preset: str | None
    methods: Mapping[str, Alternative]
    max_prompt_tokens: int
    positions: PositionScheme
    cache_is_exact: bool = True
    block_size: int = 1
    state_bytes: int = 0
    frame_tokens: int | None = None
    num_levels: int = 0
    attention_layers: tuple[int, ...] | None = None

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "Planner":
        """Read what the model's configuration hook resolved at start."""
        resolved = vllm_config.additional_config["hidrop"]["resolved"]
        limits = vllm_config.scheduler_config
        attention_layers = resolved["model_shape"]["attention_layers"]
        return cls(
            method=resolved["method"],
            preset=resolved["preset"],
            methods={name: Alternative.load(data) for name, data in resolved["methods"].items()},
            max_prompt_tokens=limits.max_num_scheduled_tokens or limits.max_num_batched_tokens,
            positions=PositionScheme(resolved["positions"]),
            cache_is_exact=_cache_is_exact(vllm_config),
            block_size=vllm_config.cache_config.block_size,
            state_bytes=vllm_config.additional_config["hidrop"]["prefix_state_bytes"],
            frame_tokens=resolved["frame_tokens"],
            num_levels=resolved["num_levels"],
            attention_layers=None if attention_layers is None else tuple(attention_layers),
        )

    @property
    def schedule(self) -> Schedule:
        """The server's stages."""
        return self.methods[self.method].schedule

    @property
    def is_staged(self) -> bool:
        """Whether any request can hold fewer tokens in one layer than in another, or have ids that are not vLLM's."""
        stages = self.schedule.stages
        prunes = len(stages) > 1 or not stages[0].keep.is_all or self.methods[self.method].adaptive
        return prunes or self.positions is PositionScheme.GROUPED

    def plan(
        self,
        num_prompt_tokens: int,
        spans: Sequence[Span],
        extra_args: Mapping[str, Any] | None,
        wants_prompt_logprobs: bool = False,
    ) -> Plan:
        """Plan one request.

        Args:
            num_prompt_tokens: length of the full prompt, vision tokens included.
            spans: where the images stand.
            extra_args: the request's extra arguments; keys that do not start with "hidrop" are not ours.
            wants_prompt_logprobs: whether the request asks for log-probabilities of its prompt.

        Raises:
            ValueError: says in one line what is wrong: unknown key, bad value, keeps that break an invariant or do not
                fit the stages, log-probabilities of a pruned prompt, a pruned prompt longer than a step.
        """
        wishes = {k: v for k, v in (extra_args or {}).items() if k.startswith("hidrop")}
        for key in wishes:
            if key not in REQUEST_KEYS:
                raise ValueError(unknown("unknown request option", key, REQUEST_KEYS))
        mode = wishes.get("hidrop", "on")
        if mode not in ("on", "off"):
            raise ValueError(f'request option "hidrop" must be "on" or "off", got {mode!r}')
        name, method = self._wished_method(wishes)
        keeps = wishes.get("hidrop_keep")
        schedule = self._wished_keeps(keeps, mode, name, method)
        plan = make_plan(schedule, num_prompt_tokens, spans, mode == "off", method.adaptive)
        plan = replace(plan, method=name)
        prefix = self._prefix_tokens(plan)
        plan = replace(
            plan,
            prefix_tokens=prefix,
            carried_from=prefix // self.block_size * self.block_size,
            explains=_wished_explanation(wishes),
            encoding=method.encoding if plan.is_pruned else DENSE,
            renumbered=self.positions is PositionScheme.RENUMBERED,
        )
        self._check_selections(plan, method)
        if wants_prompt_logprobs and plan.is_pruned:
            raise ValueError(
                "prompt_logprobs and echo need every prompt row, and pruning drops some: "
                'send vllm_xargs {"hidrop": "off"} with this request'
            )
        num_step_tokens = num_prompt_tokens - plan.prefix_tokens
        if plan.is_pruned and num_step_tokens > self.max_prompt_tokens:
            raise ValueError(
                f"a pruned prompt is prefilled in one step from its first image on: {num_step_tokens} tokens exceed "
                f"--max-num-batched-tokens {self.max_prompt_tokens}"
            )
        return plan

    def _prefix_tokens(self, plan: Plan) -> int:
        """The text before the first image, or 0 where it must run in one step with the rest of the prompt.

        Scoring reads the prefix's K from the cache, which must be exact; an adaptive method needs the prefix's rows as
        well; under renumbered positions the prefix's K depends on the images behind it.
        """
        may_run_first = self.cache_is_exact and self.positions is not PositionScheme.RENUMBERED
        may_run_first = may_run_first and not plan.adaptive and not self._needs_every_row(plan)
        return plan.spans[0].offset if plan.is_pruned and may_run_first else 0

    def _needs_every_row(self, plan: Plan) -> bool:
        signal = self.methods[plan.method].signal
        return signal is not None and signal.needs_every_row

    def reuse_off(self, plan: Plan) -> str | None:
        """Why this prompt's images can neither be reused by a later prompt nor come from an earlier one, or None."""
        if not plan.is_pruned:
            return None
        if plan.adaptive:
            return "adaptive"
        if self._needs_every_row(plan):
            return "signal"
        if not self.cache_is_exact:
            return "cache_dtype"
        if plan.first_cut == 0:
            return "first_layer"
        return "states" if plan.first_cut < len(plan.kept) and not self.state_bytes else None

    def plan_or_refuse(
        self, num_prompt_tokens: int, mm_features: Iterable[Any], params: Any
    ) -> tuple[Plan, str | None]:
        """The plan of vLLM's request, and why it is refused or None; a refused one runs dense until vLLM ends it.

        Args:
            num_prompt_tokens: length of the full prompt, vision tokens included.
            mm_features: its ``MultiModalFeatureSpec`` list.
            params: its sampling parameters; None where it has none.
        """
        spans = self.spans(mm_features)
        try:
            extra_args = params.extra_args if params else None
            wants_prompt_logprobs = params is not None and params.prompt_logprobs is not None
            return self.plan(num_prompt_tokens, spans, extra_args, wants_prompt_logprobs), None
        except ValueError as error:
            plan = make_plan(self.schedule, num_prompt_tokens, spans, keep_all=True)
            return replace(plan, method=self.method), str(error)

    def spans(self, mm_features: Iterable[Any]) -> tuple[Span, ...]:
        """The spans of the images and frames in vLLM's ``MultiModalFeatureSpec`` list of a request, in prompt order."""
        ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        return tuple(span for item, each in enumerate(ordered) for span in spans_of(each, item, self.frame_tokens))

    def _wished_method(self, wishes: Mapping[str, Any]) -> tuple[str, Alternative]:
        name = wishes.get("hidrop_method", self.method)
        if not isinstance(name, str) or name not in self.methods:
            raise ValueError(
                f"this server cannot run {name!r}: its cuts do not fall on the stages of {self.method!r}, or it is "
                f"unknown; requests may use {', '.join(self.methods)}{nearest(name, self.methods)}"
            )
        return name, self.methods[name]

    def _wished_keeps(self, keeps: Sequence[KeepValue] | None, mode: str, name: str, method: Alternative) -> Schedule:
        if keeps is None:
            return method.schedule
        if method.adaptive:
            raise ValueError(f'method {name!r} decides itself how many tokens stay: do not send "hidrop_keep"')
        if mode == "off":
            raise ValueError('"hidrop": "off" keeps everything: do not send "hidrop_keep" with it')
        if isinstance(keeps, str) or not isinstance(keeps, Sequence):
            raise ValueError(f'request option "hidrop_keep" must be a list, got {keeps!r}')
        try:
            return method.schedule.with_keeps(keeps)
        except ValueError as error:
            raise ValueError(f'request option "hidrop_keep": {error}') from None

    def _check_selections(self, plan: Plan, method: Alternative) -> None:
        for image, span in enumerate(plan.spans):
            before = span.length
            for stage, kept in enumerate(plan.kept):
                now = kept[image]
                if 0 < now < before:
                    if method.signal is None:
                        raise ValueError(f"method {plan.method!r} cannot choose tokens: keep must be all or 0")
                    if stage == 0 and method.signal.under is Under.LAST_LAYER:
                        rule = "ranks by the layer before: stage 0 must keep all or 0"
                        raise ValueError(f"method {plan.method!r} {rule}")
                    self._check_scored(plan, stage, method.signal)
                before = now or before

    def _check_scored(self, plan: Plan, stage: int, signal: Signal) -> None:
        """Refuse to choose tokens on entry to a stage whose scores would need attention of a layer that has none."""
        first_layers = [each.first_layer for each in self.schedule.stages]
        usable = [i for i, each in enumerate(first_layers) if signal.under.can_score(each, self.attention_layers)]
        if stage not in usable:
            layer = signal.under.layer(first_layers[stage])
            raise ValueError(
                f"method {plan.method!r} scores on entry to stage {stage} under layer {layer}, which has no attention "
                f"in this model: keep all, 0 or as many as before there; stages that can choose: "
                f"{', '.join(map(str, usable)) or 'none'}"
            )


def _wished_explanation(wishes: Mapping[str, Any]) -> bool:
    # A JSON true in vllm_xargs arrives as 1: the type that vLLM's routes declare for it has no booleans.
    wish = wishes.get("hidrop_explain", False)
    if not isinstance(wish, int) or wish not in (0, 1):
        raise ValueError(f'request option "hidrop_explain" must be true or false, got {wish!r}')
    return bool(wish)


def _cache_is_exact(vllm_config: Any) -> bool:
    dtype = vllm_config.cache_config.cache_dtype
    return dtype == "auto" or dtype == str(vllm_config.model_config.dtype).removeprefix("torch.")


def spans_of(feature: Any, item: int, frame_tokens: int | None) -> list[Span]:
    """The spans of one of vLLM's ``MultiModalFeatureSpec``, the prompt's image or video number ``item``.

    An image is one span, from its first embedding to its last: row breaks and the text between tiles stay with it. A
    video has a span per frame, and the timestamps between frames are text; frames without text between them have
    ``frame_tokens`` each, or equal parts by the video's grid.
    """
    runs = [(start, end + 1) for start, end in feature.mm_position.extract_embeds_range()]
    if feature.modality != "video":
        length = runs[-1][1] - runs[0][0]
        return [Span(runs[0][0], length, item, length - sum(end - start for start, end in runs))]
    if len(runs) == 1:
        runs = _frames(*runs[0], feature.data, frame_tokens)
    return [Span(start, end - start, item) for start, end in runs]


def _frames(start: int, end: int, data: Any, frame_tokens: int | None) -> list[tuple[int, int]]:
    """A video's run of embeddings cut into frames; what is left over, a newline, goes to the last one."""
    if frame_tokens is not None:
        num_frames = max(1, (end - start) // frame_tokens)
    else:
        grid = data["video_grid_thw"].data if data and "video_grid_thw" in data else (1,)
        num_frames = int(grid[0])
    size = (end - start) // num_frames
    starts = [start + size * frame for frame in range(num_frames)]
    return list(zip(starts, [*starts[1:], end], strict=True))
