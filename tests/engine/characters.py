"""A tokenizer of single characters for the tiny checkpoints: what they generate is text with letters and digits."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN

FIRST = 4
"""Token of the first printable character, the space; those before are special."""
CHARACTERS = [chr(code) for code in range(32, 127)]


def token_of(character: str) -> int:
    return FIRST + CHARACTERS.index(character)


def save_character_tokenizer(directory: Path) -> Path:
    """Replace a checkpoint's tokenizer; return its directory."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS]
    words += [f"<{i}>" for i in range(len(words), IMAGE_TOKEN)] + ["<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<image>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    return directory
