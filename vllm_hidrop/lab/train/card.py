"""Writes the model card: ``python -m vllm_hidrop.lab.train.card FIGURES.json MODEL_DIR``.

The figures come from ``vllm_hidrop.lab.train.evaluate --json``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.templates import render
from vllm_hidrop.lab.train.scenes import UNSEEN_PAIRS
from vllm_hidrop.lab.train.vocabulary import VOCABULARY

TYPES = ("colour", "object", "where", "exist", "relation", "same", "read", "count", "all")
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(figures: dict[str, Any], directory: Path, **about: object) -> None:
    """Write ``README.md`` from ``evaluate``'s figures; ``about``: minutes, hardware, date, provenance of training."""
    rows = [("own schedule", figures["own"]), ("another scene's image", figures["wrong_image"])]
    rows += [(probe["name"], probe) for probe in figures["probes"]]
    values = {"form": directory.name, "figures": figures, "types": TYPES, "rows": rows, **about}
    card = render(TEMPLATE, values | {"num_words": len(VOCABULARY), "num_pairs": len(UNSEEN_PAIRS)})
    (directory / "README.md").write_text(card, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the model card from measured figures.")
    parser.add_argument("figures", type=Path)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--minutes", type=int, required=True, help="how long training took")
    parser.add_argument("--hardware", required=True, help="what it was trained and measured on")
    parser.add_argument("--date", required=True, help="of the measurement, ISO")
    parser.add_argument("--provenance", default="", help="a sentence on how these weights came about")
    about = vars(parser.parse_args(arguments))
    figures = json.loads(about.pop("figures").read_text(encoding="utf-8"))
    write_card(figures, about.pop("model_dir"), **about)


if __name__ == "__main__":
    main()
