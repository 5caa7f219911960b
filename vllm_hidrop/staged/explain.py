"""Which vision tokens every stage of a step really ran with, for the requests that ask.

Read from the rows that the layers ran on, after every cut: not from plans, not from scores.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.staged.image_runs import full_row
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep

Patches = list[list[list[int]]]
"""Per stage and image, vision tokens: ascending, zero-based inside the image."""


def patches_run(step: StagedStep, rows: Sequence[torch.Tensor]) -> dict[str, Patches]:
    """By request id, of the pruned prompts that ask; one transfer to the host, and none where nobody asks.

    Args:
        step: with the counts it ran with.
        rows: of every stage, int64 [T], its rows among the step's full rows and, after them, the carried ones.
    """
    asking = [prefill for prefill in step.prefills if prefill.plan.explains]
    if not asking:
        return {}
    together = torch.cat(list(rows)).cpu().numpy()
    ends = np.cumsum([len(of_stage) for of_stage in rows])
    by_stage = np.split(together, ends[:-1])
    return {
        prefill.request_id: [_in_stage(step, stage, prefill, full) for stage, full in enumerate(by_stage)]
        for prefill in asking
    }


def _in_stage(step: StagedStep, stage: int, prefill: PrunedPrefill, full: npt.NDArray[np.int64]) -> list[list[int]]:
    plan = prefill.plan
    found = []
    for image, span in enumerate(plan.spans):
        if prefill.is_carried(image) and stage < plan.first_cut:
            # Reused, so not among the rows: a stage before the first cut caches all of an image or nothing.
            found.append(list(range(plan.kept[stage][image])))
            continue
        places = full - full_row(step, prefill, image)
        found.append(np.sort(places[(places >= 0) & (places < span.length)]).tolist())
    return found


def every_patch(plan: Plan) -> Patches:
    """Of a prompt that is not pruned: everything, in every stage."""
    return [[list(range(num_kept)) for num_kept in kept] for kept in plan.kept]
