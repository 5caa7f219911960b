"""Which vision tokens every stage ran, for requests that ask: read from the layers' rows, not from plans or scores."""

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
    """By request id, the vision tokens of pruned prompts; one transfer to the host, and none where no request asks.

    ``rows[s]``, int64 [T], are indices of the rows of stage ``s`` among the full rows and, after them, the carried.
    """
    asking = [prefill for prefill in step.prefills if prefill.plan.explains]
    if not asking:
        return {}
    ends = np.cumsum([len(of_stage) for of_stage in rows])
    by_stage = np.split(torch.cat(list(rows)).cpu().numpy(), ends[:-1])
    return {
        prefill.request_id: [_in_stage(step, stage, prefill, full) for stage, full in enumerate(by_stage)]
        for prefill in asking
    }


def _in_stage(step: StagedStep, stage: int, prefill: PrunedPrefill, full: npt.NDArray[np.int64]) -> list[list[int]]:
    plan = prefill.plan
    found = []
    for image, span in enumerate(plan.spans):
        if prefill.is_carried(image) and stage < plan.first_cut:
            # A reused image has no rows here; a stage before the first cut caches all of an image or nothing.
            found.append(list(range(plan.kept[stage][image])))
            continue
        places = full - full_row(step, prefill, image)
        found.append(np.sort(places[(places >= 0) & (places < span.length)]).tolist())
    return found


def every_patch(plan: Plan) -> Patches:
    """All vision tokens in every stage, of a prompt that is not pruned."""
    return [[list(range(num_kept)) for num_kept in kept] for kept in plan.kept]
