"""InternVL in Hugging Face's form: a tower with a class token, tiles of 64 pixels and a thumbnail, Qwen3."""

from pathlib import Path

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen3Config,
)

from tests.families.checkpoints import form

SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
IMAGE = "<IMG_CONTEXT>"
VIDEO = "<video>"
TOKENS_PER_TILE = 16


def internvl(directory: Path) -> None:
    """Patches of 8 pixels, shuffled two by two into 4 x 4 tokens of a tile; at most four tiles."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[64, 64],
            patch_size=[8, 8],
        ),
        text_config=Qwen3Config(**form.text_shape(head_dim=form.HEAD_SIZE)),
        image_token_id=form.special_ids(SPECIAL)[IMAGE],
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
    )
    size = {"height": 64, "width": 64}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        form.word_tokenizer(
            SPECIAL,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token=IMAGE,
            video_token=VIDEO,
        ),
        InternVLVideoProcessor(size=size),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=form.chat_template(IMAGE, VIDEO),
    )
    form.save(directory, InternVLForConditionalGeneration, config, processor)


INTERNVL = form.TinyCheckpoint(
    internvl,
    form.placeholder(SPECIAL, IMAGE),
    ((128, 64), (64, 192)),
    video=form.placeholder(SPECIAL, VIDEO),
    video_shape=form.Video(4, (64, 64)),
)
"""Two and three tiles with their thumbnail: 48 and 64 tokens."""
