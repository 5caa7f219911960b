"""Tiny benchmark files of exactly the official forms."""

import base64
import json
from pathlib import Path
from typing import Any

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def write_json(file: Path, value: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def write_lines(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def write_pope(folder: Path, labels: str, name: str = "coco_pope_random.json") -> Path:
    """One question per letter of ``labels``, y or n."""
    write_images(folder / "images", "a.jpg")
    rows = [
        {"question_id": number, "image": "a.jpg", "text": f"Is there a thing {number}?", "label": label}
        for number, label in enumerate({"y": "yes", "n": "no"}[letter] for letter in labels)
    ]
    return write_lines(folder / name, *map(json.dumps, rows))
