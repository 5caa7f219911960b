"""The configuration of ``hidrop train``: one YAML file, checked here."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vllm_hidrop.json_text import read_short_text
from vllm_hidrop.lab.validation import first_fault
from vllm_hidrop.plan.positions import PositionScheme

StageName = Literal["align", "instruct"]
DEFAULT_LR: dict[StageName, float] = {"align": 1e-3, "instruct": 2e-5}
"""Peak learning rates of LLaVA-1.5 and HiDrop's released scripts."""


class Strict(BaseModel):
    """A frozen model in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Strict):
    """Where the samples come from."""

    format: Literal["llava-json", "synthetic"]
    path: Path | None = Field(None, description="llava-json: a .json list or a .jsonl file")
    images: Path | None = Field(None, description="llava-json: folder of the images; default: the folder of path")
    num_samples: int = Field(1000, ge=1, description="synthetic: how many scenes")
    rounds: int = Field(2, ge=1, description="synthetic: questions per scene")
    workers: int = Field(0, ge=0, description="processes that read ahead")

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if self.format == "llava-json" and self.path is None:
            raise ValueError("format llava-json needs path")
        return self


class StageValues(Strict):
    """What may be set for all stages and for each; None means: the value for all stages, else the default."""

    data: DataConfig | None = None
    steps: int | None = Field(None, ge=1, description="optimiser steps; or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; default 1")
    lr: float | None = Field(None, gt=0, description="peak learning rate; default 1e-3 (align), 2e-5 (instruct)")
    warm_up: float | None = Field(None, ge=0, lt=1, description="share of the steps; default 0.03")
    weight_decay: float | None = Field(None, ge=0, description="default 0")
    batch_size: int | None = Field(None, ge=1, description="samples per process and forward pass; default 8")
    gradient_accumulation: int | None = Field(None, ge=1, description="forward passes per step; default 1")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class StageConfig(StageValues):
    """One entry of ``stage``."""

    stage: StageName


class HidropChoice(Strict):
    """The method to train with, as in ``HidropConfig``."""

    method: str | None = None
    preset: str | None = None
    options: dict[str, Any] = {}


class Stage(Strict):
    """A stage with every value settled; of ``steps`` and ``epochs`` one is None."""

    stage: StageName
    data: DataConfig
    steps: int | None = None
    epochs: float | None = None
    lr: float
    warm_up: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1


def _as_list(value: object) -> object:
    return [{"stage": value}] if isinstance(value, str) else value


class TrainConfig(StageValues):
    """The whole file; values of :class:`StageValues` given here hold for every stage without its own."""

    model: str = Field(description='a Hugging Face LLaVA directory, or "embedded"')
    output: Path = Field(description="checkpoints, log and the finished model go here")
    stage: Annotated[tuple[StageConfig, ...], BeforeValidator(_as_list), Field(min_length=1)]
    hidrop: HidropChoice | None = Field(None, description="default: the model's own entry, else no pruning")
    selection: Literal["differentiable", "as_written", "as_released"] = "differentiable"
    ratio: Literal["fixed", "learnable"] = Field("fixed", description="the keeps of the schedule, or learnt from there")
    ratio_weight: float = Field(10.0, gt=0, description="learnable: of the penalty that holds the schedule's mean")
    ratio_lr: float = Field(1e-3, gt=0, description="learnable: peak learning rate of the logits")
    positions: PositionScheme | None = Field(
        None, description="default: persistent, or where hidrop is left out the model's own"
    )
    max_length: int = Field(2048, ge=2, description="tokens of a sample, vision tokens included")
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "flash-attn", "xformers", "pytorch"] = Field(
        "auto", description="of packed rows; auto: the first of these that is installed and takes the tensors"
    )
    seed: int = Field(0, ge=0)
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    log: Literal["csv", "tensorboard"] = "csv"

    @model_validator(mode="after")
    def _every_stage_has_data(self) -> Self:
        if any(stage.data is None for stage in self.stage) and self.data is None:
            raise ValueError("data is missing")
        return self

    @model_validator(mode="after")
    def _can_learn_its_ratio(self) -> Self:
        if self.ratio == "learnable" and self.selection == "as_released":
            raise ValueError("ratio learnable needs selection differentiable or as_written, got as_released")
        return self

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, every value settled."""
        return tuple(self._settled(own) for own in self.stage)

    def _settled(self, own: StageConfig) -> Stage:
        """A stage's own values, else those for all stages, else the defaults; its own length hides the shared one."""
        lengths = {"steps", "epochs"}
        mine = own.model_dump(exclude_none=True)
        hidden = lengths if lengths & mine.keys() else set()
        shared = self.model_dump(include=StageValues.model_fields.keys() - hidden, exclude_none=True)
        values: dict[str, Any] = {"lr": DEFAULT_LR[own.stage]} | shared | mine
        if not lengths & values.keys():
            values["epochs"] = 1.0
        return Stage.model_validate(values)


_PARTS: dict[str, type[BaseModel]] = {"data": DataConfig, "stage": StageConfig, "hidrop": HidropChoice}


def parse_train_config(values: object) -> TrainConfig:
    """Check a mapping; ValueError is one line that names the key and the known ones."""
    if not isinstance(values, dict):
        raise ValueError("training configuration: not a mapping of keys to values")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        place = error.errors()[0]["loc"][:-1]
        part = next((_PARTS[name] for name in reversed(place) if isinstance(name, str) and name in _PARTS), TrainConfig)
        known = ", ".join(part.model_fields)
        raise ValueError(f"training configuration: {first_fault(error)}; known keys: {known}") from None


def read_train_config(path: Path) -> TrainConfig:
    """Read a YAML file, its paths relative to the working directory; ValueError: no file, no YAML, no configuration."""
    try:
        values = yaml.safe_load(read_short_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    return parse_train_config(values)
