"""Words, tokenizer and chat template of the embedded model."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_hidrop.lab.train.questions import COLUMN_NAMES, ROW_NAMES
from vllm_hidrop.lab.train.scenes import COLOUR_NAMES, WORDS
from vllm_hidrop.lab.train.sprites import KINDS

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
IMAGE, USER, ASSISTANT, SYSTEM = "<image>", "<user>", "<assistant>", "<system>"
ROLE_MARKERS = (USER, ASSISTANT, SYSTEM)
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS, IMAGE)
QUESTION_WORDS = (
    *("what", "colour", "is", "the", "which", "object", "objects", "how", "many", "are"),
    *("there", "where", "a", "of", "above", "has", "does", "text", "say", "yes", "no", "?", ".", ","),
)
NUMBERS = tuple(str(number) for number in range(8))
VOCABULARY: tuple[str, ...] = (
    *SPECIAL_TOKENS,
    *ROLE_MARKERS,
    *KINDS,
    *COLOUR_NAMES,
    *WORDS,
    *ROW_NAMES,
    *COLUMN_NAMES,
    *NUMBERS,
    *QUESTION_WORDS,
)
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""Puts the images of a message before its text, whatever the order of its parts."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: lower-cased, split at spaces and punctuation, one spelling."""
    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_IDS), unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\bcolor\b"), "colour"),
            normalizers.Replace(Regex(r"\bcentre\b"), "center"),
            normalizers.Replace(Regex(r"\ban\b"), "a"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Role markers are no special tokens: a streaming decoder must see them to know that no space
    # belongs before the first word of an answer.
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in ROLE_MARKERS])
    no_space_after = "|".join(ROLE_MARKERS)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(f"(?<={no_space_after}) | (?={no_space_after})"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
        chat_template=CHAT_TEMPLATE,
    )
