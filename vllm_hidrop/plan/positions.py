"""Position schemes: which RoPE id every row has; HiDrop section 3.3, and the released PyramidDrop and MustDrop."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from vllm_hidrop.plan.places import Span


class PositionScheme(StrEnum):
    """RoPE ids of the rows. Compacted and grouped are HiDrop's rejected ablations (section 4.3, table 5).

    A scheme belongs to a server, as the weights do. ``off`` and fallback requests of a grouped server are numbered in
    the grouped way too; the others renumber at cuts only, so they leave a request without a cut as it is. Text-only
    requests are the same under all.

    ::

        prompt                      t t v v v v t t | o       t text, v vision, o generated
        persistent                  0 1 2 3 4 5 6 7 | 8       for ever: after a cut to two, 0 1 3 5 6 7 | 8
        compacted, after that cut   0 1   2   3 6 7 | 8
        grouped                     0 1 2 3 4 5 2 3 | 4       after that cut, 0 1 3 5 2 3 | 4
        renumbered, after that cut  0 1   2   3 4 5 | 6
    """

    PERSISTENT = "persistent"
    """The full prompt's, for ever."""
    COMPACTED = "compacted"
    """After every scored cut an image's survivors are numbered on from the row before them, so from its first id (or
    from the last survivor of an image directly before it); text keeps its ids."""
    GROUPED = "grouped"
    """Text, prompt and generated, is numbered without the hole that images leave; vision keeps its ids, so the ranges
    overlap."""
    RENUMBERED = "renumbered"
    """In every layer the rows that it runs are 0, 1, 2, ..., text included, and a generated token's id is the length of
    the layer's cache: as in the released PyramidDrop, which trains so, and MustDrop. Merged tokens come first in their
    image, the most alike window before the others, as in MustDrop's code. Where a cache is cut after the prompt its
    keys keep their ids, so generated tokens may stand before them: an artefact of the released MustDrop, kept.

    Q and K meet in differences of ids only, so what is stored is the id plus the number of tokens that the layer
    dropped (``StagedStep.renumbered_ids``): rows are packed towards the end of the prompt, and generated tokens have
    the ids of the full sequence in every layer."""


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
