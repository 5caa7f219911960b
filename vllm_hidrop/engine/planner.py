"""From a request's own wishes and its prompt to its plan; the same function in server, scheduler and worker.

Knows the server's schedule as plain data; not methods.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_hidrop.positions import PositionScheme
from vllm_hidrop.pruning import KeepValue, Plan, Schedule, Span, make_plan
from vllm_hidrop.scoring import Signal

REQUEST_KEYS = {
    "hidrop": 'on (default) or off: "off" keeps every vision token in every layer, equal to stock vLLM',
    "hidrop_keep": 'one keep per stage of the server: "all", a count, or a fraction',
}
"""What a request may say in ``vllm_xargs`` / ``SamplingParams.extra_args``."""


@dataclass(frozen=True)
class Planner:
    """Makes plans for one server.

    Attributes:
        method: name, for reports.
        preset: name, for reports; None when there is none.
        schedule: the server's stages.
        signal: what the method's scorer needs; None when the method cannot score (no selection possible).
        max_prompt_tokens: longest prompt that can be pruned, the step's token budget.
        positions: RoPE ids of every request's rows.
    """

    method: str
    preset: str | None
    schedule: Schedule
    signal: Signal | None
    max_prompt_tokens: int
    positions: PositionScheme

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "Planner":
        """Read what the model's configuration hook resolved at start."""
        resolved = vllm_config.additional_config["hidrop"]["resolved"]
        signal = resolved["signal"]
        limits = vllm_config.scheduler_config
        return cls(
            method=resolved["method"],
            preset=resolved["preset"],
            schedule=Schedule.load(resolved["schedule"]),
            signal=None if signal is None else Signal(signal),
            max_prompt_tokens=limits.max_num_scheduled_tokens or limits.max_num_batched_tokens,
            positions=PositionScheme(resolved["positions"]),
        )

    @property
    def is_staged(self) -> bool:
        """Whether any request can hold fewer tokens in one layer than in another, or have ids that are not vLLM's."""
        stages = self.schedule.stages
        prunes = len(stages) > 1 or not stages[0].keep.is_all
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
            ValueError: unknown key, bad value, keeps that break an invariant or do not fit the stages, prompt
                log-probabilities of a pruned prompt, or a pruned prompt longer than a step; one line.
        """
        wishes = {k: v for k, v in (extra_args or {}).items() if k.startswith("hidrop")}
        for key in wishes:
            if key not in REQUEST_KEYS:
                raise ValueError(f"unknown request option {key!r}; known: {', '.join(REQUEST_KEYS)}")
        mode = wishes.get("hidrop", "on")
        if mode not in ("on", "off"):
            raise ValueError(f'request option "hidrop" must be "on" or "off", got {mode!r}')
        plan = make_plan(self._wished(wishes.get("hidrop_keep"), mode), num_prompt_tokens, spans, mode == "off")
        self._check_selections(plan)
        if wants_prompt_logprobs and plan.is_pruned:
            raise ValueError(
                "prompt_logprobs and echo need every prompt row, and pruning drops some: "
                'send vllm_xargs {"hidrop": "off"} with this request'
            )
        if plan.is_pruned and num_prompt_tokens > self.max_prompt_tokens:
            raise ValueError(
                f"a pruned prompt is prefilled in one step: {num_prompt_tokens} tokens exceed "
                f"--max-num-batched-tokens {self.max_prompt_tokens}"
            )
        return plan

    def plan_or_refuse(self, request: Any) -> tuple[Plan, str | None]:
        """Plan vLLM's request, the same in scheduler and worker; a refused one runs dense until it is ended.

        Returns:
            The plan, and why the request is refused (None when it is not).
        """
        params = request.sampling_params
        spans = spans_of(request.mm_features)
        num_prompt_tokens = request.num_prompt_tokens
        try:
            extra_args = params.extra_args if params else None
            wants_prompt_logprobs = params is not None and params.prompt_logprobs is not None
            return self.plan(num_prompt_tokens, spans, extra_args, wants_prompt_logprobs), None
        except ValueError as error:
            return make_plan(self.schedule, num_prompt_tokens, spans, keep_all=True), str(error)

    def _wished(self, keeps: Sequence[KeepValue] | None, mode: str) -> Schedule:
        if keeps is None:
            return self.schedule
        if mode == "off":
            raise ValueError('"hidrop": "off" keeps everything: do not send "hidrop_keep" with it')
        if isinstance(keeps, str) or not isinstance(keeps, Sequence):
            raise ValueError(f'request option "hidrop_keep" must be a list, got {keeps!r}')
        try:
            return self.schedule.with_keeps(keeps)
        except ValueError as error:
            raise ValueError(f'request option "hidrop_keep": {error}') from None

    def _check_selections(self, plan: Plan) -> None:
        for image, span in enumerate(plan.spans):
            before = span.length
            for stage, kept in enumerate(plan.kept):
                now = kept[image]
                if 0 < now < before and self.signal is None:
                    raise ValueError(f"method {self.method!r} cannot choose tokens: keep must be all or 0")
                if 0 < now < before and stage == 0 and self.signal is Signal.PREVIOUS_ATTENTION:
                    raise ValueError(f"method {self.method!r} ranks by the layer before: stage 0 must keep all or 0")
                before = now or before


def spans_of(mm_features: Iterable[Any]) -> tuple[Span, ...]:
    """The images' spans, from vLLM's ``MultiModalFeatureSpec`` list of a request, in prompt order."""
    places = (feature.mm_position for feature in mm_features)
    return tuple(sorted((Span(p.offset, p.length) for p in places), key=lambda span: span.offset))
