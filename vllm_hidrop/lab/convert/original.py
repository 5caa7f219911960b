"""What is in an original LLaVA directory and in its vision tower's: configurations and names of weight files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hidrop.json_text import parse_object

PRUNED_TYPE = "llava_llama_exit_topk"
MODEL_TYPES = ("llava_llama", PRUNED_TYPE)
ARCHITECTURES = ("LlavaLlamaForCausalLM", "LlavaLlamaExitTopkForCausalLM")
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
"""In order of preference; an index names the shards."""
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
ABLATIONS = {
    "LlavaLlamaExitTopkCdpForCausalLM": "positions without gaps",
    "LlavaLlamaExitSepTopkForCausalLM": "two ranges of positions",
    "LlavaLlamaExitForCausalLM": "no filters",
    "LlavaLlamaTopkForCausalLM": "no injection and no exit",
    "LlavaLlamaPDropForCausalLM": "PyramidDrop",
}
"""Other programs of HiDrop's authors, by architecture, and what sets each apart."""
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", "cls_patch", None),
    "mm_vision_select_layer": (-2, None),
    "mm_patch_merge_type": ("flat", None),
    "mm_use_im_start_end": (False, None),
    "image_aspect_ratio": ("pad", "square", None),
    "quantization_config": (None,),
    "tie_word_embeddings": (False, None),
}
"""Values that Hugging Face's LLaVA can express; None: the key is missing."""


@dataclass(frozen=True)
class Original:
    """An original-format checkpoint."""

    directory: Path
    config: Mapping[str, Any]
    weight_files: tuple[Path, ...]

    @property
    def is_pruned(self) -> bool:
        """Whether the checkpoint was trained with HiDrop's schedule."""
        return self.config.get("model_type") == PRUNED_TYPE or ARCHITECTURES[1] in _architectures(self.config)


@dataclass(frozen=True)
class Tower:
    """A CLIP checkpoint; ``config`` is its vision part, ``processor`` its image processor's configuration."""

    directory: Path
    config: Mapping[str, Any]
    processor: Mapping[str, Any]


def read_original(directory: Path) -> Original:
    """Read an original LLaVA directory; ValueError: missing, another kind of model, or beyond Hugging Face's LLaVA."""
    if not directory.is_dir():
        raise ValueError(f"no such directory: {directory}")
    _check_whole(directory)
    config = read_json(directory / "config.json")
    _check_kind(directory, config)
    for key, values in SUPPORTED.items():
        if config.get(key) not in values:
            known = ", ".join(str(value) for value in values if value is not None) or "none"
            raise ValueError(f"{key} {config.get(key)!r} of {directory} cannot be converted; supported: {known}")
    return Original(directory, config, find_weights(directory))


def find_tower(original: Original, chosen: Path | None) -> Tower:
    """Read the tower's directory, chosen or named by the checkpoint; ValueError: there is none, or it is no CLIP."""
    named = original.config.get("mm_vision_tower")
    if chosen is None and isinstance(named, str) and (Path(named) / "config.json").is_file():
        chosen = Path(named)
    if chosen is None:
        raise ValueError(
            f"the vision tower {named!r} is no directory here, and nothing is downloaded; "
            "give its directory with --vision-tower"
        )
    if not chosen.is_dir():
        raise ValueError(f"--vision-tower: no such directory: {chosen}")
    config = read_json(chosen / "config.json")
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"--vision-tower: {chosen} is a {kind!r} model, not CLIP")
    vision = config.get("vision_config", {}) if kind == "clip" else config
    processor = chosen / "preprocessor_config.json"
    return Tower(chosen, vision, read_json(processor) if processor.is_file() else {})


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The weight files, safetensors before pickles; ValueError: there are none, or an index names a missing one."""
    found = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if found is None and any(directory.glob("*-of-*.*")):
        raise ValueError(f"{directory} holds shards without their index, {' or '.join(WEIGHT_FILES[:2])}")
    if found is None:
        raise ValueError(f"no weights in {directory}; looked for {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return (found,)
    names = read_json(found).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{found} has no weight_map")
    files = [directory / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{found.name} names the shard {file.name}, which is missing")
    return tuple(files)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError: missing, unreadable or no object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return parse_object(text, str(path))


def _check_whole(directory: Path) -> None:
    """Refuse a part of a checkpoint, and a folder of checkpoints."""
    if any((directory / name).is_file() for name in LORA_FILES):
        raise ValueError(
            f"{directory} holds a LoRA adapter apart from its base model; merge them first "
            "(LLaVA's scripts/merge_lora_weights.py), then convert the result"
        )
    has_weights = any((directory / name).is_file() for name in WEIGHT_FILES)
    if not has_weights and any((directory / name).is_file() for name in PROJECTOR_FILES):
        raise ValueError(f"{directory} holds a projector alone, of the first training stage; convert the whole model")
    folders = sorted(path.parent.name for path in directory.glob("*/config.json"))
    if folders and not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is no checkpoint but holds some; choose one: {', '.join(folders)}")


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return list(config.get("architectures") or [])


def _check_kind(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse other models. LLaVA-1.5's first release has Hugging Face's model_type "llava": its architecture tells."""
    kind, architectures = config.get("model_type"), _architectures(config)
    if kind in MODEL_TYPES or (kind == "llava" and any(name in ARCHITECTURES for name in architectures)):
        return
    if kind == "llava":
        raise ValueError(f"{directory} is in the Hugging Face format already; serve it as it is")
    for name in architectures:
        if name in ABLATIONS:
            raise ValueError(
                f"{directory} is an ablation of HiDrop's authors ({ABLATIONS[name]}), and is not converted"
            )
    called = f"model_type {kind!r}, architecture {', '.join(architectures) or 'none'}"
    raise ValueError(f"{directory} is no original-format LLaVA-1.5 ({called}); known: {', '.join(MODEL_TYPES)}")
