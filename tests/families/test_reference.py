"""The reference that judges pruned prompts, on every family: all kept, it is Hugging Face's own forward."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from tests.engine.harness import picture
from tests.families.checkpoints import CHECKPOINTS
from vllm_hidrop.verify.reference.attention import load_model
from vllm_hidrop.verify.reference.pruning import StagedSettings
from vllm_hidrop.verify.reference.shortened import Reference
from vllm_hidrop.verify.reference.stages import OracleStage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.mark.parametrize(
    "name", [name for name, family in CHECKPOINTS.items() if family.image and not family.is_remote_code]
)
def test_pictures_and_expanded_tokens_are_all_it_needs(checkpoint: Callable[[str], Path], name: str) -> None:
    family, directory = CHECKPOINTS[name], checkpoint(name)
    images: list[Any] = [picture(i, size) for i, size in enumerate(family.image_sizes[:2])]
    processor = AutoProcessor.from_pretrained(directory)
    text = " ".join(processor.tokenizer.convert_ids_to_tokens(family.prompt("2i3i4")))
    made = processor(text=[text], images=images, return_tensors="pt")
    tokens = made["input_ids"][0].tolist()
    is_vision = [token in processor.image_token_ids for token in tokens]
    runs = [list(run) for kind, run in groupby(range(len(tokens)), is_vision.__getitem__) if kind]
    spans = [(run[0], run[-1] + 1) for run in runs]

    reference = Reference(directory)
    prepared = reference.prompt(tokens, images)
    dense = reference.run(prepared, spans, None, 3)
    model = load_model(directory, torch.float32)
    model.generation_config.eos_token_id = None
    greedy = model.generate(**made, do_sample=False, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
    assert dense.token_ids == greedy.sequences[0, len(tokens) :].tolist()
    torch.testing.assert_close(dense.logits, torch.cat(greedy.logits).float(), rtol=2e-4, atol=2e-4)

    sizes = tuple(len(run) for run in runs)
    stages = [OracleStage(0, (0,) * len(sizes)), OracleStage(4, sizes), OracleStage(6, tuple(n // 3 for n in sizes))]
    pruned = reference.run(prepared, spans, StagedSettings(stages, "random"))
    counts = [tuple(len(tokens) for tokens in layer) for layer in pruned.kept]
    assert counts[3:7] == [(0,) * len(sizes), sizes, sizes, stages[2].keep]
    assert bool((pruned.logits - dense.logits[:1]).abs().max() > 1e-2)
