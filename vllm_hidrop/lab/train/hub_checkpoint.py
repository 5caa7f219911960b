"""A finished LLaVA as a bfloat16 checkpoint directory that vLLM and Hugging Face load. Knows no training."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_hidrop.lab.train.unfinished import whole_or_absent

SHARD_BYTES = 5 * 10**9
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".md")


def hub_name(name: str) -> str:
    """Hub naming of a LLaVA weight, which vLLM's loader expects, from transformers' module name."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def save_hub_checkpoint(model: Any, source: Path, directory: Path, entries: Mapping[str, Any]) -> None:
    """Write the model's weights beside the source's configuration, tokenizer and processor files.

    Args:
        model: a ``LlavaForConditionalGeneration``.
        source: the directory it was loaded from.
        directory: appears whole or not at all; what was there is replaced.
        entries: keys to set in ``config.json``, ``hidrop`` above all.

    Raises:
        OSError: the disk is full.
    """
    with whole_or_absent(directory) as unfinished:
        unfinished.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(_NOT_COPIED):
                shutil.copyfile(path, unfinished / path.name)
        config = _in_bfloat16(json.loads((source / "config.json").read_text(encoding="utf-8")))
        (unfinished / "config.json").write_text(json.dumps({**config, **entries}, indent=2) + "\n", encoding="utf-8")
        _save_weights(model, unfinished)


def _in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every data type it names replaced."""
    changed = {key: _in_bfloat16(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key in ("dtype", "torch_dtype"):
        if changed.get(key) is not None:
            changed[key] = "bfloat16"
    return changed | ({"dtype": "bfloat16"} if "architectures" in config and "text_config" in config else {})


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if not name.endswith("position_ids") and not (is_tied and name.startswith("lm_head.")):
            yield hub_name(name), tensor.detach().to("cpu", torch.bfloat16).contiguous().clone()


def _save_weights(model: Any, directory: Path) -> None:
    """One file, or numbered ones with an index where the weights are larger than a file should be."""
    shards: list[dict[str, Tensor]] = [{}]
    num_bytes = total = 0
    for name, tensor in _weights(model):
        if shards[-1] and num_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
