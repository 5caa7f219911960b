"""One conversion, from checked to complete; resumes where an earlier run was cut off.

The order in the destination: manifest, shards (each noted in the manifest when it is on disk), index, tokenizer and
processor, ``config.json`` last. A directory without it cannot be loaded by mistake.
"""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_hidrop.lab.convert.hub_config import build_config, choose_preset, config_json, preset_warnings
from vllm_hidrop.lab.convert.image_processor import image_processor, processor
from vllm_hidrop.lab.convert.manifest import MANIFEST_FILE, Manifest, check_same, read_manifest
from vllm_hidrop.lab.convert.names import EMBEDDING
from vllm_hidrop.lab.convert.original import Original, Tower, find_tower, read_json, read_original
from vllm_hidrop.lab.convert.shards import Found, Shard, find_all, split
from vllm_hidrop.lab.convert.tokens import Tokens, read_tokens, save_tokens, tokenizer_files
from vllm_hidrop.lab.convert.weights import DTYPES
from vllm_hidrop.lab.convert.writing import Advance, atomic_file, hash_file, write_json

SHARD_BYTES = 2 << 30
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Summary:
    """Names of the shards that one run wrote, found finished, or found changed and wrote again."""

    written: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion:
    """A conversion whose parts fit each other; nothing is written yet.

    Attributes:
        preset: HiDrop's preset, or "none".
        warnings: what the user should know, a line each.
        sources: files read, by their name in the manifest.
    """

    original: Original
    tower: Tower
    tokens: Tokens
    config: Any
    preset: str
    weights: dict[str, Found]
    shards: list[Shard]
    shard_bytes: int
    destination: Path
    warnings: list[str]
    sources: dict[str, Path]

    @property
    def num_bytes(self) -> int:
        """Bytes to read and to write, about; what :meth:`run` reports progress in."""
        return sum(path.stat().st_size for path in self.sources.values()) + sum(s.num_bytes for s in self.shards)

    def run(self, advance: Advance) -> Summary:
        """Hash the source, write what is missing, verify what is there.

        Args:
            advance: called with bytes done.

        Raises:
            ValueError: the destination holds a conversion of something else, a source file is damaged, or the disk is
                full.
        """
        manifest = self._begin(advance)
        summary = Summary()
        for shard in self.shards:
            outcome = self._write_shard(shard, manifest, advance)
            getattr(summary, outcome).append(shard.name)
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

    def _write_shard(self, shard: Shard, manifest: Manifest, advance: Advance) -> str:
        path, known = self.destination / shard.name, manifest.written.get(shard.name)
        if known is not None and path.is_file() and hash_file(path, advance) == known:
            return "verified"
        manifest.complete = False
        manifest.written.pop(shard.name, None)
        manifest.written[shard.name] = shard.write(self.destination, advance)
        self._save(manifest)
        return "written" if known is None else "repaired"

    def _write_rest(self) -> None:
        """Index, tokenizer, processor and configurations; small, so always written."""
        weight_map = {name: shard.name for shard in self.shards for name in shard.weights}
        total = sum(shard.num_bytes for shard in self.shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.destination / "model.safetensors.index.json", index)
        with TemporaryDirectory() as staging:
            save_tokens(self.tokens, self.original.directory, Path(staging))
            for file in sorted(Path(staging).iterdir()):
                with atomic_file(self.destination / file.name) as target:
                    target.write(file.read_bytes())
        write_json(self.destination / "preprocessor_config.json", image_processor(self.tower, self.config))
        write_json(self.destination / "processor_config.json", processor(self.config))
        write_json(self.destination / "generation_config.json", self._generation_config())
        write_json(self.destination / CONFIG_FILE, config_json(self.config, self._dtype()))

    def _generation_config(self) -> dict[str, Any]:
        """The original's with the new padding token; its length limits are for another prompt format's defaults."""
        path = self.original.directory / "generation_config.json"
        given = read_json(path) if path.is_file() else {}
        text = self.config.text_config
        ends = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
        kept = {key: value for key, value in given.items() if key not in ("max_length", "max_new_tokens")}
        return ends | kept | {"pad_token_id": self.tokens.pad_id}

    def _dtype(self) -> str:
        """The original's, else that of its embeddings; weights are written as they are."""
        given = self.original.config.get("torch_dtype") or self.original.config.get("dtype")
        stored = DTYPES[self.weights[EMBEDDING].info.dtype]
        return str(given or stored).removeprefix("torch.")

    def _save(self, manifest: Manifest) -> None:
        write_json(self.destination / MANIFEST_FILE, manifest.model_dump())


def prepare(
    source: Path,
    destination: Path,
    preset: str | None = None,
    vision_tower: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Read everything but the weights themselves, and check it.

    Args:
        source: directory of an original-format LLaVA-1.5 or HiDrop checkpoint.
        destination: directory to write; new, empty, or of an earlier run of the same conversion.
        preset: HiDrop's preset the checkpoint was trained with, "none", or None where it was trained with none.
        vision_tower: directory of the CLIP checkpoint; None for the one that the source names.
        shard_bytes: limit of a written shard.

    Raises:
        ValueError: one line that says what cannot be converted and why.
    """
    original = read_original(source)
    chosen = choose_preset(preset, original)
    read_manifest(destination)
    tower = find_tower(original, vision_tower)
    vocab_size = original.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ValueError(f"{source / CONFIG_FILE} has no vocab_size")
    tokens = read_tokens(source, vocab_size)
    config = build_config(original, tower, tokens, chosen)
    weights = find_all(original, tower, config)
    return Conversion(
        original=original,
        tower=tower,
        tokens=tokens,
        config=config,
        preset=chosen,
        weights=weights,
        shards=split(weights, shard_bytes),
        shard_bytes=shard_bytes,
        destination=destination,
        warnings=preset_warnings(chosen, original),
        sources=_sources(original, tower, weights),
    )


def _sources(original: Original, tower: Tower, weights: dict[str, Found]) -> dict[str, Path]:
    """Every file that the result depends on."""
    own = [original.directory / CONFIG_FILE, original.directory / "generation_config.json"]
    others = [tower.directory / CONFIG_FILE, tower.directory / "preprocessor_config.json"]
    own += tokenizer_files(original.directory)
    for path in dict.fromkeys(found.path for found in weights.values()):
        (own if path.parent == original.directory else others).append(path)
    named = {f"model/{path.name}": path for path in own} | {f"tower/{path.name}": path for path in others}
    return {name: path for name, path in named.items() if path.is_file()}
