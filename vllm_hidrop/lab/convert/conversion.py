"""One conversion, from checked parts to a complete directory; resumes where an earlier run was cut off.

Order of writing: manifest, shards (each noted in the manifest once it is on disk), index, tokenizer and processor,
``config.json`` last, so that nothing loads an unfinished directory by mistake.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from vllm_hidrop.lab.atomic_write import whole_or_absent, write_json
from vllm_hidrop.lab.convert.hub_config import (
    build_config,
    config_json,
    image_processor_json,
    processor_json,
)
from vllm_hidrop.lab.convert.manifest import MANIFEST_FILE, Advance, Manifest, check_same, hash_file, read_manifest
from vllm_hidrop.lab.convert.original import Original, Tower, find_tower, read_json, read_original
from vllm_hidrop.lab.convert.published import choose
from vllm_hidrop.lab.convert.tokens import Tokens, read_tokens, save_tokens, tokenizer_files
from vllm_hidrop.lab.convert.weights import EMBEDDING, Weights, find_all, split

SHARD_BYTES = 2 << 30
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Summary:
    """Names of the shards that one run wrote, found finished, or found missing or changed and wrote again."""

    written: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion:
    """A conversion whose parts fit each other; nothing is written yet.

    ``preset`` is HiDrop's, the schedule in words, or "none"; ``shards`` gives the names of the weights by file,
    ``sources`` the path of every file read by its name in the manifest; ``warnings`` are lines for the user.
    """

    original: Original
    tower: Tower
    tokens: Tokens
    config: Any
    preset: str
    weights: Weights
    shards: dict[str, list[str]]
    shard_bytes: int
    destination: Path
    warnings: list[str]
    sources: dict[str, Path]

    @property
    def num_bytes(self) -> int:
        """About the bytes to read and to write: the total of the progress that :meth:`run` reports."""
        return sum(path.stat().st_size for path in self.sources.values()) + sum(map(self.shard_size, self.shards))

    def shard_size(self, shard: str) -> int:
        """Bytes of a shard's tensors."""
        return sum(self.weights[name].meta().nbytes for name in self.shards[shard])

    def run(self, advance: Advance) -> Summary:
        """Hash the source, write the shards that are missing, verify the others; ``advance`` is called with bytes done.

        Raises ValueError: the destination holds a conversion of something else; OSError: it cannot be written.
        """
        manifest = self._begin(advance)
        summary = Summary()
        for shard in self.shards:
            outcome = self._write_shard(shard, manifest, advance)
            getattr(summary, outcome).append(shard)
        self._write_rest()
        manifest.complete = True
        self._save(manifest)
        return summary

    def _begin(self, advance: Advance) -> Manifest:
        sources = {name: hash_file(path, advance) for name, path in self.sources.items()}
        manifest = Manifest(preset=self.preset, shard_bytes=self.shard_bytes, sources=sources)
        earlier = read_manifest(self.destination)
        if earlier is not None:
            check_same(earlier, manifest, self.destination)
            return earlier
        self.destination.mkdir(parents=True, exist_ok=True)
        self._save(manifest)
        return manifest

    def _write_shard(self, shard: str, manifest: Manifest, advance: Advance) -> str:
        path, known = self.destination / shard, manifest.written.pop(shard, None)
        if known is not None and path.is_file() and hash_file(path, advance) == known:
            manifest.written[shard] = known
            return "verified"
        manifest.complete = False
        with whole_or_absent(path) as unfinished:
            tensors = {name: self.weights[name].tensor() for name in self.shards[shard]}
            save_file(tensors, unfinished, metadata={"format": "pt"})
            manifest.written[shard] = hash_file(unfinished, advance)
        self._save(manifest)
        return "written" if known is None else "repaired"

    def _write_rest(self) -> None:
        """Index, tokenizer, processor and configurations; small, so always written."""
        if len(self.shards) > 1:
            weight_map = {name: shard for shard, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": sum(map(self.shard_size, self.shards))}, "weight_map": weight_map}
            write_json(self.destination / "model.safetensors.index.json", index)
        with TemporaryDirectory() as staging:
            save_tokens(self.tokens, self.original.directory, Path(staging))
            for file in sorted(Path(staging).iterdir()):
                with whole_or_absent(self.destination / file.name) as unfinished:
                    shutil.copyfile(file, unfinished)
        write_json(self.destination / "preprocessor_config.json", image_processor_json(self.tower, self.config))
        write_json(self.destination / "processor_config.json", processor_json(self.config))
        write_json(self.destination / "generation_config.json", self._generation_config())
        write_json(self.destination / CONFIG_FILE, config_json(self.config, self._dtype()))

    def _generation_config(self) -> dict[str, Any]:
        """The original's with the new padding token, without length limits: those are for another prompt format."""
        path = self.original.directory / "generation_config.json"
        given = read_json(path) if path.is_file() else {}
        text = self.config.text_config
        ends = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
        kept = {key: value for key, value in given.items() if key not in ("max_length", "max_new_tokens")}
        return ends | kept | {"pad_token_id": self.tokens.pad_id}

    def _dtype(self) -> str:
        """The original's data type, else its embeddings'; weights keep their own."""
        given = self.original.config.get("torch_dtype") or self.original.config.get("dtype")
        stored = self.weights[EMBEDDING].stored.dtype
        return str(given or stored).removeprefix("torch.")

    def _save(self, manifest: Manifest) -> None:
        write_json(self.destination / MANIFEST_FILE, manifest.model_dump())


def prepare(
    source: Path,
    destination: Path,
    preset: str | None = None,
    vision_tower: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    schedule: Mapping[str, Any] | None = None,
) -> Conversion:
    """Read everything but the weights themselves; ValueError says in a line what cannot be converted and why.

    Args:
        source: directory of an original-format LLaVA-1.5 or HiDrop checkpoint.
        destination: new, empty, or of an earlier run of the same conversion.
        preset: HiDrop's preset that the checkpoint was trained with, or "none"; None: by its folder's name, else none.
        vision_tower: directory of the CLIP checkpoint; None for the one that the source names.
        shard_bytes: limit of a written shard.
        schedule: HiDrop's options that the checkpoint was trained with, where no preset has them.
    """
    original = read_original(source)
    chosen = choose(preset, schedule, original)
    read_manifest(destination)
    tower = find_tower(original, vision_tower)
    vocab_size = original.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ValueError(f"{source / CONFIG_FILE} has no vocab_size")
    tokens = read_tokens(source, vocab_size)
    config = build_config(original, tower, tokens, chosen.entry)
    weights = find_all(original, tower, config)
    return Conversion(
        original=original,
        tower=tower,
        tokens=tokens,
        config=config,
        preset=chosen.label,
        weights=weights,
        shards=split(weights, shard_bytes),
        shard_bytes=shard_bytes,
        destination=destination,
        warnings=list(chosen.warnings),
        sources=_sources(original, tower, weights),
    )


def _sources(original: Original, tower: Tower, weights: Weights) -> dict[str, Path]:
    """Every file that the result depends on, by its name in the manifest."""
    own = [original.directory / CONFIG_FILE, original.directory / "generation_config.json"]
    others = [tower.directory / CONFIG_FILE, tower.directory / "preprocessor_config.json"]
    own += tokenizer_files(original.directory)
    for path in dict.fromkeys(weight.path for weight in weights.values()):
        (own if path.parent == original.directory else others).append(path)
    named = {f"model/{path.name}": path for path in own} | {f"tower/{path.name}": path for path in others}
    return {name: path for name, path in named.items() if path.is_file()}
