"""GLM-OCR: GLM-4.1V's prompt and processor, a tower of its own."""

from pathlib import Path

from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

from tests.families.checkpoints import form, glm


def glm_ocr(directory: Path) -> None:
    """Sandwich norms. The merger's MLP is the text's to vLLM, three times the output to Hugging Face: equal here."""
    text = form.text_shape(rope_parameters=glm.ROPE, head_dim=form.HEAD_SIZE, intermediate_size=3 * form.HIDDEN_SIZE)
    config = GlmOcrConfig(text_config=text, vision_config=glm.vision(), tie_word_embeddings=False, **glm.token_ids())
    form.save(directory, GlmOcrForConditionalGeneration, config, glm.processor())
