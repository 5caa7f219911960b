"""The rows that stay at a cut, of all images together: as many kernels for many images as for one."""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d


def select_rows(scores: Sequence[torch.Tensor], keeps: Sequence[int], first_rows: Sequence[int]) -> torch.Tensor:
    """For each of I images, in order, the rows of its highest scores, ascending: int64 [sum of keeps].

    The same as :func:`select_top` for each image, its rows counted from ``first_rows[i]``. Nothing is read back: all
    sizes are known on the host.

    Args:
        scores: float32 [V_i], one per row of the image.
        keeps: rows of the image that stay, 0 < keep <= V_i.
        first_rows: the image's first row.
    """
    device = scores[0].device
    num_rows, most = np.array([len(each) for each in scores]), max(keeps)
    flat = torch.cat(list(scores))
    padded = flat.view(len(scores), -1) if (num_rows == num_rows[0]).all() else _padded(flat, num_rows)
    chosen = torch.sort(padded, dim=1, descending=True, stable=True).indices[:, :most]
    is_kept = np.arange(most) < np.array(keeps)[:, None]
    if is_kept.all():
        chosen = chosen.sort(dim=1).values
    else:
        stays = async_tensor_h2d(is_kept, device=device)
        chosen = chosen.where(stays, padded.shape[1]).sort(dim=1).values
    rows = chosen + async_tensor_h2d(np.array(first_rows)[:, None], device=device)
    return rows.flatten() if is_kept.all() else rows.take(async_tensor_h2d(np.flatnonzero(is_kept), device=device))


def _padded(flat: torch.Tensor, num_rows: np.typing.NDArray[np.int64]) -> torch.Tensor:
    """Scores of all images, [sum of num_rows], as rows of equal length, padded at the right with the lowest score."""
    places = np.arange(num_rows.max())
    index = np.where(places < num_rows[:, None], places + (num_rows.cumsum() - num_rows)[:, None], len(flat))
    return torch.nn.functional.pad(flat, (0, 1), value=-torch.inf)[async_tensor_h2d(index, device=flat.device)]
