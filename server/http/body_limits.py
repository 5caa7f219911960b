"""Limits of what a request body may hold, those of flags and those that nobody has to change."""

from dataclasses import dataclass

MAX_DEPTH = 64
MAX_NUMBER_CHARS = 128  # Python takes a time to read digits that grows with their square
MAX_INTEGER = (1 << 63) - 1  # what goes to the engine has 64 bits
VALUES_PER_CONTAINER = 16  # objects and arrays cost a validator far more than plain values: at most a sixteenth
ESCAPES_PER_VALUE = 4  # a text in ``\uXXXX``, as Python writes it, has an escape for every character

MAX_FIELDS = 256  # at the top of a body
MAX_KEY_CHARS = 1024
MAX_NAME_CHARS = 1024
MAX_ID_CHARS = 256  # of a request, a session, an image; some become part of names in vLLM and of its log
MAX_ELEMENTS = 8192  # of an object, or of an array not all numbers; vLLM makes an error for every wrong one
MAX_PROMPTS = 8192
MAX_WORDS = 1024  # stop words and the like, token ids, documents
MAX_OPTION_ELEMENTS = 4096
MAX_ENTRIES = {"logit_bias": 1024, "metadata": 64, "media_io_kwargs": 64, "vllm_xargs": 64, "questions": 1024}
MAX_INSIDE = 256  # variables of a prompt, structures and triggers of a response format
MAX_MESSAGES = 4096  # of a body, all its conversations together
MAX_PARTS = 4096  # of a body; vLLM's validation takes about 30 us for each, in the event loop
MAX_ITEMS = 1024  # of ``/v1/responses``; a valid one takes vLLM 0.05 to 0.3 ms
MAX_TOOLS = 512

CHARS_PER_TOKEN = 32  # a text with more characters for each token of the model's length cannot become a prompt
MIN_TEXT_CHARS = 1 << 16


@dataclass(frozen=True)
class BodyLimits:
    """Limits of one server."""

    max_values: int  # in a body; ``--max-json-values``
    max_text_chars: int  # of one prompt
    max_grammar_kb: int  # KiB of a constraint as text; ``--max-grammar-kb``

    @classmethod
    def of(cls, max_values: int, max_model_len: int, max_grammar_kb: int) -> "BodyLimits":
        """The limits for a model of ``max_model_len`` tokens."""
        return cls(max_values, max(MIN_TEXT_CHARS, CHARS_PER_TOKEN * max_model_len), max_grammar_kb)

    def too_long(self, what: str) -> str:
        """The message for a text of more than :attr:`max_text_chars`."""
        return f"{what} is longer than {self.max_text_chars} characters ({CHARS_PER_TOKEN} x --max-model-len)"
