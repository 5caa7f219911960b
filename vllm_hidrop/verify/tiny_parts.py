"""What the tiny checkpoints of all families share: shape of the text model, tokenizer, wide random weights.

Weights are wide (std 0.15), so attention is far from flat and a wrong selection changes the tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 128
FIRST_SPECIAL = 96
"""Token ids 4 to 95 are text in every checkpoint; a family's special tokens follow."""

NUM_LAYERS = 8
HIDDEN_SIZE = 128
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_SIZE = 32


def special_ids(special: Sequence[str]) -> dict[str, int]:
    """The ids of a family's special tokens."""
    return {token: FIRST_SPECIAL + i for i, token in enumerate(special)}


def word_tokenizer(special: Sequence[str], **names: str) -> PreTrainedTokenizerFast:
    """Words ``t4`` to ``t95`` and a family's special tokens; ``names`` are the attributes its processor reads."""
    usual = ("<pad>", "<s>", "</s>", "<unk>")
    words = {word: i for i, word in enumerate(usual)} | {f"t{i}": i for i in range(len(usual), FIRST_SPECIAL)}
    tokenizer = Tokenizer(models.WordLevel(words | special_ids(special), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )


def chat_template(image: str, video: str = "") -> str:
    """Placeholders and texts in the order of the message's parts, then one more word."""
    return (
        "{% for message in messages %}{% if message.content is string %} {{ message.content }}{% else %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %} " + image + "{% elif part.type == 'video' %} " + video + ""
        "{% else %} {{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %} t9"
    )


def text_shape(**others: Any) -> dict[str, Any]:
    """Arguments of every text model's configuration; ``others`` are added or replace them."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 160,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | others


def widen(model: Any, seed: int = 7) -> None:
    """Draw all weights anew: wide, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            wide = torch.empty(parameter.shape).normal_(mean, 0.15, generator=generator)
            parameter.copy_(wide)


def save(directory: Path, model_class: Any, config: Any, processor: Any, dtype: str = "float32") -> None:
    """Write a model with random weights and its processor."""
    config.dtype = getattr(torch, dtype)
    model = model_class(config).to(config.dtype)
    widen(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
