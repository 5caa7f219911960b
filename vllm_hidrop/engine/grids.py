"""Where the tokens of a request's images and frames lie, for reports that list tokens."""

from collections import Counter
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any, Protocol, cast

from vllm_hidrop.plan.grid import Grid
from vllm_hidrop.plan.places import Span


class GridFamily(Protocol):
    """What is asked of a model family, see ``models.family``."""

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """The cells of an image's tokens, or of those of every frame of a video."""


def grid_family(vllm_config: Any) -> GridFamily:
    """The served model's family, by the name that the configuration hook noted: this package imports no model."""
    return cast(GridFamily, resolve_name(vllm_config.additional_config["hidrop"]["resolved"]["family"])())


def spans_on_grids(spans: Sequence[Span], mm_features: Sequence[Any], vllm_config: Any) -> list[dict[str, Any]]:
    """Per span: image or video, frame, number of tokens, and the grid or None where it is not known, as JSON values.

    ``mm_features`` are vLLM's ``MultiModalFeatureSpec`` of the request whose ``spans`` these are.
    """
    family, config = grid_family(vllm_config), vllm_config.model_config.hf_config
    features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
    grids = [family.grid(feature, config) for feature in features]
    frames: Counter[int] = Counter()
    found = []
    for span in spans:
        grid = grids[span.item]
        frame = frames[span.item] if features[span.item].modality == "video" else None
        frames[span.item] += 1
        found.append(
            {
                "item": span.item,
                "frame": frame,
                "tokens": span.length,
                "grid": grid.dump() if grid is not None and grid.end <= span.length else None,
            }
        )
    return found
