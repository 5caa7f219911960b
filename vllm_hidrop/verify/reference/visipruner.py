"""VisiPruner: per-image cuts and exits that the data decide, and edited weights before.

Statistics follow their definitions on explicit vectors: c_j = concat over heads of a_{h,j} v_{h,j}, for the last prompt
row; a closed form beside an attention kernel cannot share a mistake with them.

Axes: T rows of one pass, V vision tokens of one image, H query heads,
D head size, L layers; E = H * D.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vllm_hidrop.verify.reference.attention import Heads, Kept, attention_weights, top_indices

Sink = Literal["first", "half"]
Form = Literal["substitution", "pre_softmax"]
STAGES = ("shallow", "middle", "deep")


@dataclass(frozen=True)
class VisiPrunerSettings:
    """One configuration; layers are zero-based, defaults those of the official code.

    * ``shallow_layers``: M. Layers [0, M) are edited, layer M is plain, the first tested layer is M + 1.
    * ``cosine``, ``norm``: the middle test (any token below: cut), and what stays (above) at the cut.
    * ``exit_cosine``, ``exit_count``: a layer passes if no kept token is below; so many passes end vision.
      ``exit_consecutive``: a failing layer sets the count to 0 (the paper), else never (the code).
    * ``stages``: a subset of shallow, middle, deep. Without middle there is neither cut nor exit.
    * ``sink``: what text rows of layer 0 still see: each image merged onto its first token, or its second half.
    * ``form``: weights are edited after softmax, or the same columns are masked before it.
    * ``test_every``: tested are the layers M + 1, M + 1 + n, ..., at most L - 2 (the last layer has no next).
    * ``drop_shallow_kv``: generated tokens see no vision in layers [0, M).
    * ``filter_layer``, ``keep``: the cut is made after exactly this layer, untested, and the ``keep`` tokens of each
      image with the highest norm stay.
    * ``exit_layer``: instead of the exit test, the first layer of which no image has any token, cut before or not.
    """

    shallow_layers: int
    cosine: float = 0.995
    norm: float = 0.2
    exit_cosine: float = 0.999
    exit_count: int = 2
    exit_consecutive: bool = True
    stages: tuple[str, ...] = STAGES
    sink: Sink = "first"
    form: Form = "substitution"
    test_every: int = 1
    drop_shallow_kv: bool = False
    filter_layer: int | None = None
    keep: int = 16
    exit_layer: int | None = None


def contributions(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[N, E]: what N tokens add to one row, from its weights [H, N] on them and their values [H, N, D]."""
    return (weights[:, :, None] * value).transpose(0, 1).flatten(1)


def cosines(output: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[N]: cosine of output [E] without each of the vectors [N, E] to the output; float64, NaN for a zero vector."""
    output, vectors = output.double(), vectors.double()
    without = output - vectors
    return (without @ output) / (without.norm(dim=1) * output.norm())


def merge_onto_first(weights: torch.Tensor, text: torch.Tensor, image_rows: list[torch.Tensor]) -> torch.Tensor:
    """Weights [H, T, T]: the rows ``text`` [T] (bool) pay to an image's first column what they paid to all of it."""
    merged = weights.clone()
    for rows in image_rows:
        merged[:, text, int(rows[0])] = weights[:, text][:, :, rows].sum(dim=-1)
    return merged


def hidden_columns(layer: int, text: torch.Tensor, image_rows: list[torch.Tensor], sink: Sink) -> torch.Tensor:
    """[T, T]: True where a shallow layer takes a column from a row; ``text`` [T] marks the text rows of the prompt."""
    vision = torch.zeros_like(text)
    from_text = torch.zeros_like(text)
    for rows in image_rows:
        vision[rows] = True
        if layer > 0:
            from_text[rows] = True
        else:
            from_text[rows[1:] if sink == "first" else rows[: len(rows) // 2]] = True
    hidden = text[:, None] & from_text
    return hidden | (vision[:, None] & vision) if layer == 0 else hidden


def softmax_of(heads: Heads, mask: torch.Tensor) -> torch.Tensor:
    """Weights [H, T, T] under an additive mask [T, T]; a row that sees nothing has only zeros."""
    return attention_weights(heads.query, heads.key, mask).masked_fill(mask == -torch.inf, 0.0)


def check_settings(settings: VisiPrunerSettings, num_layers: int) -> None:
    """Raise ValueError for settings without a meaning in a model of ``num_layers``."""
    first_tested = settings.shallow_layers + 1
    if settings.sink not in get_args(Sink) or settings.form not in get_args(Form):
        raise ValueError(f"unknown sink {settings.sink!r} or form {settings.form!r}")
    if not set(settings.stages) <= set(STAGES) or len(set(settings.stages)) != len(settings.stages):
        raise ValueError(f"stages must be some of {STAGES}, got {settings.stages}")
    if not 0 <= settings.shallow_layers <= num_layers:
        raise ValueError(f"shallow_layers must be in [0, {num_layers}], got {settings.shallow_layers}")
    if settings.exit_count < 1 or settings.test_every < 1 or settings.keep < 0:
        raise ValueError("exit_count and test_every must be at least 1, keep at least 0")
    if settings.filter_layer is not None and not first_tested <= settings.filter_layer <= num_layers - 2:
        raise ValueError(f"filter_layer must be in [{first_tested}, {num_layers - 2}], got {settings.filter_layer}")
    if settings.exit_layer is not None and not first_tested <= settings.exit_layer < num_layers:
        raise ValueError(f"exit_layer must be in [{first_tested}, {num_layers - 1}], got {settings.exit_layer}")


class Decisions:
    """What each image keeps in each layer: decided in the prompt pass layer by layer; later passes replay it."""

    def __init__(self, settings: VisiPrunerSettings, image_sizes: list[int], num_layers: int) -> None:
        self._settings = settings
        self._last_tested = num_layers - 2
        self._current: Kept = [list(range(size)) for size in image_sizes]
        self._passes = [0] * len(image_sizes)
        self.kept: list[Kept] = []
        self.cut_layers: list[int | None] = [None] * len(image_sizes)
        self.exit_layers: list[int | None] = [None] * len(image_sizes)
        self.margins = dict.fromkeys(("cosine", "norm", "exit"), torch.inf)

    def kept_in(self, layer: int) -> Kept:
        """What ``layer`` sees; in the prompt pass to be asked for layer after layer, before ``observe``."""
        if layer == len(self.kept):
            if layer == self._settings.exit_layer and {"middle", "deep"} <= set(self._settings.stages):
                for image, tokens in enumerate(self._current):
                    if tokens:
                        self._exit(image, layer)
            self.kept.append(list(self._current))
        return self.kept[layer]

    def observe(self, layer: int, output: torch.Tensor, vectors: list[torch.Tensor]) -> None:
        """Decide after ``layer`` of the prompt pass, for each image alone.

        ``output`` [E] is what attention gave the last row, ``vectors`` hold c_j [V, E] of each image.
        """
        if "middle" not in self._settings.stages:
            return
        for image, tokens in enumerate(self._current):
            if not tokens:
                continue
            image_vectors = vectors[image][tokens]
            if self.cut_layers[image] is not None:
                self._count_pass(image, layer, output, image_vectors)
            elif self._is_cut(layer, output, image_vectors):
                self._current[image] = self._stay(image_vectors.double().norm(dim=1))
                self.cut_layers[image] = layer + 1

    def _is_tested(self, layer: int) -> bool:
        from_first = layer - self._settings.shallow_layers - 1
        return from_first >= 0 and from_first % self._settings.test_every == 0 and layer <= self._last_tested

    def _is_cut(self, layer: int, output: torch.Tensor, vectors: torch.Tensor) -> bool:
        if self._settings.filter_layer is not None:
            return layer == self._settings.filter_layer
        return self._is_tested(layer) and self._any_below("cosine", cosines(output, vectors), self._settings.cosine)

    def _stay(self, norms: torch.Tensor) -> list[int]:
        """The tokens that stay, of an image whose ``norms`` [V] are the lengths of its c_j; never one with NaN."""
        if self._settings.filter_layer is None:
            self._note("norm", norms - self._settings.norm)
            return (norms > self._settings.norm).nonzero().flatten().tolist()
        numbers = (~norms.isnan()).nonzero().flatten()
        chosen = numbers[top_indices(norms[numbers], self._settings.keep)]
        others = numbers[~torch.isin(numbers, chosen)]
        if len(chosen) and len(others):
            self._note("norm", norms[chosen].min() - norms[others].max())
        return chosen.tolist()

    def _count_pass(self, image: int, layer: int, output: torch.Tensor, vectors: torch.Tensor) -> None:
        settings = self._settings
        if "deep" not in settings.stages or settings.exit_layer is not None or not self._is_tested(layer):
            return
        if not self._any_below("exit", cosines(output, vectors), settings.exit_cosine):
            self._passes[image] += 1
        elif settings.exit_consecutive:
            self._passes[image] = 0
        if self._passes[image] == settings.exit_count:
            self._exit(image, layer + 1)

    def _exit(self, image: int, first_layer: int) -> None:
        self._current[image] = []
        self.exit_layers[image] = first_layer

    def _any_below(self, name: str, statistics: torch.Tensor, threshold: float) -> bool:
        self._note(name, statistics - threshold)
        return bool((statistics < threshold).any())

    def _note(self, name: str, distances: torch.Tensor) -> None:
        numbers = distances[~distances.isnan()].abs()
        if len(numbers):
            self.margins[name] = min(self.margins[name], float(numbers.min()))


def edited_weights(
    layer: int,
    heads: Heads,
    mask: torch.Tensor,
    text: torch.Tensor,
    image_rows: list[torch.Tensor],
    settings: VisiPrunerSettings,
) -> torch.Tensor:
    """[H, T, T] under an additive mask [T, T]; ``text`` [T] (bool) marks the text rows of the prompt."""
    if not (layer < settings.shallow_layers and "shallow" in settings.stages):
        return softmax_of(heads, mask)
    hidden = hidden_columns(layer, text, image_rows, settings.sink)
    if settings.form == "pre_softmax":
        return softmax_of(heads, mask.masked_fill(hidden, -torch.inf))
    weights = softmax_of(heads, mask)
    if layer == 0 and settings.sink == "first":
        weights = merge_onto_first(weights, text, image_rows)
    return weights.masked_fill(hidden, 0.0)
