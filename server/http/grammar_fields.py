"""How large the constraints in a body are, before vLLM's request models parse some of them.

Knows the fields of vLLM's routes that hold a constraint; no grammar's syntax.
"""

import json
from collections.abc import Mapping
from typing import Any

FIELDS = ("structured_outputs", "response_format", "text")
"""The last is that of ``/v1/responses``, whose ``format`` is a response format."""


def find_oversized(body: Mapping[str, Any], max_kb: int) -> str | None:
    """What is wrong with a constraint in a parsed body, in one line; None where there is none, or a small one."""
    for name in FIELDS:
        num_bytes = len(json.dumps(body.get(name)))
        if num_bytes > 2 * max_kb << 10:  # its text is looked at again, without the quotes and escapes of JSON
            return f"{name} is {num_bytes >> 10} KiB large, over {max_kb} KiB (--max-grammar-kb)"
    return None
