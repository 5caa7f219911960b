"""The tokenizer with LLaVA's two extra tokens, and its conversation form ``vicuna_v1`` as a chat template."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = (
    *("tokenizer.json", SENTENCEPIECE),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
CHAT_TEMPLATE = Path(__file__).with_name("vicuna_v1.jinja")


@dataclass(frozen=True)
class Tokens:
    """A Hugging Face tokenizer that knows ``<image>`` and ``<pad>``, and their ids."""

    tokenizer: Any
    image_id: int
    pad_id: int


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files that a directory has."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def read_tokens(directory: Path, vocab_size: int) -> Tokens:
    """Read a tokenizer and add ``<image>`` and ``<pad>`` where they are missing.

    Transformers is shown a copy of the tokenizer's files only: it does not know the ``config.json`` beside them. Raises
    ValueError: no tokenizer, an unreadable one, or more tokens than ``vocab_size``, the checkpoint's embedding rows.
    """
    from transformers import AddedToken, AutoTokenizer

    files = tokenizer_files(directory)
    if not any(file.name in TOKENIZER_FILES[:2] for file in files):
        raise ValueError(f"no tokenizer in {directory}; looked for {', '.join(TOKENIZER_FILES[:2])}")
    with TemporaryDirectory() as staging:
        for file in files:
            shutil.copy(file, staging)
        _name_class(Path(staging))
        try:
            tokenizer = AutoTokenizer.from_pretrained(staging)
        except Exception as error:  # transformers raises whatever its parsers raise
            first_line = str(error).strip().partition("\n")[0]
            raise ValueError(f"cannot read the tokenizer in {directory}: {first_line}") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} rows")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.chat_template = None
    image_id, pad_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    return Tokens(tokenizer, image_id, pad_id)


def save_tokens(tokens: Tokens, original: Path, directory: Path) -> None:
    """Write the tokenizer, the original's SentencePiece file if there is one, and the chat template."""
    tokens.tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":  # the name transformers before 5 knows it by
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if (original / SENTENCEPIECE).is_file():
        shutil.copy(original / SENTENCEPIECE, directory)
    shutil.copyfile(CHAT_TEMPLATE, directory / "chat_template.jinja")


def _name_class(directory: Path) -> None:
    """Where the files name no class, name the fast one for ``tokenizer.json``, else LlamaTokenizer, LLaVA-1.5's."""
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "tokenizer_class" not in content:
        has_json = (directory / "tokenizer.json").is_file()
        content["tokenizer_class"] = "PreTrainedTokenizerFast" if has_json else "LlamaTokenizer"
        path.write_text(json.dumps(content), encoding="utf-8")
