"""Muon for matrices, AdamW for the rest, one learning-rate curve. Knows no model."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

WARMUP_STEPS = 30
FINAL_LR_FRACTION = 0.03


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
    """Muon on hidden weight matrices, AdamW on embeddings, heads, norms and biases.

    Differs: ``torch.optim.Muon`` accepts matrices only, hence the pair.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        rates: LearningRates,
        num_steps: int,
    ) -> None:
        named = [(name, parameter) for name, parameter in named_parameters]
        matrices = [parameter for name, parameter in named if self._is_matrix(name, parameter)]
        others = [parameter for name, parameter in named if not self._is_matrix(name, parameter)]
        self._parameters = matrices + others
        self._num_steps = num_steps
        self._step = 0
        self._optimisers: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=rates.muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self._optimisers.append((muon, rates.muon))
        if others:
            adamw = torch.optim.AdamW(others, lr=rates.adamw, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            self._optimisers.append((adamw, rates.adamw))

    @staticmethod
    def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
        is_table = any(part in name for part in ("embed", "lm_head", "readout"))
        return parameter.ndim == 2 and not is_table

    def step(self, loss: torch.Tensor) -> None:
        """One update from ``loss`` (a scalar), gradients clipped at norm 1."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        fraction = lr_fraction(self._step, self._num_steps)
        for optimiser, peak in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * fraction
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._step += 1
