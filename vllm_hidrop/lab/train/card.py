"""Writes the model card from measured figures.

``python -m vllm_hidrop.lab.train.card FIGURES.json MODEL_DIR``; the figures come from
``vllm_hidrop.lab.train.evaluate --json``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.train.scenes import UNSEEN_PAIRS
from vllm_hidrop.lab.train.vocabulary import VOCABULARY

TYPES = ("colour", "object", "where", "exist", "relation", "same", "read", "count", "all")

TEXT = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# The embedded model, {form}

A small real LLaVA, trained from nothing by this repository, that answers short questions about synthetic scenes. It
exists so that tests, examples and load tests of `vllm_hidrop` run a model whose answers depend on the image, on any
machine and without a download. It is no general assistant. There are two forms, trained alike but for the schedule of
their last stage: `dense`, and `hidrop` (nothing in layers 0 and 1, all 576 vision tokens in layer 2, 96 in layer 3, 24
in layers 4 to 7, nothing in layers 8 to 11: 64 in the mean). This is the **{form}** one.

* **Architecture**: `LlavaForConditionalGeneration`. CLIP tower of width 128, 4 layers (3 used,
  `vision_feature_layer` -2), patch 8, 192x192 pixels: 576 vision tokens. Two-layer projector. Llama of
  width 128, 12 layers, 4 heads of 32, FFN 384, RoPE theta 1e6, 16384 positions, {num_words} words; bfloat16.
* **Scenes**: 3 to 7 objects of 20 kinds in 8 colours, on a 4-pixel lattice in sizes 20 and 28; in 70 % of
  scenes one of 16 words; a noisy gradient behind. Other sizes, fonts and photographs are outside what it knows.
* **Questions**: "What colour is the star?", "Which object is red?", "Which object has the colour of the star?" (two
  hops), "Where is the moon?", "Is there a heart?", "Is the star left of the ring?" (or "above"), "How many red objects
  are there?", "What does the text say?". Lower-cased, split at punctuation; unknown words become `<unk>`. The image
  comes before the question; the chat template sees to it.
* **Late read**: in training, text read another scene's image in layers 0 to 2, so the model reads the image in
  layers 3 and deeper only. A model of this size trained without it had copied the answer into the text after
  layer 0, so that no cut cost anything, whatever was kept. Dense, cut it at layer 3 or deeper: below it, attention to
  the image is untrained, which is unfair to methods that cut there.
* **Fonts**: words and glyphs in the training images are DejaVu (from matplotlib); no font is in the weights.

## Training

`python -m vllm_hidrop.lab.train.embedded {form} --out DIR`: about {minutes} minutes on one thread of {hardware}
that was busy with other work, with torch {torch}, transformers {transformers}.
Stages and resumption: the module's docstring.
All data are made on the fly from seeds below 1,000,000,000, without {num_pairs} pairs of kind and colour; figures are
from seeds above, with those pairs, and from none of the scenes looked at while training. {provenance}

## Figures

`python -m vllm_hidrop.lab.train.evaluate MODEL_DIR --scenes {num_scenes}`: exact match on {num_questions} questions
about {num_scenes} held-out scenes, one of each type per scene; Hugging Face, float32, torch {torch}, transformers
{transformers}, {hardware}, {date}. On the {num_unseen} questions about a pair of kind and colour never seen in
training: {unseen:.3f}.

{table}
A cut at layer l scores under layer l's queries and keys, the attention of the last prompt row averaged over heads:
"worst" keeps the lowest, "random" any.
"""


def _row(name: str, figures: dict[str, Any]) -> str:
    values = " | ".join(f"{figures[kind]:.3f}" for kind in TYPES)
    return f"| {name} | {values} |\n"


def figure_table(figures: dict[str, Any]) -> str:
    """One Markdown row per probe, one column per question type."""
    table = f"| | {' | '.join(TYPES)} |\n|---|{'---|' * len(TYPES)}\n"
    table += _row("own schedule", figures["own"])
    table += _row("another scene's image", figures["wrong_image"])
    return table + "".join(_row(probe["name"], probe) for probe in figures["probes"])


def write_card(
    figures: dict[str, Any], directory: Path, minutes: int, hardware: str, date: str, provenance: str
) -> None:
    """Write ``README.md`` into a checkpoint directory, whose name is its form."""
    card = TEXT.format(
        form=directory.name,
        minutes=minutes,
        hardware=hardware,
        date=date,
        provenance=provenance,
        torch=figures["versions"]["torch"],
        transformers=figures["versions"]["transformers"],
        num_words=len(VOCABULARY),
        num_pairs=len(UNSEEN_PAIRS),
        num_scenes=figures["num_scenes"],
        num_questions=figures["num_questions"],
        num_unseen=figures["unseen_pairs"]["num_questions"],
        unseen=figures["unseen_pairs"]["right"],
        table=figure_table(figures),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write the model card from measured figures.")
    parser.add_argument("figures", type=Path)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--minutes", type=int, required=True, help="how long training took")
    parser.add_argument("--hardware", required=True, help="what it was trained and measured on")
    parser.add_argument("--date", required=True, help="of the measurement, ISO")
    parser.add_argument("--provenance", default="", help="a sentence on how these weights came about")
    options = parser.parse_args(arguments)
    figures = json.loads(options.figures.read_text(encoding="utf-8"))
    write_card(figures, options.model_dir, options.minutes, options.hardware, options.date, options.provenance)


if __name__ == "__main__":
    main()
