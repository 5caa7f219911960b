"""Names of weights: original LLaVA and CLIP on one side, the hub's LLaVA on the other. Reads no file."""

ORIGINAL_PREFIXES = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
"""The first prefix that fits is replaced; a name that fits none is not LLaVA-1.5's."""
MODULE_PREFIXES = (
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""From transformers' module names."""
BUFFERS = (".rotary_emb.inv_freq", ".position_ids")
"""Not weights: computed when a model is built."""
OTHER_CLIP_PARTS = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")
EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
PROJECTOR = "multi_modal_projector."
TOWER = "vision_tower."


def from_original(name: str) -> str | None:
    """The hub's name of a weight of an original checkpoint, or None for a buffer.

    A name of no known part is returned as it is.
    """
    if name.endswith(BUFFERS):
        return None
    if name.startswith("mm_projector."):  # as some projector-only files name it
        name = f"model.{name}"
    return _replaced(name, ORIGINAL_PREFIXES)


def from_tower(name: str) -> str | None:
    """The hub's name of a weight of a CLIP checkpoint, or None for a buffer or a part LLaVA has no use for."""
    if name.endswith(BUFFERS) or name.startswith(OTHER_CLIP_PARTS):
        return None
    return f"{TOWER}{name}"


def from_module(name: str) -> str | None:
    """The hub's name of a parameter of transformers' LLaVA, or None for a buffer."""
    return None if name.endswith(BUFFERS) else _replaced(name, MODULE_PREFIXES)


def _replaced(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
