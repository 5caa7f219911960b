"""A Hugging Face LLaVA to train: loaded, with the staged forward between its embeddings and its loss, and written."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.lab.atomic_write import whole_or_absent
from vllm_hidrop.lab.train.decoder import Decoder
from vllm_hidrop.lab.train.packed_attention import Backend, choose_backend
from vllm_hidrop.lab.train.prompts import IGNORED, Batch, PromptEncoder
from vllm_hidrop.lab.train.ratio import Ratio, make_ratio
from vllm_hidrop.lab.train.staged import Selection, StagedTraining, check_trainable
from vllm_hidrop.lab.train.train_config import StageName, TrainConfig
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.models.llava import Llava
from vllm_hidrop.plan.shapes import text_shape

SHARD_SIZE = "5GB"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of queries, keys and values, by ``mixed_precision``."""
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".md")


@dataclass(frozen=True)
class Checkpoint:
    """A model to train: its directory, its parts, the schedule it is trained with and what learns its keeps, if any.

    ``attention`` is the back end that can run it where it will be trained.
    """

    directory: Path
    llava: Any
    encoder: PromptEncoder
    resolved: Resolved
    shape: ModelShape
    ratio: Ratio | None
    attention: Backend


def model_directory(model: str) -> Path:
    """The directory of ``model``, which may be "embedded"; ValueError where it is no checkpoint."""
    if model == "embedded":
        from vllm_hidrop.embedded import MODEL_DIR

        model = str(MODEL_DIR)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"model: no checkpoint directory {model}")
    return Path(model)


def load_checkpoint(config: TrainConfig, device: str = "cpu") -> Checkpoint:
    """Load weights in float32, tokenizer and processor, and resolve the schedule for them; ``device`` is a type.

    Raises ValueError: no LLaVA that can run staged, a schedule that does not fit it or cannot be learnt, or a back end
    of attention that cannot run it on the device.
    """
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    directory = model_directory(config.model)
    architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    family = Llava()
    if architectures[0] != family.stock:
        raise ValueError(f"model: cannot train architecture {architectures[0]}; known: {family.stock}")
    model_config = AutoConfig.from_pretrained(directory)
    family.check(model_config)
    shape = family.shape(model_config)
    choice = None if config.hidrop is None else config.hidrop.model_dump()
    resolved = resolve(
        HidropConfig.parse(choice or {}), shape, None if choice else getattr(model_config, "hidrop", None)
    )
    check_trainable(resolved.method)
    resolved = replace(resolved, positions=config.positions or resolved.positions)
    ratio = make_ratio(resolved, shape, config.ratio_weight) if config.ratio == "learnable" else None
    head_size = text_shape(model_config.text_config).head_size
    has_presence = config.selection == str(Selection.DIFFERENTIABLE)
    attention = choose_backend(config.attention, device, DTYPES[config.mixed_precision], head_size + has_presence)
    processor = AutoProcessor.from_pretrained(directory)
    encoder = PromptEncoder(processor, model_config.image_token_index, shape.tokens_per_image, config.max_length)
    llava = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return Checkpoint(directory, llava, encoder, resolved, shape, ratio, attention)


def freeze_for(llava: Any, stage: StageName) -> None:
    """Give gradients to the projector, and in stage ``instruct`` to the language model too; freeze the rest."""
    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    if stage == "instruct":
        llava.model.language_model.requires_grad_(True)
        llava.lm_head.requires_grad_(True)


def embed(llava: Any, input_ids: Tensor, images: Tensor, pixel_values: Tensor | None) -> Tensor:
    """Token embeddings [N, C], with projector outputs at the rows where ``images`` [N] is not -1."""
    embeds: Tensor = llava.get_input_embeddings()(input_ids.clamp_min(0))
    if pixel_values is None:
        return embeds
    found = llava.model.get_image_features(
        pixel_values=pixel_values,
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
    )
    features = torch.cat(list(found.pooler_output)).to(embeds.dtype)
    return embeds.masked_scatter((images >= 0)[..., None], features)


class LlavaTraining(nn.Module):
    """Batch in, summed cross entropy of the targets out; the logits of no other row are computed.

    With a learnable ratio its penalty is in every target's loss, so the mean over a step's targets holds it once.
    """

    def __init__(self, llava: Any, staged: StagedTraining, tokens_per_image: int) -> None:
        super().__init__()
        # In this order: parameters are named after the first module that holds them.
        self.llava, self.ratio, self.staged = llava, staged.ratio, staged
        self.tokens_per_image = tokens_per_image

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, config: TrainConfig) -> Self:
        """The module that a configuration trains."""
        staged = StagedTraining.from_method(
            Decoder(checkpoint.llava.model.language_model, checkpoint.attention, config.gradient_checkpointing),
            checkpoint.resolved.method,
            checkpoint.shape,
            config.selection,
            checkpoint.resolved.positions,
            checkpoint.ratio,
        )
        return cls(checkpoint.llava, staged, checkpoint.shape.tokens_per_image)

    @property
    def mean_vision_tokens(self) -> float:
        """Vision tokens kept of an image in the last step, mean over the layers."""
        return self.staged.schedule.mean_kept(self.tokens_per_image)

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses of all targets, float32; those at vision rows that are pruned away do not count."""
        output = self.staged(embed(self.llava, batch.input_ids, batch.images, batch.pixel_values), batch.rows())
        targets = batch.targets[output.places]
        is_target = targets != IGNORED
        logits = self.llava.lm_head(output.hidden[is_target])
        loss = functional.cross_entropy(logits.float(), targets[is_target], reduction="sum")
        return loss if self.ratio is None else loss + self.ratio.penalty() * (batch.targets != IGNORED).sum()


def save_model(llava: Any, source: Path, directory: Path, entries: Mapping[str, Any]) -> None:
    """Write the finished model in bfloat16, for vLLM and Hugging Face; OSError when the disk is full.

    ``llava`` is converted in place; files other than weights come from ``source``, which it was loaded from, and
    ``config.json`` gets ``entries``. ``directory`` appears whole or not at all; what was there is replaced.
    """
    config = _in_bfloat16(json.loads((source / "config.json").read_text(encoding="utf-8")))
    with whole_or_absent(directory) as unfinished:
        llava.to(torch.bfloat16).save_pretrained(unfinished, max_shard_size=SHARD_SIZE)
        (unfinished / "generation_config.json").unlink(missing_ok=True)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(NOT_COPIED):
                shutil.copyfile(path, unfinished / path.name)
        (unfinished / "config.json").write_text(json.dumps({**config, **entries}, indent=2) + "\n", encoding="utf-8")


def _in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every data type it names replaced."""
    changed = {key: _in_bfloat16(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key in ("dtype", "torch_dtype"):
        if changed.get(key) is not None:
            changed[key] = "bfloat16"
    return changed | ({"dtype": "bfloat16"} if "architectures" in config and "text_config" in config else {})
