"""Mistral-Small 3: Pixtral's tower at any resolution, patches merged two by two, a break after each row."""

from pathlib import Path

from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from tests.families.checkpoints import form

SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
IMAGE = "[IMG]"


def mistral3(directory: Path) -> None:
    """Patches of 8 pixels; a token is 16 x 16 pixels."""
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=128,
            patch_size=8,
            head_dim=32,
        ),
        text_config=MistralConfig(**form.text_shape(head_dim=form.HEAD_SIZE, sliding_window=None)),
        image_token_index=form.special_ids(SPECIAL)[IMAGE],
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 128}, patch_size={"height": 16, "width": 16}),
        form.word_tokenizer(SPECIAL, image_token=IMAGE, image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"),
        patch_size=8,
        spatial_merge_size=2,
        chat_template=form.chat_template(IMAGE),
    )
    form.save(directory, Mistral3ForConditionalGeneration, config, processor)


MISTRAL3 = form.TinyCheckpoint(mistral3, form.placeholder(SPECIAL, IMAGE), ((96, 64), (80, 112)))
"""24 and 35 patches, and a separator per row: 28 and 42 tokens."""
