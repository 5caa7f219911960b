"""MustDrop's reference for LLaVA-NeXT: every tile is an image of the tower, Hugging Face packs the tiles into one.

The packing drops patches that show padding and puts a newline behind each row of tiles. A window that merged is its
last patch that the packing leaves, and nothing where it leaves none; newlines always stay and are no key tokens.
"""

from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.mustdrop_tower import EncodedImage, Tower

NEWLINE = -1


def encode_tiles(
    model: Any, tower: Tower, pixels: torch.Tensor, image_size: torch.Tensor, settings: MustDropSettings
) -> EncodedImage:
    """One image: ``pixels`` [tiles, channels, height, width], maybe padded; ``image_size`` [2], its height and width.

    Margins are those of the tiles' decisions; ``windows`` are the tokens of each merged window.
    """
    config = model.config
    num_tiles = image_size_to_num_patches(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    tiles = [tower.encode(of_tile, settings) for of_tile in pixels[:num_tiles]]
    num_patches = len(tiles[0].features)
    features = torch.stack([tile.features for tile in tiles])
    numbers = torch.arange(num_tiles * num_patches).view(num_tiles, num_patches, 1)
    places = _packed(model, numbers, image_size, torch.tensor([NEWLINE]))[:, 0].tolist()
    token_of = {place: token for token, place in enumerate(places) if place != NEWLINE}
    alive, keys = [token for token, place in enumerate(places) if place == NEWLINE], []
    windows = []
    for number, tile in enumerate(tiles):
        members_of = {window[-1]: window for window in tile.windows}
        for patch in tile.alive:
            members = members_of.get(patch, [patch])
            features[number, members] = tile.features[patch]
            tokens = [token_of[place] for m in members if (place := number * num_patches + m) in token_of]
            alive += tokens[-1:]
            keys += tokens[-1:] if patch in tile.keys else []
            windows += [tokens] if patch in members_of and tokens else []
    margins = {name: min(tile.margins[name] for tile in tiles) for name in tiles[0].margins}
    rows = _packed(model, features, image_size, model.model.image_newline)
    return EncodedImage(rows, sorted(alive), sorted(keys), margins, windows)


def _packed(model: Any, tiles: torch.Tensor, image_size: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """[tokens, C] of the tiles' patches, [tiles, V, C], and newlines [C]."""
    strategy = model.config.vision_feature_select_strategy
    packed, _ = model.model.pack_image_features([tiles], image_size[None], strategy, image_newline=newline)
    rows: torch.Tensor = packed[0]
    return rows
