"""A whole training run: its stages in order, checkpoints to resume from, and the finished model.

Files in the output directory: ``checkpoints/`` (the newest and the one before), ``log.csv`` or ``tensorboard/``,
``nan_batch.pt`` after a stop, and ``model/`` at the end.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from vllm_hidrop.lab.atomic_write import whole_or_absent
from vllm_hidrop.lab.train.conversations import Source, open_source
from vllm_hidrop.lab.train.data_loader import Share, ShuffledPositions, load_batches
from vllm_hidrop.lab.train.llava_training import LlavaTraining, freeze_for, load_checkpoint, save_model
from vllm_hidrop.lab.train.prompts import IGNORED, Batch
from vllm_hidrop.lab.train.ratio import learnt_options
from vllm_hidrop.lab.train.train_config import Stage, TrainConfig
from vllm_hidrop.lab.train.training_log import Log, Progress, StepFigures, open_log
from vllm_hidrop.plan.positions import PositionScheme

MAX_GRAD_NORM = 1.0
NUM_KEPT = 2
"""Checkpoints to keep: the newest and the one before."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


def train(config: TrainConfig) -> Path:
    """Train, or go on where the same configuration was interrupted; returns the finished model's directory.

    Raises ValueError: configuration, model or data do not fit, or the configuration has changed; TrainingStopped: the
    loss or the gradient is not finite; OSError: the disk is full.
    """
    run = Run(config)
    for index in range(run.done.stage, len(run.stages)):
        run.train_stage(index)
    return run.finish()


# --- Checkpoints: one file each, written by hand: accelerate's `save_state` holds the frozen weights too, is not
# --- atomic, and its writer, given a path, hides why a write failed.


def save_checkpoint(directory: Path, done: Progress, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, then remove all but the newest two; OSError when the disk is full."""
    path = directory / f"stage{done.stage:02d}-step{done.step:09d}.pt"  # sorts as its progress does
    with whole_or_absent(path) as unfinished, unfinished.open("wb") as file:
        torch.save({"stage": done.stage, "step": done.step, **state}, file)
    for old in _saved(directory)[:-NUM_KEPT]:
        old.unlink()


def load_latest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint, its tensors on the CPU, or None."""
    paths = _saved(directory)
    return torch.load(paths[-1], map_location="cpu", weights_only=True) if paths else None


def _saved(directory: Path) -> list[Path]:
    return sorted(directory.glob("stage*-step*.pt"))


class Run:
    """A run between two steps: the model, and how far it has come.

    A step's random choices and its place in the data depend on the configuration and the step's number alone.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.settings = config.model_dump(mode="json")
        self.checkpoints = config.output / "checkpoints"
        saved = load_latest(self.checkpoints)
        if saved is not None:
            self._refuse_changes(saved["config"])
        self.done = Progress(0, 0) if saved is None else Progress(saved["stage"], saved["step"])
        self.stages = config.stages()
        self.sources = [open_source(stage.data, config.seed) for stage in self.stages]
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # A batch without images has no gradient for the projector.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(config.seed)
        self.checkpoint = load_checkpoint(config, self.accelerator.device.type)
        self.module = LlavaTraining.from_checkpoint(self.checkpoint, config).to(self.accelerator.device)
        self.changed: set[str] = set()
        self._saved = saved
        self.log: Log | None = None
        if self.accelerator.is_main_process:
            tqdm.write(f"attention of packed rows: {self.checkpoint.attention.name}", file=sys.stderr)
            self.log = open_log(config.log, config.output, self.done)
        if saved is not None:
            self._load(saved)

    def _refuse_changes(self, before: Mapping[str, Any]) -> None:
        now = self.settings
        changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
        if changed:
            raise ValueError(
                f"the run in {self.config.output} was started with another configuration; changed keys: "
                f"{', '.join(changed)}; undo the change or choose another output"
            )

    def _load(self, saved: Mapping[str, Any]) -> None:
        before, now = saved["num_samples"], [len(source) for source in self.sources]
        if now != before:
            raise ValueError(f"the data has changed since the checkpoint: {before} samples then, {now} now")
        self.module.llava.load_state_dict(saved["weights"], strict=False)
        self.changed.update(saved["weights"])
        if self.module.ratio is not None:
            self.module.ratio.load_state_dict(saved["ratio"])

    def train_stage(self, index: int) -> None:
        """Train what is left of a stage."""
        stage, source = self.stages[index], self.sources[index]
        freeze_for(self.module.llava, stage.stage)
        self.changed.update(name for name, one in self.module.llava.named_parameters() if one.requires_grad)
        self.module.train()
        self.module.llava.model.vision_tower.eval()
        accelerator = self.accelerator
        share = Share(
            stage.batch_size, stage.gradient_accumulation, accelerator.process_index, accelerator.num_processes
        )
        own_rates = {} if self.module.ratio is None else {"ratio.logits": self.config.ratio_lr}
        loop = StageLoop(accelerator, self.module, stage, index, _num_steps(stage, source, share), own_rates)
        saved, self._saved = self._saved, None
        if saved is not None and saved["stage"] == index:
            loop.load(saved["step"], saved["loop"])
        self._run_steps(loop, ShuffledPositions(source, (self.config.seed, index)), share)
        accelerator.free_memory()

    def _run_steps(self, loop: "StageLoop", data: ShuffledPositions, share: Share) -> None:
        first, workers = loop.num_done, loop.stage.data.workers
        steps = load_batches(data, self.checkpoint.encoder, share, first, loop.num_steps, workers)
        hidden = not self.accelerator.is_main_process
        with tqdm(total=loop.num_steps, initial=first, desc=loop.stage.stage, disable=hidden, mininterval=1) as bar:
            for batches in steps:
                # With it, what a layer drops at random is the same after a resume.
                set_seed(self.config.seed + loop.num_done, device_specific=True)
                try:
                    figures = loop.step(batches)
                except _NotFinite as error:
                    raise self._stopped(error, loop) from None
                figures = figures._replace(mean_vision_tokens=self.module.mean_vision_tokens)
                if self.log is not None:
                    self.log(figures)
                bar.set_postfix(self._shown(figures), refresh=False)
                bar.update()
                if loop.num_done % self.config.save_every == 0 or loop.num_done == loop.num_steps:
                    self.save(loop)

    def _shown(self, figures: StepFigures) -> dict[str, str]:
        shown = {"loss": f"{figures.loss:.4f}", "tokens_per_second": f"{figures.tokens_per_second:.0f}"}
        if self.module.ratio is not None:
            shown["keeps"] = "/".join(map(str, self.module.ratio.keeps()))
        return shown

    def _stopped(self, error: "_NotFinite", loop: "StageLoop") -> TrainingStopped:
        """The error of a loss or gradient that is not finite; its batches are written to the output directory."""
        process = f"-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path, step = self.config.output / f"nan_batch{process}.pt", loop.num_done + 1
        content = {"stage": loop.index, "step": step, "batches": [asdict(batch) for batch in error.batches]}
        with whole_or_absent(path) as unfinished, unfinished.open("wb") as file:
            torch.save(content, file)
        return TrainingStopped(
            f"the {error.what} is {error.value} at step {step} of stage {loop.index}; its batch is in {path}"
        )

    def save(self, loop: "StageLoop") -> None:
        """Write a checkpoint of this moment."""
        if self.accelerator.is_main_process:
            state = self.module.llava.state_dict()
            content = {
                "config": self.settings,
                "num_samples": [len(source) for source in self.sources],
                "weights": {name: state[name] for name in sorted(self.changed)},
                "ratio": {} if self.module.ratio is None else self.module.ratio.state_dict(),
                "loop": loop.state(),
            }
            save_checkpoint(self.checkpoints, Progress(loop.index, loop.num_done), content)
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
            save_model(self.module.llava, self.checkpoint.directory, directory, entries)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return directory


def _num_steps(stage: Stage, source: Source, share: Share) -> int:
    """Optimiser steps of a stage; a last step that the epochs do not fill takes samples of the next one."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, math.ceil(stage.epochs * len(source) / share.samples_per_step))


def cosine_with_warm_up(step: int, num_warm_up: int, num_steps: int) -> float:
    """Factor of the peak learning rate for the step after ``step`` steps: up linearly, then down a half cosine.

    **Differs** transformers' ``get_cosine_schedule_with_warmup`` starts at 0, so that its first step changes nothing.
    """
    if step < num_warm_up:
        return (step + 1) / num_warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - num_warm_up) / max(1, num_steps - num_warm_up)))


@dataclass
class _NotFinite(Exception):
    """A loss or gradient that is not finite; the weights are those before the step."""

    what: str
    value: float
    batches: Sequence[Batch]


class StageLoop:
    """Optimises what has gradients, one step at a time: the loss is the mean over the step's targets on all processes.

    ``module`` takes a batch and gives its summed loss; ``index`` counts stages from 0. ``own_rates`` are peak learning
    rates by name of parameters that have their own, which get no weight decay.
    """

    def __init__(
        self,
        accelerator: Any,
        module: torch.nn.Module,
        stage: Stage,
        index: int,
        num_steps: int,
        own_rates: Mapping[str, float],
    ) -> None:
        self.accelerator, self.stage, self.index, self.num_steps = accelerator, stage, index, num_steps
        self.trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
        shared: dict[str, Any] = {"params": [one for name, one in self.trained.items() if name not in own_rates]}
        own = [{"params": [self.trained[name]], "lr": rate, "weight_decay": 0.0} for name, rate in own_rates.items()]
        optimiser = torch.optim.AdamW([shared, *own], lr=stage.lr, weight_decay=stage.weight_decay)
        num_warm_up = math.ceil(stage.warm_up * num_steps)
        factor = partial(cosine_with_warm_up, num_warm_up=num_warm_up, num_steps=num_steps)
        # Not prepared by accelerate, which would step it once per process.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        self.module, self.optimiser = accelerator.prepare(module, optimiser)
        self.num_done = 0

    def state(self) -> dict[str, Any]:
        """State of optimiser, learning rate and loss scale, to go on from."""
        scaler = self.accelerator.scaler
        return {
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, num_done: int, state: dict[str, Any]) -> None:
        """Go on after ``num_done`` steps from a :meth:`state`."""
        self.num_done = num_done
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def step(self, batches: Sequence[Batch]) -> StepFigures:
        """One optimiser step on the batches of this process."""
        started = time.perf_counter()
        batches = [batch.to(self.accelerator.device) for batch in batches]
        num_targets, num_tokens = self._totals(batches)
        rate = self.scheduler.get_last_lr()[0]
        losses = [
            self._backward(batch, max(1, num_targets), is_last=number == len(batches) - 1)
            for number, batch in enumerate(batches)
        ]
        norm = float(self.accelerator.clip_grad_norm_(list(self.trained.values()), MAX_GRAD_NORM))
        # With float16 an infinite gradient is how the loss scale finds its size: that step is skipped.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise _NotFinite("gradient", norm, batches)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.num_done += 1
        total: Tensor = self.accelerator.reduce(torch.stack(losses).sum(), "sum")
        loss, speed = float(total) / max(1, num_targets), num_tokens / (time.perf_counter() - started)
        return StepFigures(self.index, self.num_done, loss, float(rate), norm, num_tokens, speed)

    def _totals(self, batches: Sequence[Batch]) -> tuple[int, int]:
        counts = [[int((one.targets != IGNORED).sum()), len(one.input_ids)] for one in batches]
        total = torch.tensor(counts, device=self.accelerator.device).sum(0)
        targets, tokens = self.accelerator.reduce(total, "sum").tolist()
        return targets, tokens

    def _backward(self, batch: Batch, num_targets: int, is_last: bool) -> Tensor:
        """Add a batch's gradients; returns its summed loss."""
        waits = nullcontext() if is_last else self.accelerator.no_sync(self.module)
        with waits:
            loss: Tensor = self.module(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise _NotFinite("loss", value, [batch])
            # Processes' gradients are averaged, so their number comes back in.
            self.accelerator.backward(loss * (self.accelerator.num_processes / num_targets))
        return loss.detach()
