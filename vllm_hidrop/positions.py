"""Position schemes: which RoPE id every row has; HiDrop section 3.3.

Knows places in a prompt; not layers, not tensors.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from vllm_hidrop.pruning import Span


class PositionScheme(StrEnum):
    """RoPE ids of the rows; all but the first are the paper's rejected ablations (section 4.3, table 5).

    A scheme belongs to a server, as the weights do. ``off`` and fallback requests of a grouped server are numbered in
    the grouped way too; a compacted server renumbers at cuts only, so it leaves a request without a cut as it is.
    Text-only requests are the same under all.

    ::

        prompt                     t t v v v v t t | o       t text, v vision, o generated
        persistent                 0 1 2 3 4 5 6 7 | 8       for ever: after a cut to two, 0 1 3 5 6 7 | 8
        compacted, after that cut  0 1   2   3 6 7 | 8
        grouped                    0 1 2 3 4 5 2 3 | 4       after that cut, 0 1 3 5 2 3 | 4
    """

    PERSISTENT = "persistent"
    """The full prompt's, for ever."""
    COMPACTED = "compacted"
    """After every scored cut an image's survivors are numbered on from the row before them, so from its first id (or
    from the last survivor of an image directly before it); text keeps its ids."""
    GROUPED = "grouped"
    """Text, prompt and generated, is numbered without the hole that images leave; vision keeps its ids, so the ranges
    overlap."""


def grouped_ids(places: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Grouped ids of some rows of one request.

    Args:
        places: int64 [T], the rows' places in the full sequence.
        spans: the images of the prompt.
    """
    ids = places.copy()
    is_vision = np.zeros(len(places), dtype=np.bool_)
    for span in spans:
        ids -= np.where(places >= span.end, span.length, 0)
        is_vision |= (places >= span.offset) & (places < span.end)
    return np.where(is_vision, places, ids)
