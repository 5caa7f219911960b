"""A whole training run: its stages in order, checkpoints to resume from, and the finished model.

The files of a run, all in its output directory: ``checkpoints/`` (the newest and the one before), ``log.csv`` or
``tensorboard/``, ``nan_batch.pt`` after a stop, and ``model/`` at the end.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from vllm_hidrop.lab.train import saved_state
from vllm_hidrop.lab.train.conversations import Source, open_source
from vllm_hidrop.lab.train.feeding import Share, ShuffledPositions, feed
from vllm_hidrop.lab.train.hub_checkpoint import save_hub_checkpoint
from vllm_hidrop.lab.train.llava_training import LlavaTraining, freeze_for, load_checkpoint
from vllm_hidrop.lab.train.ratio import learnt_options
from vllm_hidrop.lab.train.run_config import Stage, TrainConfig
from vllm_hidrop.lab.train.run_log import NoLog, StepFigures, open_log
from vllm_hidrop.lab.train.saved_state import Progress
from vllm_hidrop.lab.train.stage_loop import StageLoop
from vllm_hidrop.plan.positions import PositionScheme


def train(config: TrainConfig) -> Path:
    """Train, or go on where the same configuration was interrupted; returns the finished model's directory.

    Raises:
        ValueError: configuration, model or data are not what they should be, or the configuration has changed.
        TrainingStopped: the loss is not finite.
        OSError: the disk is full.
    """
    run = Run(config)
    for index in range(run.done.stage, len(run.stages)):
        run.train_stage(index)
    return run.finish()


def _refuse_changes(config: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = sorted(key for key in config.keys() | before.keys() if config.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"the run in {config['output']} was started with another configuration; changed keys: "
            f"{', '.join(changed)}; undo the change or choose another output"
        )


class Run:
    """A run between two steps: the model, and how far it has come.

    Every random choice of a step depends on the configuration and on the step's number alone, so the position in the
    data is the number of steps done.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.settings = config.model_dump(mode="json")
        self.checkpoints = config.output / "checkpoints"
        saved = saved_state.load_latest(self.checkpoints)
        if saved is not None:
            _refuse_changes(self.settings, saved["config"])
        self.done = Progress(0, 0) if saved is None else Progress(saved["stage"], saved["step"])
        self.stages = config.stages()
        self.sources = [open_source(stage.data, config.seed) for stage in self.stages]
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # A batch without images has no gradient for the projector.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(config.seed)
        self.checkpoint = load_checkpoint(config)
        self.module = LlavaTraining(self.checkpoint, config).to(self.accelerator.device)
        self.changed: set[str] = set()
        self._saved = saved
        is_first = self.accelerator.is_main_process
        self.log = open_log(config.log, config.output, self.done) if is_first else NoLog()
        if saved is not None:
            self._check_sizes(saved["num_samples"])
            self._load_weights(saved["weights"])
            if self.module.ratio is not None:
                self.module.ratio.load_state_dict(saved["ratio"])

    def _check_sizes(self, before: list[int]) -> None:
        now = [len(source) for source in self.sources]
        if now != before:
            raise ValueError(f"the data has changed since the checkpoint: {before} samples then, {now} now")

    def _load_weights(self, weights: Mapping[str, Any]) -> None:
        self.module.llava.load_state_dict(weights, strict=False)
        self.changed.update(weights)

    def train_stage(self, index: int) -> None:
        """Train what is left of a stage."""
        stage, source = self.stages[index], self.sources[index]
        freeze_for(self.module.llava, stage.stage)
        self.changed.update(name for name, one in self.module.llava.named_parameters() if one.requires_grad)
        self.module.train()
        self.module.llava.model.vision_tower.eval()
        accelerator = self.accelerator
        share = Share(
            stage.batch_size,
            stage.gradient_accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
        num_steps = _num_steps(stage, source, share)
        own_rates = {} if self.module.ratio is None else {"ratio.logits": self.config.ratio_lr}
        loop = StageLoop(accelerator, self.module, stage, index, num_steps, self.config.output, own_rates)
        first = self._resume(loop, index)
        self._run_steps(loop, ShuffledPositions(source, (self.config.seed, index)), stage, share, first)
        accelerator.free_memory()

    def _resume(self, loop: StageLoop, index: int) -> int:
        """Give a stage its saved state, if it has one; returns the steps it has done."""
        saved, self._saved = self._saved, None
        if saved is None or saved["stage"] != index:
            return 0
        loop.load(saved["step"], saved["loop"])
        states = saved["generators"]
        saved_state.restore_generators(states[self.accelerator.process_index % len(states)])
        return int(saved["step"])

    def _run_steps(self, loop: StageLoop, data: ShuffledPositions, stage: Stage, share: Share, first: int) -> None:
        encoder, workers = self.checkpoint.encoder, stage.data.workers
        steps = feed(data, encoder, share, first, loop.num_steps, workers)
        hidden = not self.accelerator.is_main_process
        with tqdm(total=loop.num_steps, initial=first, desc=stage.stage, disable=hidden, mininterval=1) as progress:
            for batches in steps:
                figures = loop.step(batches)._replace(mean_vision_tokens=self.module.mean_vision_tokens)
                self.log.add(figures)
                progress.set_postfix(self._shown(figures), refresh=False)
                progress.update()
                if figures.step % self.config.save_every == 0 or figures.step == loop.num_steps:
                    self.save(loop)

    def _shown(self, figures: StepFigures) -> dict[str, str]:
        shown = {"loss": f"{figures.loss:.4f}", "tokens_per_second": f"{figures.tokens_per_second:.0f}"}
        if self.module.ratio is not None:
            shown["keeps"] = "/".join(map(str, self.module.ratio.keeps()))
        return shown

    def save(self, loop: StageLoop) -> None:
        """Write a checkpoint of this moment."""
        generators = gather_object([saved_state.generator_states()])
        state = self.module.llava.state_dict()
        content = {
            "config": self.settings,
            "num_samples": [len(source) for source in self.sources],
            "weights": {name: state[name] for name in sorted(self.changed)},
            "ratio": {} if self.module.ratio is None else self.module.ratio.state_dict(),
            "loop": loop.state(),
            "generators": generators,
        }
        if self.accelerator.is_main_process:
            saved_state.save(self.checkpoints, Progress(loop.index, loop.step_index), content)
        self.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Write the finished model."""
        resolved = self.checkpoint.resolved
        options = dict(resolved.options)
        if self.module.ratio is not None:
            options = learnt_options(resolved, self.checkpoint.shape, self.module.ratio.schedule())
        entries: dict[str, dict[str, Any]] = {
            "hidrop": {"method": resolved.method.name, "preset": resolved.preset, "options": options},
            "hidrop_training": {"selection": self.config.selection, "ratio": self.config.ratio},
        }
        if resolved.positions is not PositionScheme.PERSISTENT:
            entries["hidrop"]["positions"] = str(resolved.positions)
        directory = self.config.output / "model"
        if self.accelerator.is_main_process:
            save_hub_checkpoint(self.module.llava, self.checkpoint.directory, directory, entries)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return directory


def _num_steps(stage: Stage, source: Source, share: Share) -> int:
    """Optimiser steps of a stage; a last step that the epochs do not fill takes samples of the next one."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, math.ceil(stage.epochs * len(source) / share.samples_per_step))
