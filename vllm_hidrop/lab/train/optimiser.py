"""Muon for matrices, AdamW for the rest, one learning-rate curve, and the loop that all embedded stages train in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

WARMUP_STEPS = 30
FINAL_LR_FRACTION = 0.03
SHOW_EVERY = 25


def lr_fraction(step: int, num_steps: int) -> float:
    """Learning rate at ``step`` as a fraction of its peak: warm-up, plateau, linear decay."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    progress = step / max(1, num_steps)
    decay = 1.0 if progress < 0.4 else (1.0 - progress) / 0.6
    return warm * max(FINAL_LR_FRACTION, decay)


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates of the two optimisers."""

    muon: float
    adamw: float


class PairedOptimiser:
    """Muon, which accepts matrices only, on hidden weights; AdamW on embeddings, heads, norms and biases."""

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], rates: LearningRates, num_steps: int
    ) -> None:
        named = list(named_parameters)
        matrices = [parameter for name, parameter in named if _is_matrix(name, parameter)]
        others = [parameter for name, parameter in named if not _is_matrix(name, parameter)]
        self._parameters = matrices + others
        self._num_steps = num_steps
        optimisers: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=rates.muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            optimisers.append(muon)
        if others:
            adamw = torch.optim.AdamW(others, lr=rates.adamw, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            optimisers.append(adamw)
        self._schedulers = [LambdaLR(one, lambda step: lr_fraction(step, num_steps)) for one in optimisers]

    def step(self, loss: Tensor) -> None:
        """One update from a scalar loss, gradients clipped at norm 1."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for scheduler in self._schedulers:
            scheduler.optimizer.step()
            scheduler.optimizer.zero_grad(set_to_none=True)
            scheduler.step()

    def run(
        self,
        title: str,
        loss_of: Callable[[int], Tensor],
        held_out: Callable[[], dict[str, float]] | None = None,
        every: int = 100,
    ) -> list[float]:
        """Run all steps and return their losses; every ``every`` steps the figures of ``held_out`` are shown."""
        losses: list[float] = []
        progress = trange(self._num_steps, desc=title, mininterval=5)
        for step in progress:
            loss = loss_of(step)
            self.step(loss)
            losses.append(loss.item())
            if step % SHOW_EVERY == 0:
                progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if held_out is not None and step % every == every - 1:
                progress.write(f"step {step}: {held_out()}")
        return losses


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    is_table = any(part in name for part in ("embed", "lm_head", "readout"))
    return parameter.ndim == 2 and not is_table
