"""Reference for every method on any Hugging Face vision-language model: dropped rows are not passed on.

A layer is called whole (see ``decoder``) on the rows that it keeps, at the positions they have in the full prompt. For
every generated token the whole sequence is computed again; what was decided for the prompt stays.

Axes: P prompt rows, T rows of one pass (P + tokens generated so far), N rows that one layer runs, V vision tokens of
one span, C hidden size. A span is a range of the prompt, an image or a frame of a video; all in it counts as vision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoProcessor

from vllm_hidrop.verify.reference.attention import Heads, Kept, load_model
from vllm_hidrop.verify.reference.decoder import Decoder, Recorded
from vllm_hidrop.verify.reference.pruning import Pruning, Settings, View, pruning_of

_OF_ROWS = {"input_ids", "attention_mask", "position_ids"}  # what a processor makes of its own token ids

Span = tuple[int, int]
"""First row of the prompt, and the first one behind."""


@dataclass(frozen=True)
class Prepared:
    """A prompt whose placeholders are expanded, and what the model takes beside its ids (pixels, grids)."""

    token_ids: list[int]
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What one request produced; tensors are float32 and on the CPU.

    * ``token_ids``: greedy tokens; ``logits``: [generated, vocabulary], the logits that chose each.
    * ``kept``: per layer and span the vision tokens that the prompt has there, ascending, 0-based in the span.
    * ``selections``: of settings by stages, first layer of a stage -> what each span keeps there, where the rule chose.
    * ``scores``: the same stages -> span -> [V], NaN for tokens that had already gone.
    * ``margins``: how near the nearest decision was to falling otherwise, of VisiPruner and MustDrop.
    """

    token_ids: list[int]
    logits: torch.Tensor
    kept: list[Kept]
    selections: dict[int, Kept]
    scores: dict[int, dict[int, torch.Tensor]]
    margins: dict[str, float]


class Reference:
    """Greedy generation of one request with vision tokens dropped.

    ``model`` is a checkpoint's directory, or a model of ``dtype``, which is put into eval mode, with its ``processor``
    if prompts are made of pictures. Its layers may have any
    form, attend or not (hybrid models), and have features added behind them (deepstack). Scaled embeddings, attention
    that is not causal, and windows shorter than the prompt raise ValueError.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, processor: Any = None) -> None:
        self._model: Any = load_model(model, dtype)
        self._decoder = Decoder(self._model)
        self._accepted = set(signature(type(self._model).forward).parameters)
        self._processor = AutoProcessor.from_pretrained(model) if isinstance(model, str | Path) else processor

    def prompt(
        self, token_ids: Sequence[int], images: Sequence[Any] = (), videos: Sequence[Any] = (), **inputs: Any
    ) -> Prepared:
        """A prompt of expanded ``token_ids`` [P] with pictures, and videos as they are: no frame is left out.

        ``inputs`` are further arguments of the model, which go before those made here.
        """
        made: dict[str, Any] = {}
        if "mm_token_type_ids" in self._accepted:
            made["mm_token_type_ids"] = torch.tensor(self._processor.create_mm_token_type_ids([list(token_ids)]))
        if images:
            made |= self._processor.image_processor(images=list(images), return_tensors="pt")
        if videos:
            made |= self._processor.video_processor(videos=list(videos), do_sample_frames=False, return_tensors="pt")
        return self.prepared(token_ids, made | inputs)

    def prepared(self, token_ids: Sequence[int], inputs: Mapping[str, Any]) -> Prepared:
        """A prompt with what a processor of Hugging Face made; what the model does not take is left out."""
        taken = {name: value for name, value in inputs.items() if name in self._accepted - _OF_ROWS}
        return Prepared(list(token_ids), {name: self._placed(value) for name, value in taken.items()})

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._model.device, self._model.dtype if value.is_floating_point() else value.dtype)

    @torch.no_grad()
    def run(
        self, prepared: Prepared, spans: Sequence[Span], settings: Settings | None = None, num_tokens: int = 1
    ) -> Result:
        """``num_tokens`` greedy tokens under ``settings``; None drops nothing. The prompt must end with text."""
        check_spans(spans, len(prepared.token_ids))
        device = self._model.device
        rows = [torch.arange(first, end, device=device) for first, end in spans]
        pruning = pruning_of(settings, rows, self._decoder.num_layers)
        recorded = self._record(prepared, num_tokens)
        generated: list[int] = []
        logits: list[torch.Tensor] = []
        for _ in range(num_tokens):
            logits.append(_Pass(self._decoder, recorded, pruning, len(prepared.token_ids), generated).logits())
            generated.append(int(logits[-1].argmax()))
        stacked = torch.stack(logits).cpu()
        return Result(generated, stacked, pruning.kept, pruning.selections, pruning.scores, pruning.margins)

    def _record(self, prepared: Prepared, num_tokens: int) -> Recorded:
        """The prompt with fillers for the generated tokens: text like them, so with the same position ids."""
        tokens = [*prepared.token_ids, *prepared.token_ids[-1:] * num_tokens]
        inputs = dict(prepared.inputs)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, num_tokens))  # 0 is text
        return self._decoder.record(tokens, inputs)


class _Pass:
    """One pass of the prompt's P rows and the generated ones through all layers.

    ``_stream`` [T, C] holds every row; those that the current layer does not run are NaN.
    """

    def __init__(
        self, decoder: Decoder, recorded: Recorded, pruning: Pruning, num_prompt: int, generated: list[int]
    ) -> None:
        self._decoder = decoder
        self._recorded = recorded
        self._pruning = pruning
        self._num_prompt = num_prompt
        self._decides = not generated
        self._stream = torch.cat([recorded.rows[:num_prompt], decoder.embedded(generated)])
        self._last_row = torch.empty(0)  # attention [P] of the last layer that ran

    def logits(self) -> torch.Tensor:
        """[vocabulary] of the last row."""
        kept: Kept = [list(range(len(span))) for span in self._pruning.spans]
        for index in range(self._decoder.num_layers):
            before = kept
            view = self._view(before, before)
            kept = self._pruning.kept_in(index, partial(self._attention, index, view))
            self._enter(index, before, kept)
            view = self._view(kept, self._pruning.cached_in(index))
            self._stream[view.rows] = self._run(index, view)
            if index < len(self._recorded.levels):
                prompt = view.rows[: view.num_prompt]
                self._stream[prompt] += self._recorded.levels[index][prompt]
        return self._decoder.logits(self._stream[-1])

    def _view(self, kept: Kept, cached: Kept) -> View:
        """The rows of a layer that runs what is ``kept``, of which generated rows see what is ``cached``."""
        num_rows, device = len(self._stream), self._stream.device
        is_there = torch.ones(num_rows, dtype=torch.bool, device=device)
        is_cached = is_there.clone()
        for span, tokens, seen in zip(self._pruning.spans, kept, cached, strict=True):
            is_there[span], is_cached[span] = False, False
            is_there[span[tokens]], is_cached[span[seen]] = True, True
        rows = is_there.nonzero().flatten()
        places = is_there.cumsum(0) - 1
        spans = [places[span[tokens]] for span, tokens in zip(self._pruning.spans, kept, strict=True)]
        sees = torch.ones(len(rows), len(rows), dtype=torch.bool, device=device).tril()
        num_prompt = int((rows < self._num_prompt).sum())
        sees[num_prompt:] &= is_cached[rows]
        mask = torch.zeros(sees.shape, device=device).masked_fill(~sees, -torch.inf)
        return View(rows, num_prompt, spans, mask)

    def _enter(self, layer: int, before: Kept, kept: Kept) -> None:
        """Drop what ``layer`` does not keep, and put in spans that were not there."""
        injected = self._recorded.injected(layer)
        for span, old, tokens in zip(self._pruning.spans, before, kept, strict=True):
            entering = injected[span] if tokens and not old else self._stream[span]
            self._stream[span] = torch.nan
            self._stream[span[tokens]] = entering[tokens]

    def _run(self, index: int, view: View) -> torch.Tensor:
        def weigh(heads: Heads) -> torch.Tensor:
            weights = self._pruning.weights(index, heads, view)
            if self._decides:
                self._pruning.observe(index, heads, weights, view)
                self._last_row = self._over_prompt(weights, view)
            return weights

        self._last_row = torch.empty(0)
        given = self._recorded.given_to(index, view.rows)
        return self._decoder.run(index, self._stream[view.rows], given, weigh)

    def _attention(self, index: int, view: View, layer: int) -> torch.Tensor:
        """What the last row pays to the P rows in ``layer``, which is ``index`` or the one before it."""
        if layer == index:
            self._run(index, view)
        if not len(self._last_row):
            raise ValueError(f"layer {layer} has no attention to score with")
        return self._last_row

    def _over_prompt(self, weights: torch.Tensor, view: View) -> torch.Tensor:
        scores = torch.full((self._num_prompt,), torch.nan, device=weights.device)
        scores[view.rows] = weights[:, -1].mean(dim=0)
        return scores


def check_spans(spans: Sequence[Span], num_rows: int) -> None:
    """Raise ValueError unless spans are not empty, ascend, and end before the last of ``num_rows`` rows."""
    flat = [row for first, end in spans for row in (first, end)]
    if any(first >= end for first, end in spans) or any(a > b for a, b in pairwise(flat)):
        raise ValueError(f"spans must ascend and hold something, got {list(spans)}")
    if not num_rows or (flat and (flat[0] < 0 or flat[-1] >= num_rows)):
        raise ValueError(f"a prompt of {num_rows} tokens must end with text behind {list(spans)}")
