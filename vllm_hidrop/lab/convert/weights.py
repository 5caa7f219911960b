"""The weights of a conversion: read from safetensors or pickles, named as on the hub, checked, split into shards."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vllm_hidrop.lab.convert.original import PROJECTOR_FILES, Original, Tower, find_weights

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ORIGINAL_PREFIXES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
"""From the original's names to the hub's, the first that fits; a name that fits none is not LLaVA-1.5's."""
MODULE_PREFIXES = (
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""From transformers' module names to the hub's."""
BUFFERS = (".rotary_emb.inv_freq", ".position_ids")
"""Endings of names that are no weights: a built model computes them."""
OTHER_CLIP_PARTS = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
NUM_NAMED = 4
"""Weights that an error message names at most."""


@dataclass(frozen=True)
class Weight:
    """A weight of the source: its file and its name there.

    ``stored`` is mapped from the file, so it takes memory only in use; ``shape`` is as written, new embedding rows too.
    """

    path: Path
    source_name: str
    stored: Tensor
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor as written: the stored rows, then their mean until there are enough.

        **Differs** Hugging Face's conversion samples the new rows from a normal distribution about the mean, with 1e-5
        of the rows' covariance; the mean itself is the same on every run.
        """
        if tuple(self.stored.shape) == self.shape:
            return self.stored.contiguous()
        mean = self.stored.float().mean(0, keepdim=True).to(self.stored.dtype)
        return torch.cat([self.stored, mean.expand(self.shape[0] - self.stored.shape[0], -1)])

    def meta(self) -> Tensor:
        """Shape and data type of the written tensor, without memory."""
        return torch.empty(self.shape, dtype=self.stored.dtype, device="meta")


Weights = dict[str, Weight]
"""By the hub's name, in the order of the source files."""


def hub_name(name: str) -> str:
    """The hub's name of a parameter of transformers' LLaVA, which vLLM's loader expects."""
    return _replaced(name, MODULE_PREFIXES)


def _from_original(name: str) -> str | None:
    """The hub's name, or None for a buffer; in some projector-only files the names lack ``model.``."""
    if name.endswith(BUFFERS):
        return None
    return _replaced(f"model.{name}" if name.startswith("mm_projector.") else name, ORIGINAL_PREFIXES)


def _from_tower(name: str) -> str | None:
    """The hub's name of a weight of a CLIP checkpoint, or None for a buffer or a part LLaVA has no use for."""
    return None if name.endswith(BUFFERS) or name.startswith(OTHER_CLIP_PARTS) else f"vision_tower.{name}"


def _replaced(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a ``.safetensors`` or PyTorch file; one from before PyTorch 1.6 is read whole.

    Raises ValueError: the file is damaged, or holds something else than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the weights in {path.name}, is the file complete? {first_line}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path.name} does not hold tensors by name")
    return content


def find_all(original: Original, tower: Tower, config: Any) -> Weights:
    """Every weight of the model; ``mm_projector`` and the tower's directory give what the original's files lack.

    Raises ValueError: weights are missing, unexpected, there twice, or of another shape or data type than the model's.
    """
    found: Weights = {}
    rows = (original.config["vocab_size"], config.text_config.vocab_size)
    for path in original.weight_files:
        _collect(found, path, _from_original, rows)
    if not any(name.startswith("multi_modal_projector.") for name in found):
        projectors = (original.directory / name for name in PROJECTOR_FILES)
        for projector in [path for path in projectors if path.is_file()][:1]:
            _collect(found, projector, _from_original, rows)
    if not any(name.startswith("vision_tower.") for name in found):
        for path in find_weights(tower.directory):
            _collect(found, path, _from_tower, rows)
    _check(found, _expected_shapes(config))
    return found


def _collect(found: Weights, path: Path, rename: Callable[[str], str | None], rows: tuple[int, int]) -> None:
    for source_name, stored in load_tensors(path).items():
        name = rename(source_name)
        if name is None:
            continue
        if stored.dtype not in DTYPES:
            raise ValueError(f"{source_name} of {path.name} is {stored.dtype}; quantized weights cannot be converted")
        if name in found:
            raise ValueError(f"{source_name} is in {found[name].path.name} and in {path.name}")
        shape = tuple(stored.shape)
        if name in (EMBEDDING, LM_HEAD) and shape[:1] == rows[:1]:
            shape = (rows[1], *shape[1:])
        found[name] = Weight(path, source_name, stored, shape)


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's weights by the hub's name, found without memory for them."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        parameters = LlavaForConditionalGeneration(config).named_parameters(remove_duplicate=False)
        return {hub_name(name): tuple(value.shape) for name, value in parameters if not name.endswith(BUFFERS)}


def _check(found: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{len(missing)} weights are missing: {_listed(missing)}")
    if unexpected := [each.source_name for name, each in found.items() if name not in expected]:
        raise ValueError(f"{len(unexpected)} weights are not LLaVA-1.5's: {_listed(unexpected)}")
    for name, each in found.items():
        if each.shape != expected[name]:
            raise ValueError(
                f"{each.source_name} of {each.path.name} has shape {list(each.shape)}, "
                f"the configuration says {list(expected[name])}"
            )


def _listed(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def split(weights: Weights, shard_bytes: int) -> dict[str, list[str]]:
    """Names of the weights by file, as on the hub: at most ``shard_bytes`` in a file, or one larger weight."""
    sizes = {name: weight.meta() for name, weight in weights.items()}
    shards: dict[str, list[str]] = split_torch_state_dict_into_shards(
        sizes, max_shard_size=shard_bytes
    ).filename_to_tensors
    return shards
