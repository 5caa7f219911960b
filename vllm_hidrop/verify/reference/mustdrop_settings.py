"""The settings of MustDrop's reference."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

KeyLayer = Literal["last", "feature"]


@dataclass(frozen=True)
class MustDropSettings:
    """The three stages of MustDrop; layers are zero-based.

    * ``global_threshold`` (gamma), ``individual_threshold`` (alpha): a vision token goes if its share of the
      attention of the text is below gamma AND no text row pays it alpha AND it is no key token.
    * ``filter_layers``: ascending; the attention of layer F judges, the survivors run from layer F + 1.
    * ``merge_threshold``: windows of ``merge_window`` x ``merge_window`` patches at least this similar merge;
      None merges nothing.
    * ``key_rate``: the share of the tokens after merging that are key tokens, rounded up; 0 for none.
    * ``key_layer``: whose class token chooses them, the tower's last layer or the last one behind the features.
    * ``cut_cache``: from the first filter layer on, generated tokens see only the survivors of the last filter.
    """

    global_threshold: float
    individual_threshold: float
    filter_layers: tuple[int, ...]
    merge_threshold: float | None = 0.8
    merge_window: int = 3
    key_rate: float = 0.08
    key_layer: KeyLayer = "last"
    cut_cache: bool = True


def check_settings(settings: MustDropSettings, num_layers: int) -> None:
    """Raise ValueError for settings that mean nothing in a language model of ``num_layers``."""
    layers = settings.filter_layers
    if any(not 0 <= layer < num_layers for layer in layers) or any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"filter layers must rise inside [0, {num_layers}), got {layers}")
    if not 0 <= settings.key_rate <= 1:
        raise ValueError(f"key rate must be in [0, 1], got {settings.key_rate}")
    if settings.key_layer not in get_args(KeyLayer):
        raise ValueError(f"unknown key layer {settings.key_layer!r}, known: {get_args(KeyLayer)}")
