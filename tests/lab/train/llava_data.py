"""A tiny LLaVA that talks, and LLaVA-JSON files for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_hidrop.verify.tiny_models import make_llava

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %} t51 {% else %} t50 {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% if message.role == 'assistant' %} t2{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} t51 {% endif %}"
)
SCHEDULE = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}


def make_talking_llava(directory: Path) -> Path:
    """t50 is the user's mark, t51 the assistant's, t2 ends an answer; words must not start with t0 to t3."""
    make_llava(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def said(human: str, gpt: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def write_data(directory: Path, num_entries: int = 6) -> Path:
    """Entries with an image each but the last, and a second round in every second."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    for number in range(num_entries):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(directory / f"{number}.png")
        conversations = said(f"<image>\nt{60 + number} t61", f"t{80 + number} t81")
        conversations += said("t62", "t82") if number % 2 else []
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": conversations})
    entries.append({"id": "text", "conversations": said("t70 t71", "t90")})
    (directory / "data.json").write_text(json.dumps(entries, indent=1))
    return directory / "data.json"
