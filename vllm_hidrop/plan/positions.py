"""Position schemes: which RoPE id every row has; HiDrop section 3.3, and the released PyramidDrop and MustDrop."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from vllm_hidrop.plan.places import Span


class PositionScheme(StrEnum):
    """How rows get their RoPE ids. Compacted and grouped are HiDrop's rejected ablations (section 4.3, table 5).

    A scheme belongs to a server, as the weights do. Grouped numbers ``off`` and fallback requests too; compacted and
    renumbered change ids at cuts only, so a request without a cut keeps the prompt's. Text-only requests are the same
    under all.

    ::

        prompt                      t t v v v v t t | o       t text, v vision, o generated
        persistent                  0 1 2 3 4 5 6 7 | 8       for ever: after a cut to two, 0 1 3 5 6 7 | 8
        compacted, after that cut   0 1   2   3 6 7 | 8
        grouped                     0 1 2 3 4 5 2 3 | 4       after that cut, 0 1 3 5 2 3 | 4
        renumbered, after that cut  0 1   2   3 4 5 | 6
    """

    PERSISTENT = "persistent"
    """Every row keeps its id of the full prompt in every layer."""
    COMPACTED = "compacted"
    """After every scored cut an image's survivors are numbered on from the row before them: from the image's first id,
    or from the last survivor of an image directly before it. Text keeps its ids."""
    GROUPED = "grouped"
    """Text, prompt and generated, is numbered as if there were no image; vision keeps its ids, so ranges overlap."""
    RENUMBERED = "renumbered"
    """Every layer numbers the rows that it runs 0, 1, 2, ..., text included, and a generated token's id is the length
    of the layer's cache: as in the released PyramidDrop, which trains so, and MustDrop. Merged tokens come first in
    their image, by falling similarity of their windows, as in MustDrop's code. Where a cache is cut after the prompt,
    its keys keep their ids, so generated tokens may stand before them: an artefact of the released MustDrop, kept.

    RoPE makes attention depend on differences of ids only, so a layer's rows get these ids plus the number of tokens
    that the layer dropped (``StagedStep.renumbered_ids``): then generated tokens have the full sequence's ids in every
    layer, and vLLM's own decode can run them."""


def grouped_ids(places: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Grouped ids of one request's rows, int64 [T], from their ``places`` in the full sequence, int64 [T]."""
    ids = places.copy()
    is_vision = np.zeros(len(places), dtype=np.bool_)
    for span in spans:
        ids -= np.where(places >= span.end, span.length, 0)
        is_vision |= (places >= span.offset) & (places < span.end)
    return np.where(is_vision, places, ids)
