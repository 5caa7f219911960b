"""What a model family is: where its layers, tokens and tower are. One file per family; imports nothing heavy."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.adaptive import EncoderReduction
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid, Tile
from vllm_hidrop.plan.vision import VisionShape

TYPICAL_SIDE = 1024
"""Pixels of a side of the square image that is typical where images of any size are taken."""


class Family:
    """A model architecture that can run staged; a family overrides what differs from the usual.

    Attributes:
        stock: vLLM's architecture name.
        title: the name that people use.
        layers: ``model_type`` of the text models that it can run with -> the form of their decoder layers.
        towers: ``model_type`` of the vision towers that it can run with.
        has_images: images are taken.
        is_dynamic: images have various numbers of tokens.
        has_video: videos are taken, and have a span per frame.
        has_tower_kernel: the tower runs batches of equal images, which vLLM's CPU kernel can take.
        reuses_images: a later prompt can reuse an image's rows, as the schedule allows.
        reducible_towers: those of ``towers`` in which a method's reduction can run.
        ran: pairs of text model and tower that tests run with random weights, on a CPU.
        ran_trained: those that were run with trained weights.
        path: ``module:class`` of the staged model, imported when the engine loads it.
    """

    stock: ClassVar[str]
    title: ClassVar[str]
    layers: ClassVar[Mapping[str, Form]]
    towers: ClassVar[tuple[str, ...]]
    has_images: ClassVar[bool] = True
    is_dynamic: ClassVar[bool] = True
    has_video: ClassVar[bool] = False
    has_tower_kernel: ClassVar[bool] = False
    reuses_images: ClassVar[bool] = True
    reducible_towers: ClassVar[tuple[str, ...]] = ()
    ran: ClassVar[tuple[tuple[str, str], ...]] = ()
    ran_trained: ClassVar[tuple[tuple[str, str], ...]] = ()

    @property
    def staged(self) -> str:
        """Our architecture name."""
        return f"Hidrop{self.stock}"

    @property
    def path(self) -> str:
        """See the class."""
        return f"vllm_hidrop.models.staged_class:{self.staged}"

    # Of a checkpoint's Hugging Face configuration.

    def text_config(self, config: Any) -> Any:
        """The text model's part."""
        return config.get_text_config()

    def tokens(self, config: Any) -> int:
        """Vision tokens of an image, a typical one where they vary: for limits, and what is shown before a request."""
        raise NotImplementedError

    def frame_tokens(self, config: Any) -> int | None:
        """Vision tokens of a video's frame; None where they follow from the prompt or the video's grid."""
        return None

    def num_levels(self, config: Any) -> int:
        """Decoder layers behind which a later tower layer's features are added (deepstack)."""
        return 0

    def attention_layers(self, config: Any) -> tuple[int, ...] | None:
        """The decoder layers with attention, where the others are recurrent; None: all."""
        return None

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Sizes of the tower as it runs, and of the projector; None where nobody has counted their FLOPs."""
        return None

    def form(self, config: Any) -> Form:
        """The form of the decoder layers."""
        return self.layers[self.text_config(config).model_type]

    def shape(self, config: Any) -> ModelShape:
        """Layers and tokens per image."""
        num_layers, of_all = self.text_config(config).num_hidden_layers, self.attention_layers(config)
        return ModelShape(num_layers, self.tokens(config), self.is_dynamic, self.title, of_all)

    def check(self, config: Any) -> None:
        """Raise ValueError, which names the part and the supported ones, where a checkpoint cannot run staged."""
        parts = (
            ("vision tower", config.vision_config.model_type, self.towers),
            ("text model", self.text_config(config).model_type, tuple(self.layers)),
        )
        for part, found, known in parts:
            if found not in known:
                raise ValueError(f"{self.stock} with {part} {found!r} cannot run staged; supported: {', '.join(known)}")

    def no_reduction(self, config: Any) -> str | None:
        """Why no reduction of a method can run in the vision tower; None where some can."""
        return f"no reduction is written for the vision tower of {self.title}"

    def check_reduction(self, config: Any, reduction: EncoderReduction) -> None:
        """Raise ValueError, which names the obstacle, where a tower that can run others cannot run this reduction."""

    # Of a request's image or video, vLLM's ``MultiModalFeatureSpec``.

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """The cells of an image's tokens, or of those of every frame of a video; None where they cannot be known."""
        return None

    # Of the model, once it is loaded.

    def text_model(self, model: Any) -> Any:
        """The part of vLLM's model that has the decoder ``layers`` and the final ``norm``."""
        return model.get_language_model().model

    @contextmanager
    def levels(self, model: Any, num_rows: int) -> Iterator[list[Any]]:
        """See ``StagedModel.levels``."""
        yield []


class MergedPatches(Family):
    """Images and videos of any size, whose patches are merged to tokens, row by row."""

    has_video = True

    def tokens(self, config: Any) -> int:
        """A square image."""
        vision = config.vision_config
        return square_tokens(vision.patch_size, vision.spatial_merge_size)

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """Of a frame as of an image."""
        patches = field(feature, f"{feature.modality}_grid_thw")
        if patches is None:
            return None
        merge = config.vision_config.spatial_merge_size
        _, height, width = patches
        return Grid((Tile(0, width // merge, height // merge, width // merge),))


def square_tokens(patch_size: int, merge: int, side: int = TYPICAL_SIDE) -> int:
    """Tokens of a square image of ``side`` pixels whose patches are merged ``merge`` by ``merge``."""
    return int(side // (patch_size * merge)) ** 2


def field(feature: Any, name: str) -> Any:
    """A field of what a feature's processor gave, as numbers; None where it gave none."""
    element = (feature.data or {}).get(name)
    return None if element is None or element.data is None else element.data.tolist()
