"""Which tensors of which source file go into which written shard, checked by name and shape before any is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_hidrop.lab.convert.manifest import FileRecord
from vllm_hidrop.lab.convert.names import EMBEDDING, LM_HEAD, PROJECTOR, TOWER, from_module, from_original, from_tower
from vllm_hidrop.lab.convert.original import PROJECTOR_FILE, Original, Tower, find_weights
from vllm_hidrop.lab.convert.weights import DTYPES, TensorInfo, open_weights
from vllm_hidrop.lab.convert.writing import Advance, num_bytes, write_safetensors

NUM_NAMED = 4
"""Weights that an error message names."""


@dataclass(frozen=True)
class Found:
    """A weight of the source: the file, its name there, what it is as written (embeddings with their new rows)."""

    path: Path
    source_name: str
    info: TensorInfo


@dataclass(frozen=True)
class Shard:
    """One file to write, all of whose tensors are in one source file.

    Attributes:
        name: file name.
        weights: what it holds, by the hub's name.
    """

    name: str
    weights: Mapping[str, Found]

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(num_bytes(found.info) for found in self.weights.values())

    def write(self, directory: Path, advance: Advance) -> FileRecord:
        """Write it; one tensor is in memory at a time."""
        (path,) = {found.path for found in self.weights.values()}
        infos = {name: found.info for name, found in self.weights.items()}
        with open_weights(path) as source:

            def load(name: str) -> torch.Tensor:
                found = self.weights[name]
                return with_rows(source.tensor(found.source_name), found.info.shape[0] if found.info.shape else 0)

            return write_safetensors(directory / self.name, infos, load, advance)


def with_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The tensor with its mean row appended until it has ``num_rows``.

    **Differs** Hugging Face's conversion samples the rows from a normal distribution about this mean, 1e-5 of the rows'
    covariance wide; the mean itself is the same on every run.
    """
    if tensor.dim() == 0 or tensor.shape[0] == num_rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(num_rows - tensor.shape[0], -1)])


def find_all(original: Original, tower: Tower, config: Any) -> dict[str, Found]:
    """Every weight of the model, by the hub's name, in the order of the source files.

    The projector and the tower may be among the original's weights; only what is not is read from ``mm_projector.bin``
    and from the tower's directory.

    Raises:
        ValueError: weights are missing, unexpected, there twice, or of another shape or type than the model's.
    """
    found: dict[str, Found] = {}
    rows = (original.config["vocab_size"], config.text_config.vocab_size)
    for path in original.weight_files:
        _collect(found, path, from_original, rows)
    projector = original.directory / PROJECTOR_FILE
    if projector.is_file() and not any(name.startswith(PROJECTOR) for name in found):
        _collect(found, projector, from_original, rows)
    if not any(name.startswith(TOWER) for name in found):
        for path in find_weights(tower.directory):
            _collect(found, path, from_tower, rows)
    check(found, expected_shapes(config))
    return found


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's weights, by the hub's name; no memory is used for the weights."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        parameters = LlavaForConditionalGeneration(config).named_parameters(remove_duplicate=False)
        shapes = {from_module(name): tuple(value.shape) for name, value in parameters}
    return {name: shape for name, shape in shapes.items() if name is not None}


def check(found: Mapping[str, Found], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what there is with what the model needs.

    Raises:
        ValueError: names the weights that differ.
    """
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{len(missing)} weights are missing: {_listed(missing)}")
    if unexpected := [each.source_name for name, each in found.items() if name not in expected]:
        raise ValueError(f"{len(unexpected)} weights are not LLaVA-1.5's: {_listed(unexpected)}")
    for name, each in found.items():
        if each.info.shape != expected[name]:
            raise ValueError(
                f"{each.source_name} of {each.path.name} has shape {list(each.info.shape)}, "
                f"the configuration says {list(expected[name])}"
            )


def split(found: Mapping[str, Found], shard_bytes: int) -> list[Shard]:
    """Group weights into shards of at most ``shard_bytes``, or of one weight that is larger."""
    groups: list[dict[str, Found]] = []
    for name, each, starts in _with_starts(found, shard_bytes):
        if starts:
            groups.append({})
        groups[-1][name] = each
    count = len(groups)
    return [Shard(f"model-{i:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups, 1)]


def _with_starts(found: Mapping[str, Found], shard_bytes: int) -> Iterator[tuple[str, Found, bool]]:
    path, size = None, 0
    for name, each in found.items():
        own = num_bytes(each.info)
        starts = each.path != path or size + own > shard_bytes
        path, size = each.path, own if starts else size + own
        yield name, each, starts


def _collect(found: dict[str, Found], path: Path, rename: Callable[[str], str | None], rows: tuple[int, int]) -> None:
    with open_weights(path) as weights:
        for source_name in weights.names():
            name = rename(source_name)
            if name is None:
                continue
            info = weights.info(source_name)
            if info.dtype not in DTYPES:
                raise ValueError(f"{source_name} of {path.name} is {info.dtype}; quantized weights cannot be converted")
            if name in found:
                raise ValueError(f"{source_name} is in {found[name].path.name} and in {path.name}")
            if name in (EMBEDDING, LM_HEAD) and info.shape[:1] == rows[:1]:
                info = TensorInfo((rows[1], *info.shape[1:]), info.dtype)
            found[name] = Found(path, source_name, info)


def _listed(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
