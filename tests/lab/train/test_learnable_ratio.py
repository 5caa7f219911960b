"""The learnable ratio: its numbers, its gradients, and ``hidrop train`` with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lab.train.llava_data import SCHEDULE
from tests.lab.train.test_staged_training import OWN, PYRAMID, SHAPE, batch, last_logits, model
from tests.lab.train.test_train_command import (
    Settings,
    assert_same,
    changed,
    data,
    fail_after,
    last_checkpoint,
    log,
    settings,
    tiny,
    train,
    trained,
)
from vllm_hidrop.config import HidropConfig, make_method, resolve
from vllm_hidrop.lab.train.decoder import Decoder
from vllm_hidrop.lab.train.dtopk import SMOOTH, gates, hard_rank, soft_mask
from vllm_hidrop.lab.train.llava_training import LlavaTraining, load_checkpoint
from vllm_hidrop.lab.train.ratio import Ratio, learnt_options, make_ratio
from vllm_hidrop.lab.train.staged import Selection, StagedTraining
from vllm_hidrop.lab.train.train_config import parse_train_config
from vllm_hidrop.verify.tiny_models import TOKENS_PER_IMAGE

__all__ = ["data", "settings", "tiny"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LEARNABLE = {"ratio": "learnable", "ratio_lr": 0.3}
ONE_CUT = OWN | {"inject_layer": 1, "filter_layers": [3], "keeps": [20], "exit_layer": None}


def ratio_of(options: dict[str, Any], weight: float = 10.0) -> Ratio:
    return Ratio(make_method("hidrop", None, options).schedule(SHAPE), TOKENS_PER_IMAGE, weight)


def set_kept(ratio: Ratio, kept: list[float]) -> None:
    with torch.no_grad():
        ratio.logits.copy_(-torch.logit(torch.tensor(kept) / ratio.num_tokens))


# --- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [[20, 5], [64, 1], [0.5, 0.25], [80, 64], [1, 1]])
def test_it_starts_at_the_given_schedule_without_a_penalty(keeps: list[int | float]) -> None:
    ratio = ratio_of(PYRAMID | {"keeps": keeps})
    assert ratio.schedule().kept(TOKENS_PER_IMAGE) == ratio.given.kept(TOKENS_PER_IMAGE)
    assert ratio.penalty().item() == pytest.approx(0, abs=1e-3)


def test_keeps_are_rounded_at_least_one_and_never_rise() -> None:
    ratio = ratio_of(OWN | {"inject_layer": 1, "filter_layers": [2, 3, 5, 6], "keeps": [40, 20, 9, 1]})
    set_kept(ratio, [10.4, 30.0, 7.6, 0.2])
    assert ratio.keeps() == [10, 10, 8, 1]
    assert ratio.schedule().kept(TOKENS_PER_IMAGE) == (64, 10, 10, 8, 1)


def test_the_penalty_is_the_square_of_the_excess_over_the_given_mean() -> None:
    ratio = ratio_of(PYRAMID, weight=3.0)
    set_kept(ratio, [30.0, 10.0])
    given, now = (schedule.mean_kept(TOKENS_PER_IMAGE) for schedule in (ratio.given, ratio.schedule()))
    assert ratio.penalty().item() == pytest.approx(3 * (now / given - 1) ** 2, rel=1e-4)


def test_the_mask_drops_a_share_of_the_candidates() -> None:
    ratio = ratio_of(PYRAMID)
    assert ratio.dropped_share(4, 64).item() == pytest.approx(1 - 20 / 64)
    assert ratio.dropped_share(6, 20).item() == pytest.approx(1 - 5 / 20)


# --- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_survivors_that_help_ask_for_more_and_survivors_that_hurt_for_fewer(sign: int) -> None:
    ratio = ratio_of(ONE_CUT)
    scores = torch.rand(TOKENS_PER_IMAGE, generator=torch.Generator().manual_seed(0))
    presence = gates(scores, 20, ratio.dropped_share(3, TOKENS_PER_IMAGE), SMOOTH)[scores.topk(20).indices]
    (-sign * presence.sum()).backward()
    assert ratio.logits.grad is not None
    assert float(ratio.logits.grad * sign) > 0  # a descent step drops less where presence lowers the loss


@pytest.mark.parametrize("selection", [Selection.DIFFERENTIABLE, Selection.AS_WRITTEN])
def test_the_losss_gradient_in_the_logits_is_that_of_the_smooth_mask(selection: Selection) -> None:
    """Against a finite difference in which the gate of the chosen tokens is the mask itself, up to a constant."""
    llava = model("llama")
    embeds, rows = batch(llava)
    ratio = ratio_of(ONE_CUT)
    arguments = Decoder(llava.model.language_model), make_method("hidrop", None, ONE_CUT), SHAPE, selection
    staged = StagedTraining.from_method(*arguments, ratio=ratio)

    def loss() -> Tensor:
        return last_logits(llava, staged, embeds, rows).log_softmax(-1)[:, 5].sum()

    (found,) = torch.autograd.grad(loss(), ratio.logits)
    start = ratio.logits.detach().clone()
    factor = None if selection is Selection.AS_WRITTEN else SMOOTH

    def mask(layer: int, scores: Tensor) -> Tensor:
        return soft_mask(hard_rank(scores.detach()), ratio.dropped_share(layer, len(scores)).detach(), factor)

    def moved_gate(layer: int, scores: Tensor, num_kept: int) -> Tensor:
        moved = mask(layer, scores)
        now = ratio.logits.data.clone()
        ratio.logits.data.copy_(start)
        gate = (1 + moved - mask(layer, scores)).requires_grad_()
        ratio.logits.data.copy_(now)
        assert num_kept == 20
        return gate

    staged._gates = moved_gate  # type: ignore[method-assign]
    losses = []
    for step in (-0.01, 0.01):
        ratio.logits.data.copy_(start + step)
        losses.append(float(loss().detach()))
    ratio.logits.data.copy_(start)
    assert abs(float(found)) > 1e-4
    assert float(found) == pytest.approx((losses[1] - losses[0]) / 0.02, rel=0.03)


def test_the_penalty_pulls_a_generous_start_to_the_budget() -> None:
    ratio = ratio_of(PYRAMID)
    set_kept(ratio, [60.0, 40.0])
    budget = ratio.given.mean_kept(TOKENS_PER_IMAGE)
    assert ratio.schedule().mean_kept(TOKENS_PER_IMAGE) > 1.3 * budget
    optimiser = torch.optim.Adam([ratio.logits], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        ratio.penalty().backward()
        optimiser.step()
    assert ratio.schedule().mean_kept(TOKENS_PER_IMAGE) == pytest.approx(budget, rel=0.05)


# --- hidrop train ------------------------------------------------------------------------------


def start_generous(monkeypatch: pytest.MonkeyPatch) -> None:
    init = LlavaTraining.__init__

    def generous(self: LlavaTraining, *arguments: Any) -> None:
        init(self, *arguments)
        assert self.ratio is not None
        set_kept(self.ratio, [60.0] * len(self.ratio.cuts))

    monkeypatch.setattr(LlavaTraining, "__init__", generous)


def test_training_pulls_a_generous_start_to_the_budget(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    start_generous(monkeypatch)
    steps = {"steps": 16, "save_every": 16, "lr": 1e-5, "ratio_lr": 0.5, "ratio_weight": 100}
    trained(settings | LEARNABLE | steps | {"hidrop": {"method": "hidrop", "options": PYRAMID}})
    means = [float(line["mean_vision_tokens"]) for line in log(settings)]
    budget = ratio_of(PYRAMID).given.mean_kept(TOKENS_PER_IMAGE)
    assert means[0] > 1.3 * budget
    assert abs(means[-1] - budget) < 0.3 * abs(means[0] - budget)


def test_the_finished_model_is_served_with_the_keeps_it_learnt(settings: Settings) -> None:
    trained(settings | LEARNABLE | {"stage": "align"})
    entry = json.loads((Path(settings["output"]) / "model/config.json").read_text())["hidrop"]
    ratio = make_ratio(resolve(HidropConfig.parse(SCHEDULE), SHAPE), SHAPE, 10.0)
    start = ratio.keeps()
    ratio.load_state_dict(last_checkpoint(settings)["ratio"])
    assert ratio.keeps() != start
    assert entry["options"]["keeps"] == ratio.keeps()
    served = resolve(HidropConfig.parse({}), SHAPE, entry)
    assert served.schedule == ratio.schedule()
    again = parse_train_config(settings | {"model": str(Path(settings["output"]) / "model"), "hidrop": None})
    assert load_checkpoint(again).resolved.schedule == ratio.schedule()


def test_options_keep_what_is_no_cut() -> None:
    options = OWN | {"inject_layer": 1, "filter_layers": [2, 3, 5, 6], "keeps": ["all", 20, 5, 0], "exit_layer": None}
    resolved = resolve(HidropConfig.parse({"method": "hidrop", "options": options}), SHAPE)
    ratio = make_ratio(resolved, SHAPE, 10.0)
    set_kept(ratio, [33.0, 8.0])
    written = learnt_options(resolved, SHAPE, ratio.schedule())
    assert written == options | {"keeps": ["all", 33, 8, 0]}


def test_an_interrupted_run_goes_on_with_its_logits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"stage": [{"stage": "align", "steps": 1}, {"stage": "instruct", "steps": 2}], "steps": None}
    whole, broken = (settings | LEARNABLE | stages | {"output": str(tmp_path / name)} for name in ("whole", "broken"))
    expected = trained(whole)
    with monkeypatch.context() as patch:
        fail_after(patch, 2)
        assert train(broken).exit_code != 0
    assert not changed(expected, trained(broken))
    one, other = last_checkpoint(whole), last_checkpoint(broken)
    assert_same({**one, "config": 0}, {**other, "config": 0})
    kept = [[line["mean_vision_tokens"] for line in log(run)] for run in (whole, broken)]
    assert kept[0] == kept[1]
    assert len(set(kept[0])) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": "as_released"}, "ratio learnable needs selection differentiable or as_written, got as_released"),
        ({"hidrop": {"method": "none"}}, "needs method hidrop with at least one filter, got method none"),
        (
            {"hidrop": {"method": "hidrop", "options": OWN | {"filter_layers": [], "keeps": [], "exit_layer": None,
                                                              "inject_layer": 3}}},
            "needs method hidrop with at least one filter, got no filter",
        ),
        ({"ratio": "learned"}, "ratio: Input should be 'fixed' or 'learnable'"),
        ({"ratio_weight": 0}, "ratio_weight: Input should be greater than 0"),
    ],
)  # fmt: skip
def test_a_ratio_that_cannot_be_learnt_is_one_line(settings: Settings, change: Settings, message: str) -> None:
    result = train(settings | LEARNABLE | change)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
