"""InternVL in Hugging Face's form: a tower with a class token, tiles of 64 pixels and a thumbnail, Qwen3."""

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tests.families.checkpoints import form

SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
IMAGE = "<IMG_CONTEXT>"
VIDEO = "<video>"
TOKENS_PER_TILE = 16
MAX_TILES = 4
"""Without the thumbnail."""


def internvl(directory: Path) -> None:
    """The form's own."""
    hugging_face(directory, Qwen3Config(**form.text_shape(head_dim=form.HEAD_SIZE)))


def hugging_face(
    directory: Path,
    text_config: PreTrainedConfig,
    special: Sequence[str] = SPECIAL,
    image: str = IMAGE,
    *,
    as_released: bool = False,
) -> None:
    """Patches of 8 pixels, shuffled two by two into 4 x 4 tokens of a tile; at most four tiles.

    ``image`` stands for an image in prompts, and for each of its tokens in expanded ones. ``as_released``: pictures
    are normed as the released form norms them.
    """
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[64, 64],
            patch_size=[8, 8],
        ),
        text_config=text_config,
        image_token_id=form.special_ids(special)[image],
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
    )
    norm = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD} if as_released else {}
    pictures = {"size": {"height": 64, "width": 64}} | norm
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**pictures, crop_to_patches=True, min_patches=1, max_patches=MAX_TILES),
        form.word_tokenizer(
            special,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token=image,
            video_token=VIDEO,
        ),
        InternVLVideoProcessor(**pictures),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=form.chat_template(image, VIDEO),
    )
    form.save(directory, InternVLForConditionalGeneration, config, processor)


INTERNVL = form.TinyCheckpoint(
    internvl,
    form.placeholder(SPECIAL, IMAGE),
    ((128, 64), (64, 192)),
    video=form.placeholder(SPECIAL, VIDEO),
    video_shape=form.Video(4, (64, 64)),
    as_hugging_face={form.special_ids(SPECIAL)[VIDEO]: form.special_ids(SPECIAL)[IMAGE]},
)
"""Two and three tiles with their thumbnail: 48 and 64 tokens."""
