"""Operators that a step spends on scoring and selecting: as many for several images as for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.harness import Ask, Engine, engine, prompt
from vllm_hidrop.staged.timer import Timer
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

METHODS: dict[str, dict[str, Any]] = {
    "under the next layer": {"method": "hidrop", "preset": "tok48", "options": {"scale": True}},
    "under the last layer": {"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5], "keeps": [30, 3]}},
    "a fraction": {"method": "fastv"},
}


class Count(TorchDispatchMode):
    """Counts operators that a device would launch a kernel or a copy for: all but views and empty tensors."""

    num_launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        is_view = any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
        )
        self.num_launches += not is_view and not name.startswith(("empty", "new_empty", "lift_fresh", "detach"))
        return func(*args, **(kwargs or {}))


def launches(running: Engine, asks: list[Ask], monkeypatch: pytest.MonkeyPatch) -> int:
    """Of one step that prefills all of them."""
    count = Count()  # type: ignore[no-untyped-call]
    timed = Timer.running

    @contextmanager
    def counted(timer: Timer) -> Iterator[None]:
        with timed(timer), count:
            yield

    monkeypatch.setattr(Timer, "running", counted)
    running.ask(asks)
    monkeypatch.setattr(Timer, "running", timed)
    return count.num_launches


@pytest.mark.parametrize("choice", METHODS.values(), ids=METHODS)
def test_eight_images_take_at_most_half_more_operators_than_one(
    tmp_path_factory: pytest.TempPathFactory, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    model: Path = make_llava(tmp_path_factory.mktemp("llava"))
    one = Ask(prompt(rng, "3i5"), (1,), max_tokens=1)
    eight = Ask(prompt(rng, "3i2i2i2i2i2i2i2i5"), tuple(range(8)), max_tokens=1)
    others = [Ask(prompt(rng, f"{n}i5"), (n,), max_tokens=1) for n in range(1, 9)]
    with engine(model, choice, enable_prefix_caching=False) as running:
        alone, together, apart = (launches(running, asks, monkeypatch) for asks in ([one], [eight], others))
    print(f"launches: one image {alone}, eight in a prompt {together}, in eight prompts {apart}")
    assert alone > 0
    assert together <= 1.5 * alone
    assert apart <= 1.5 * alone
