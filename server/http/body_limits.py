"""How much of what a request body may hold: every limit, those of flags and those that nobody has to change."""

from dataclasses import dataclass

MAX_DEPTH = 64
MAX_NUMBER_CHARS = 128
"""Python takes a time to read digits that grows with their square."""
MAX_INTEGER = (1 << 63) - 1
"""What goes to the engine has 64 bits."""
VALUES_PER_CONTAINER = 16
"""Objects and arrays cost a validator far more than plain values: there may be a sixteenth of them."""
ESCAPES_PER_VALUE = 4
"""A text in ``\\uXXXX``, as Python writes it, has an escape for every character."""

MAX_FIELDS = 256
"""Of a body, at its top."""
MAX_KEY_CHARS = 1024
MAX_NAME_CHARS = 1024
MAX_ID_CHARS = 256
"""Of a request, a session, an image; vLLM makes some part of names and of its log."""
MAX_ELEMENTS = 8192
"""Of an array that is not all numbers, or of an object. A wrong one costs vLLM an error for each."""
MAX_PROMPTS = 8192
MAX_WORDS = 1024
"""Stop words and the like, token ids, documents."""
MAX_OPTION_ELEMENTS = 4096
MAX_ENTRIES = {"logit_bias": 1024, "metadata": 64, "media_io_kwargs": 64, "vllm_xargs": 64, "questions": 1024}
MAX_INSIDE = 256
"""Variables of a prompt, structures of a response format."""
MAX_MESSAGES = 4096
"""Of a body, all its conversations together."""
MAX_PARTS = 4096
"""Of a whole body. vLLM's validation takes about 30 us for each, in the event loop."""
MAX_ITEMS = 1024
"""Of ``/v1/responses``. A valid one takes vLLM 0.05 to 0.3 ms."""
MAX_TOOLS = 512

CHARS_PER_TOKEN = 32
"""A text longer than this many characters for each token of the model's length cannot become a prompt."""
MIN_TEXT_CHARS = 1 << 16


@dataclass(frozen=True)
class BodyLimits:
    """Limits of a server.

    Attributes:
        max_values: of a body; ``--max-json-values``.
        max_text_chars: of one prompt.
        max_grammar_kb: of a constraint as text; ``--max-grammar-kb``.
    """

    max_values: int
    max_text_chars: int
    max_grammar_kb: int

    @classmethod
    def of(cls, max_values: int, max_model_len: int, max_grammar_kb: int) -> "BodyLimits":
        """For a model's length."""
        return cls(max_values, max(MIN_TEXT_CHARS, CHARS_PER_TOKEN * max_model_len), max_grammar_kb)

    def too_long(self, what: str) -> str:
        """Says that a text is."""
        return f"{what} is longer than {self.max_text_chars} characters ({CHARS_PER_TOKEN} x --max-model-len)"
