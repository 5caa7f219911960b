"""Draw docs/stages.png: vision tokens of one image per layer, by method, from the schedules themselves."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from vllm_hidrop.config import make_method
from vllm_hidrop.methods import ModelShape

SHAPE = ModelShape(32, 576)
SHOWN = (("none", None), ("fastv", None), ("pyramiddrop", None), ("hidrop", "tok64"))


def main() -> None:
    """One small panel per method, shared axes."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 2.4), sharey=True, layout="constrained")
    for axis, (name, preset) in zip(axes, SHOWN, strict=True):
        schedule = make_method(name, preset).schedule(SHAPE)
        kept = schedule.kept(SHAPE.tokens_per_image)
        per_layer = [kept[schedule.stage_of_layer(layer)] for layer in range(SHAPE.num_layers)]
        axis.bar(range(SHAPE.num_layers), per_layer, width=1.0, color="#3b6ea5")
        axis.set_title(f"{name} {preset or ''}\nmean {schedule.mean_kept(SHAPE.tokens_per_image):.0f}", fontsize=10)
        axis.set_xlabel("layer")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("vision tokens")
    figure.savefig(Path(__file__).parents[1] / "docs" / "stages.png", dpi=110)


if __name__ == "__main__":
    main()
