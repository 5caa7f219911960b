"""The sizes of a vision tower and projector as they run, and their FLOPs for an image or video of any size.

Counted as in ``plan.shapes``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from vllm_hidrop.plan.places import Span


@dataclass(frozen=True)
class VisionShape:
    """A ViT, and the matrices that project its patches to the text model.

    What is seen of an image or video are *views*, and a patch attends to the patches of its own view: a frame of a
    video, a tile of an image where the tower has one size (the whole image scaled down is one of them), else the image.

    Attributes:
        num_layers: layers that run (LLaVA reads the last but one, so the last never does).
        mlp_weights: weights that a row meets in a layer's MLP.
        patch_size: pixels of a patch's side.
        projector_weights: weights that each projected row meets, of all projectors (deepstack has several).
        patch_frames: frames in a patch; an image is repeated.
        merge: patches of a side that are joined, or pooled, to one row before they are projected.
        tile_patches: patches of a tile; None: there are no tiles, and a view has ``merge * merge`` patches per token.
        tile_tokens: the most vision tokens of a tile, newlines included.
        num_class_tokens: rows of a view besides its patches.
        window_patches: in ``num_window_layers`` of the layers a patch attends to a window of so many patches.
    """

    num_layers: int
    hidden_size: int
    mlp_weights: int
    patch_size: int
    projector_weights: int
    num_channels: int = 3
    patch_frames: int = 1
    merge: int = 1
    tile_patches: int | None = None
    tile_tokens: int = 1
    num_class_tokens: int = 0
    window_patches: int = 0
    num_window_layers: int = 0

    def views(self, spans: Iterable[Span], num_tiles: int | None = None) -> list[int]:
        """Patches of each view of an image, given as its one span, or of a video, given as its frames.

        Without ``num_tiles``, tiles are the least that have so many tokens. That is exact where all tiles keep all
        their tokens; LLaVA-NeXT and OneVision cut padding off, which can hide a tile.
        """
        tokens = [span.length - span.num_separators for span in spans]
        if self.tile_patches is None:
            return [self.merge**2 * count for count in tokens]
        if num_tiles is None:
            num_tiles = sum(ceil(count / self.tile_tokens) for count in tokens)
        return [self.tile_patches] * num_tiles

    def flops(self, views: Sequence[int], patches_left: int | None = None) -> int:
        """FLOPs of an image or video: per view, ``2 P c f p^2 C``, ``L (T (8 C^2 + 2 M) + 4 C T^2)``, projector.

        P patches of side p, f frames and c channels, T rows (P and class tokens), L layers, C hidden size, M weights of
        an MLP; attention is bidirectional, and in window layers meets W patches: ``4 C T W``. Windows count as full:
        those at an image's edge may be smaller. Layers after the first, and the projector, run ``patches_left`` of a
        view's patches (None: all).
        """
        return sum(self._view_flops(patches, patches if patches_left is None else patches_left) for patches in views)

    def _view_flops(self, patches: int, left: int) -> int:
        elements = self.num_channels * self.patch_frames * self.patch_size**2
        rows, rows_left = patches + self.num_class_tokens, left + self.num_class_tokens
        layers = self._layer_flops(rows, rows)
        layers += (self.num_layers - self.num_window_layers - 1) * self._layer_flops(rows_left, rows_left)
        layers += self.num_window_layers * self._layer_flops(rows_left, min(rows_left, self.window_patches))
        projector = 2 * (left // self.merge**2) * self.projector_weights
        return 2 * patches * elements * self.hidden_size + layers + projector

    def _layer_flops(self, rows: int, attended: int) -> int:
        return rows * (8 * self.hidden_size**2 + 2 * self.mlp_weights + 4 * self.hidden_size * attended)


LLAVA_7B_VISION = VisionShape(
    num_layers=23,
    hidden_size=1024,
    mlp_weights=2 * 1024 * 4096,
    patch_size=14,
    projector_weights=1024 * 4096 + 4096 * 4096,
    tile_patches=576,
    tile_tokens=576,
    num_class_tokens=1,
)
"""CLIP ViT-L/14 at 336 pixels up to its last but one layer, projected to 4096."""
LLAVA_13B_VISION = replace(LLAVA_7B_VISION, projector_weights=1024 * 5120 + 5120 * 5120)
"""The same tower, projected to 5120."""
