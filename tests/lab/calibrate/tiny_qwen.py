"""A random-weight Qwen2.5-VL small enough for a test: M-RoPE, grouped KV heads, images of any size."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FIRST_SPECIAL = 120
VOCABULARY = 128
NUM_LAYERS = 5
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %} <|vision_start|> <|image_pad|> <|vision_end|> {% else %} {{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %} t9 "
)


def make_qwen(directory: Path, seed: int = 7) -> Path:
    """Write a checkpoint with its processor and return its directory."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    ids = {name: FIRST_SPECIAL + index for index, name in enumerate(SPECIAL)}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids[SPECIAL[0]],
        vision_end_token_id=ids[SPECIAL[1]],
        image_token_id=ids[SPECIAL[2]],
        video_token_id=ids[SPECIAL[3]],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    model.save_pretrained(directory)
    _processor(ids).save_pretrained(directory)
    return directory


def _processor(ids: dict[str, int]) -> Qwen2_5_VLProcessor:
    words = {f"t{index}": index for index in range(FIRST_SPECIAL)} | ids
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0", unk_token="t3"
    )
    sizes = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), fast, Qwen2VLVideoProcessor(**sizes), chat_template=CHAT_TEMPLATE
    )
