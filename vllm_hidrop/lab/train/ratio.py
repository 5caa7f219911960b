"""Keeps learnt with the model: one dropped share per cut, held to a token budget."""

import torch
from torch import Tensor, nn

from vllm_hidrop.config import Resolved
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.hidrop import HiDrop
from vllm_hidrop.plan.schedule import KeepValue, Schedule


class Ratio(nn.Module):
    """The dropped share ``a`` of an image's N tokens at every cut of a schedule, a learnable logit each.

    Forward, a cut keeps the whole number next to ``(1 - a) N``, at least 1 and no more than the cut before. Backward,
    the loss reaches ``a`` through the survivors' soft mask (``dtopk.gates``) and through :meth:`penalty`, scaled by
    ``weight``. ``schedule`` gives the cuts, the keeps to start from and the token budget.

    **Source** arXiv 2602.23699 section 3.2 calls the pruning ratio learnable and says no more; in the released code it
    is a constant.

    **Differs** the paper names no term that bounds the tokens, and without one the loss would always rather keep more:
    the penalty is ours. So are the sigmoid and the start at the given schedule.
    """

    given_kept: Tensor
    num_layers: Tensor

    def __init__(self, schedule: Schedule, num_tokens: int, weight: float) -> None:
        super().__init__()
        self.given, self.num_tokens, self.weight = schedule, num_tokens, weight
        self.cuts = [i for i, one in enumerate(schedule.stages) if not (one.keep.is_all or one.keep.is_none)]
        kept = torch.tensor([schedule.kept(num_tokens)[stage] for stage in self.cuts], dtype=torch.float32)
        layers = torch.tensor([schedule.layers_in(stage) for stage in self.cuts])
        self.register_buffer("given_kept", kept, persistent=False)
        self.register_buffer("num_layers", layers, persistent=False)
        # A keep of nothing or everything has no finite logit; a quarter of a token away it still rounds to itself.
        self.logits = nn.Parameter(-torch.logit(kept / num_tokens, eps=0.25 / num_tokens))

    def kept_tokens(self) -> Tensor:
        """``(1 - a) N`` of every cut, [cuts]."""
        return torch.sigmoid(-self.logits) * self.num_tokens

    def _bounded(self) -> Tensor:
        """Kept tokens of every cut before they are rounded: at least 1 and never rising."""
        return self.kept_tokens().clamp_min(1).cummin(0).values

    def keeps(self) -> list[int]:
        """Tokens kept at every cut, as whole numbers."""
        kept: list[int] = self._bounded().detach().round().int().tolist()
        return kept

    def schedule(self) -> Schedule:
        """The given schedule with the present keeps."""
        keeps: list[KeepValue] = [stage.keep.dump() for stage in self.given.stages]
        for stage, keep in zip(self.cuts, self.keeps(), strict=True):
            keeps[stage] = keep
        return self.given.with_keeps(keeps)

    def dropped_share(self, first_layer: int, num_candidates: int) -> Tensor:
        """Share of its candidates that the cut before ``first_layer`` drops, a scalar with its gradient.

        The ``N - num_candidates`` tokens that cuts before have dropped count as a constant.
        """
        cut = [self.given.stages[stage].first_layer for stage in self.cuts].index(first_layer)
        return 1 - self.kept_tokens()[cut] / num_candidates

    def penalty(self) -> Tensor:
        """``weight * (mean kept / budget - 1) ** 2``: means over all layers, the budget that of the given schedule."""
        excess = ((self._bounded() - self.given_kept) * self.num_layers).sum() / self.given.num_layers
        return self.weight * (excess / self.given.mean_kept(self.num_tokens)) ** 2


def make_ratio(resolved: Resolved, shape: ModelShape, weight: float) -> Ratio:
    """The learnable ratio of HiDrop's schedule; ValueError: another method, or no filter to learn."""
    needs = "ratio: learnable needs method hidrop with at least one filter"
    if not isinstance(resolved.method, HiDrop):
        raise ValueError(f"{needs}, got method {resolved.method.name}")
    ratio = Ratio(resolved.schedule, shape.tokens_per_image, weight)
    if not ratio.cuts:
        raise ValueError(f"{needs}, got no filter that drops some tokens and keeps some")
    return ratio


def learnt_options(resolved: Resolved, shape: ModelShape, schedule: Schedule) -> dict[str, object]:
    """HiDrop's options that give ``schedule`` on a model of this shape, as JSON; scaled numbers are written out."""
    method = resolved.method
    assert isinstance(method, HiDrop)
    written = method.scaled(shape) if method.scale else method
    keeps = {stage.first_layer: stage.keep.dump() for stage in schedule.stages}
    return {
        "inject_layer": written.inject_layer,
        "filter_layers": list(written.filter_layers),
        "keeps": [keeps[layer] for layer in written.filter_layers],
        "exit_layer": written.exit_layer,
        "shape": list(written.shape),
    }
