"""What a decode step launches for its stages, outside a graph: the same few kernels for any number of KV groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpretedFunction

from tests.engine.harness import Ask, engine, prompt
from tests.engine.test_selection_launches import Count
from vllm_hidrop.runners import v2
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

CHOICES: dict[str, dict[str, Any]] = {
    "hidrop": {"method": "hidrop", "preset": "tok48", "options": {"scale": True}},
    "a group per layer": {
        "method": "pyramiddrop",
        "options": {"cuts": [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8], "keeps": [60, 50, 40, 30, 20, 10, 5]},
    },
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_decode_step_launches_at_most_twelve_kernels_for_all_groups(
    tmp_path: Path, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[str]]] = []
    kernels: list[str] = []
    count = Count()  # type: ignore[no-untyped-call]
    run, prepare = InterpretedFunction.run, v2.StagedRunner.prepare_attn

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(kernel.fn.__name__)
        before = count.num_launches
        result = run(kernel, *args, **kwargs)
        count.num_launches = before  # the interpreter moves tensors about
        return result

    def counted(runner: Any, batch: Any) -> Any:
        kernels.clear()
        count.num_launches = 0
        with count:
            prepared = prepare(runner, batch)
        if not batch.has_prefill:
            seen.append((count.num_launches, list(kernels)))
        return prepared

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    monkeypatch.setattr(v2.StagedRunner, "prepare_attn", counted)
    rng = np.random.default_rng(2)
    asks = [Ask(prompt(rng, f"{n}i{n}"), (n,), max_tokens=4) for n in range(1, 4)]
    with engine(make_llava(tmp_path), choice) as running:
        running.ask(asks)
        num_groups = len(running.scheduler.kv_cache_config.kv_cache_groups)
    assert num_groups > 4
    assert len(seen) == 3
    for num_operators, of_triton in seen:
        assert of_triton == ["_gather_block_tables_kernel", "write_slots_kernel"]
        assert num_operators + len(of_triton) <= 12
