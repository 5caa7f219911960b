"""Trains an embedded checkpoint from nothing: ``python -m vllm_hidrop.lab.train.embedded FORM --out DIR``.

FORM is ``dense``, ``hidrop`` or an ablation (see ``schedules.FORMS``); ``all-ablations`` trains every form whose
checkpoint is missing. Stages run in order, each leaves ``stage_<name>.pt`` in DIR, and a stage whose file exists is
loaded instead of run again, so that all forms share what comes before them:

============  ==========================================================================
tower         the vision tower labels the patches of crowded scenes (stage A)
symbols_N     the language model answers about scenes of N symbols (stage S, each phase)
align         the projector maps patches to the symbols' embeddings
FORM_images   language model and projector on real patches (stage B)
============  ==========================================================================

The checkpoint directory is ``DIR/FORM``. Only the last stage knows the form: all forms of one seed see the same
scenes, questions and steps. ``--recipe small`` makes it shorter, for ablations: its checkpoints are ``DIR/small/FORM``,
its stage ``small_FORM_images``, beside the full recipe's.

From stage S on, text reads the image in layers 3 and deeper only (late-read training), so that cuts have something to
lose; half of stage S's steps inject the image at layer 2, so that the base serves both forms.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.atomic_write import whole_or_absent
from vllm_hidrop.lab.train.initial import initialise_language_model
from vllm_hidrop.lab.train.model import LAST_FILE, build_model, save_checkpoint
from vllm_hidrop.lab.train.optimiser import LearningRates
from vllm_hidrop.lab.train.scenes import held_out_seed
from vllm_hidrop.lab.train.schedules import FORMS, trained_entry, with_schedule
from vllm_hidrop.lab.train.stages import (
    ALL_TYPES,
    FIRST_READING_LAYER,
    ONE_HOP_TYPES,
    Figures,
    ImagePhase,
    SceneFeatures,
    SymbolEmbedding,
    SymbolPhase,
    align_projector,
    train_on_images,
    train_on_symbols,
)
from vllm_hidrop.lab.train.tower import train_tower

FIRST_FEATURE_SEED = 2**29
ALL_ABLATIONS = "all-ablations"


@dataclass(frozen=True)
class Recipe:
    """How long every stage trains: steps, scenes and peak learning rates.

    ``name`` keeps apart what recipes of one base leave in a directory; the last stage adds a form's seed to ``seed``.
    """

    tower_steps: int
    tower_scenes_per_step: int
    symbol_phases: tuple[SymbolPhase, ...]
    symbol_scenes_per_step: int
    num_feature_scenes: int
    num_held_out_scenes: int
    align_steps: int
    images: ImagePhase
    seed: int = 0
    name: str = ""


FULL_RECIPE = Recipe(
    tower_steps=850,
    tower_scenes_per_step=16,
    symbol_phases=(
        SymbolPhase(200, 12, ONE_HOP_TYPES, LearningRates(2e-3, 1e-3)),
        SymbolPhase(900, 28, ALL_TYPES, LearningRates(3e-3, 1e-3)),
        SymbolPhase(300, 56, ALL_TYPES, LearningRates(2e-3, 7e-4)),
    ),
    symbol_scenes_per_step=32,
    num_feature_scenes=4000,
    num_held_out_scenes=64,
    align_steps=600,
    images=ImagePhase(1000, 8, LearningRates(1.5e-3, 7e-4)),
)
SMALL_RECIPE = replace(FULL_RECIPE, images=replace(FULL_RECIPE.images, num_steps=200), name="small")
SMOKE_RECIPE = Recipe(
    tower_steps=3,
    tower_scenes_per_step=4,
    symbol_phases=(SymbolPhase(3, 12, ALL_TYPES, LearningRates(5e-3, 4e-3)),),
    symbol_scenes_per_step=4,
    num_feature_scenes=16,
    num_held_out_scenes=4,
    align_steps=3,
    images=ImagePhase(2, 4, LearningRates(1.5e-3, 7e-4)),
)
RECIPES = {"full": FULL_RECIPE, "small": SMALL_RECIPE, "smoke": SMOKE_RECIPE}


class Training:
    """A model on its way through the stages, and the directory that keeps their weights.

    ``form`` may change between runs: the tower, and so the scenes' features, are the same for all forms.
    """

    def __init__(self, recipe: Recipe, directory: Path, form: str) -> None:
        self.recipe = recipe
        self.form = form
        self.directory = directory
        self.model: LlavaForConditionalGeneration = build_model(recipe.seed)
        initialise_language_model(self.model, FIRST_READING_LAYER)
        self.symbols = SymbolEmbedding()

    @cached_property
    def features(self) -> SceneFeatures:
        """Tower features of the training scenes; asked for once the tower is trained."""
        return SceneFeatures(self.model, FIRST_FEATURE_SEED, self.recipe.num_feature_scenes)

    @cached_property
    def held_out(self) -> SceneFeatures:
        """Tower features of the held-out scenes; asked for once the tower is trained."""
        return SceneFeatures(self.model, held_out_seed(0), self.recipe.num_held_out_scenes)

    def on_images(self) -> Figures:
        """Train stage B, the only one that depends on the form."""
        form, recipe = FORMS[self.form], self.recipe
        staged = with_schedule(self.model, form.method, form.selection, form.position_scheme)
        seed = recipe.seed + form.seed
        return train_on_images(staged, self.model, self.features, self.held_out, recipe.images, seed)

    def stages(self) -> dict[str, Callable[[], Figures]]:
        """All stages by name, in their order."""
        recipe, model, symbols = self.recipe, self.model, self.symbols
        own = f"{recipe.name}_{self.form}" if recipe.name else self.form
        return {
            "tower": lambda: train_tower(model, recipe.tower_steps, recipe.tower_scenes_per_step, recipe.seed),
            **{
                f"symbols_{phase.num_tokens}": partial(
                    train_on_symbols, model, symbols, phase, recipe.symbol_scenes_per_step, recipe.seed
                )
                for phase in recipe.symbol_phases
            },
            "align": lambda: align_projector(model, symbols, self.features, recipe.align_steps, recipe.seed),
            f"{own}_images": self.on_images,
        }

    @property
    def checkpoint(self) -> Path:
        """Directory of the form's checkpoint."""
        return self.directory / self.recipe.name / self.form

    def has_checkpoint(self) -> bool:
        """Whether the checkpoint is complete: a recipe's last stage, and the last file of a checkpoint."""
        return self.can_resume(list(self.stages())[-1]) and (self.checkpoint / LAST_FILE).exists()

    def _path(self, stage: str) -> Path:
        return self.directory / f"stage_{stage}.pt"

    def can_resume(self, stage: str) -> bool:
        """Whether an earlier run finished ``stage``."""
        return self._path(stage).exists()

    def resume(self, stage: str) -> None:
        """Load the weights that a finished stage left."""
        state = torch.load(self._path(stage), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.symbols.load_state_dict(state["symbols"])

    def remember(self, stage: str) -> None:
        """Write the weights after ``stage``, whole or not at all."""
        with whole_or_absent(self._path(stage)) as unfinished, unfinished.open("wb") as file:
            torch.save({"model": self.model.state_dict(), "symbols": self.symbols.state_dict()}, file)


def run_stages(training: Training, names: Sequence[str] | None = None) -> None:
    """Run stages ``names`` (None: all), load finished ones, write the checkpoint; ValueError: an unknown name."""
    stages = training.stages()
    unknown = set(names or ()) - set(stages)
    if unknown:
        raise ValueError(f"unknown stages {sorted(unknown)}; known: {', '.join(stages)}")
    training.directory.mkdir(parents=True, exist_ok=True)
    for name, run in stages.items():
        if training.can_resume(name):
            training.resume(name)
        elif names is None or name in names:
            torch.manual_seed(training.recipe.seed + 1)
            started = time.perf_counter()
            figures = run()
            training.remember(name)
            rounded = {kind: round(value, 4) for kind, value in figures.items()}
            print(f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(rounded)}", flush=True)
    save_checkpoint(training.model, training.checkpoint, trained_entry(training.form))


def run_all(training: Training) -> None:
    """Train every form without a checkpoint, one after the other."""
    for number, (name, form) in enumerate(FORMS.items(), start=1):
        training.form = name
        done = training.has_checkpoint()
        print(f"{number} of {len(FORMS)}, {name}: {'is there' if done else form.summary}", flush=True)
        if not done:
            run_stages(training)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train an embedded checkpoint from nothing.")
    parser.add_argument("form", choices=[*FORMS, ALL_ABLATIONS], help="what the last stage trains with")
    parser.add_argument("--out", type=Path, required=True, help="directory for stages and models")
    parser.add_argument("--stages", nargs="+", help="only these (default: all)")
    parser.add_argument("--recipe", choices=RECIPES, default="full", help="small: a short last stage (default full)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage: --recipe smoke")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    training = Training(RECIPES["smoke" if options.smoke else options.recipe], options.out, options.form)
    if options.form == ALL_ABLATIONS:
        run_all(training)
    else:
        run_stages(training, options.stages)


if __name__ == "__main__":
    main()
