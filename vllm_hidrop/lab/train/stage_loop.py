"""The steps of one training stage: optimiser, learning rate, gradients, stops. Knows no run."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_hidrop.lab.train.prompts import IGNORED, Batch
from vllm_hidrop.lab.train.run_config import Stage
from vllm_hidrop.lab.train.run_log import StepFigures
from vllm_hidrop.lab.train.unfinished import TrainingStopped, whole_or_absent

MAX_GRAD_NORM = 1.0


def cosine_with_warm_up(step: int, num_warm_up: int, num_steps: int) -> float:
    """Factor of the peak learning rate for the step after ``step`` steps: up linearly, then down a half cosine."""
    if step < num_warm_up:
        return (step + 1) / num_warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - num_warm_up) / max(1, num_steps - num_warm_up)))


class StageLoop:
    """Optimises what has gradients, one step at a time.

    The loss of a step is the mean over all targets of its batches, on all processes.

    Args:
        accelerator: of ``accelerate``.
        module: batch in, summed loss out.
        stage: its values.
        index: which stage, from 0.
        num_steps: the stage's length.
        output: where the batch of a stop is left.
        own_rates: peak learning rates of parameters that have their own, by name; without weight decay.
    """

    def __init__(
        self,
        accelerator: Any,
        module: torch.nn.Module,
        stage: Stage,
        index: int,
        num_steps: int,
        output: Path,
        own_rates: Mapping[str, float],
    ) -> None:
        self.accelerator = accelerator
        self.index, self.num_steps, self.output = index, num_steps, output
        self.trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
        shared: dict[str, Any] = {"params": [one for name, one in self.trained.items() if name not in own_rates]}
        own = [{"params": [self.trained[name]], "lr": rate, "weight_decay": 0.0} for name, rate in own_rates.items()]
        optimiser = torch.optim.AdamW([shared, *own], lr=stage.lr, weight_decay=stage.weight_decay)
        num_warm_up = math.ceil(stage.warm_up * num_steps)
        factor = partial(cosine_with_warm_up, num_warm_up=num_warm_up, num_steps=num_steps)
        # Not prepared by accelerate, which would step it once per process.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        self.module, self.optimiser = accelerator.prepare(module, optimiser)
        self.step_index = 0

    def state(self) -> dict[str, Any]:
        """Optimiser, learning rate and loss scale, to go on from."""
        scaler = self.accelerator.scaler
        return {
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Go on after ``step`` steps."""
        self.step_index = step
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def step(self, batches: Sequence[Batch]) -> StepFigures:
        """One optimiser step on the batches of this process.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; the weights are those before the step.
        """
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
            self._stop("gradient", norm, batches)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.step_index += 1
        total: Tensor = self.accelerator.reduce(torch.stack(losses).sum(), "sum")
        speed = num_tokens / (time.perf_counter() - started)
        return StepFigures(
            self.index, self.step_index, float(total) / max(1, num_targets), float(rate), norm, num_tokens, speed
        )

    def _totals(self, batches: Sequence[Batch]) -> tuple[int, int]:
        counts = torch.stack([torch.stack([(one.targets != IGNORED).sum(), one.is_valid.sum()]) for one in batches])
        targets, tokens = self.accelerator.reduce(counts.sum(0), "sum").tolist()
        return targets, tokens

    def _backward(self, batch: Batch, num_targets: int, is_last: bool) -> Tensor:
        """Add a batch's gradients; returns its summed loss."""
        waits = nullcontext() if is_last else self.accelerator.no_sync(self.module)
        with waits:
            loss: Tensor = self.module(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._stop("loss", value, [batch])
            # Processes' gradients are averaged, so their number comes back in.
            self.accelerator.backward(loss * (self.accelerator.num_processes / num_targets))
        return loss.detach()

    def _stop(self, what: str, value: float, batches: Sequence[Batch]) -> None:
        process = f"-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = self.output / f"nan_batch{process}.pt"
        step = self.step_index + 1
        content = {"stage": self.index, "step": step, "batches": [asdict(batch) for batch in batches]}
        with whole_or_absent(path) as unfinished, unfinished.open("wb") as file:
            torch.save(content, file)
        raise TrainingStopped(f"the {what} is {value} at step {step} of stage {self.index}; its batch is in {path}")
