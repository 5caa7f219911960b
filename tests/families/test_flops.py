"""FLOPs of towers, projectors and text layers with experts, against PyTorch's counter on Hugging Face's own modules."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from vllm_hidrop.models.families import FAMILIES
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.shapes import text_shape

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = {"depth": 4, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN3 = QWEN | {"hidden_size": 48, "intermediate_size": 112, "out_hidden_size": 32, "num_position_embeddings": 64}
GLM = QWEN | {"hidden_size": 48, "intermediate_size": 112, "out_hidden_size": 32, "image_size": 32}
MOE = TEXT | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
QWEN3_MOE = MOE | {"num_experts": 6, "decoder_sparse_step": 2, "num_hidden_layers": 5, "mlp_only_layers": [3]}
GLM_MOE = MOE | {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1}
TILES = [[32, 64], [64, 32], [64, 64], [32, 96]]


def clip(**others: Any) -> transformers.PreTrainedConfig:
    return transformers.CLIPVisionConfig(**VIT, image_size=32, patch_size=4, **others)


def siglip(**others: Any) -> transformers.PreTrainedConfig:
    return transformers.SiglipVisionConfig(**VIT, image_size=32, patch_size=4, vision_use_head=False, **others)


@dataclass(frozen=True)
class Case:
    """A configuration, its pixels, and the spans and tiles that its prompt would have."""

    stock: str
    config: transformers.PreTrainedConfig
    inputs: dict[str, torch.Tensor]
    spans: tuple[Span, ...]
    num_tiles: int | None = None

    def counted_by_pytorch(self) -> int:
        """Of the tower and projector."""
        model = model_of(self.config)
        is_video = any("video" in name for name in self.inputs)
        encode = model.get_video_features if is_video else model.get_image_features
        return flops(lambda: encode(**self.inputs))


def model_of(config: transformers.PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"  # whose products the counter sees
    return AutoModel.from_config(config).eval()


def flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def patches(frames: int, height: int, width: int) -> torch.Tensor:
    """A Qwen-VL processor's: one row per patch of 2 x 4 x 4 x 3 values."""
    return torch.zeros(frames * height * width, 96)


def grid(*sizes: int) -> torch.Tensor:
    return torch.tensor([sizes])


def qwen(stock: str, config: Any, video: bool = False) -> Case:
    """An image of 12 x 8 patches, or three frames of 8 x 8."""
    if video:
        inputs = {"pixel_values_videos": patches(3, 8, 8), "video_grid_thw": grid(3, 8, 8)}
        return Case(stock, config, inputs, tuple(Span(20 * frame, 16) for frame in range(3)))
    return Case(stock, config, {"pixel_values": patches(1, 12, 8), "image_grid_thw": grid(1, 12, 8)}, (Span(0, 24),))


def qwen2_vl() -> Any:
    vision = QWEN | {"embed_dim": 48, "hidden_size": 32, "mlp_ratio": 3}
    return transformers.Qwen2VLConfig(text_config=TEXT | MROPE, vision_config=vision)


def qwen2_5_vl() -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 112, "out_hidden_size": 32, "window_size": 16}
    vision = QWEN | sizes | {"fullatt_block_indexes": [2]}
    return transformers.Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=vision)


def qwen3_vl() -> Any:
    vision = QWEN3 | {"deepstack_visual_indexes": [0, 2]}
    return transformers.Qwen3VLConfig(text_config=TEXT | MROPE, vision_config=vision)


def glm4v() -> Any:
    return transformers.Glm4vConfig(text_config=TEXT | MROPE, vision_config=GLM)


def glm4v_moe() -> Any:
    return transformers.Glm4vMoeConfig(text_config=GLM_MOE | MROPE, vision_config=GLM)


def glm_ocr() -> Any:
    return transformers.GlmOcrConfig(text_config=TEXT | MROPE, vision_config=GLM)


def llava() -> Case:
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=transformers.LlamaConfig(**TEXT), vision_feature_layer=-1
    )
    return Case("LlavaForConditionalGeneration", config, {"pixel_values": torch.zeros(1, 3, 32, 32)}, (Span(0, 64),))


def tiled(config_class: Any, stock: str, tower: Any) -> Case:
    """An image in three tiles side by side, and whole; padding hides half of every tile."""
    config = config_class(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**TEXT),
        vision_feature_layer=-1,
        image_grid_pinpoints=TILES,
        vision_feature_select_strategy="default" if tower.model_type == "clip_vision_model" else "full",
    )
    inputs = {"pixel_values": torch.zeros(1, 4, 3, 32, 32), "image_sizes": torch.tensor([[16, 96]])}
    return Case(stock, config, inputs, (Span(0, 64 + 4 * 25),), num_tiles=4)


def frames_of_onevision() -> Case:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=transformers.Qwen2Config(**TEXT), image_grid_pinpoints=TILES
    )
    inputs = {"pixel_values_videos": torch.zeros(1, 2, 3, 32, 32)}
    spans = (Span(0, 16), Span(16, 17))
    return Case("LlavaOnevisionForConditionalGeneration", config, inputs, spans)


def frames_of_next() -> Case:
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(), text_config=transformers.LlamaConfig(**TEXT), vision_feature_layer=-1
    )
    inputs = {"pixel_values_videos": torch.zeros(1, 2, 3, 32, 32)}
    return Case("LlavaNextVideoForConditionalGeneration", config, inputs, (Span(0, 16), Span(16, 16)))


def internvl() -> Case:
    tower = transformers.InternVLVisionConfig(**VIT, image_size=[32, 32], patch_size=[4, 4])
    config = transformers.InternVLConfig(
        vision_config=tower, text_config=transformers.Qwen2Config(**TEXT), image_seq_length=16
    )
    inputs = {"pixel_values": torch.zeros(3, 3, 32, 32)}
    return Case("InternVLForConditionalGeneration", config, inputs, (Span(0, 48),))


def mistral3() -> Case:
    tower = transformers.PixtralVisionConfig(**VIT, image_size=64, patch_size=4)
    config = transformers.Mistral3Config(
        vision_config=tower,
        text_config=transformers.MistralConfig(**TEXT),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    inputs = {"pixel_values": torch.zeros(1, 3, 32, 48), "image_sizes": torch.tensor([[32, 48]])}
    return Case("Mistral3ForConditionalGeneration", config, inputs, (Span(0, 27, num_separators=3),))


def idefics(config_class: Any, stock: str) -> Case:
    config = config_class(
        vision_config=VIT | {"image_size": 32, "patch_size": 4},
        text_config=transformers.LlamaConfig(**TEXT),
        scale_factor=2,
        image_token_id=5,
    )
    inputs = {"pixel_values": torch.ones(1, 5, 3, 32, 32)}
    return Case(stock, config, inputs, (Span(0, 5 * 16 + 9, num_separators=9),))


CASES: dict[str, Callable[[], Case]] = {
    "llava": llava,
    "llava_next": lambda: tiled(transformers.LlavaNextConfig, "LlavaNextForConditionalGeneration", clip()),
    "llava_next siglip": lambda: tiled(transformers.LlavaNextConfig, "LlavaNextForConditionalGeneration", siglip()),
    "llava_onevision": lambda: tiled(
        transformers.LlavaOnevisionConfig, "LlavaOnevisionForConditionalGeneration", siglip()
    ),
    "llava_onevision video": frames_of_onevision,
    "llava_next_video": frames_of_next,
    "qwen2_vl": lambda: qwen("Qwen2VLForConditionalGeneration", qwen2_vl()),
    "qwen2_vl video": lambda: qwen("Qwen2VLForConditionalGeneration", qwen2_vl(), video=True),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl()),
    "qwen2_5_vl video": lambda: qwen("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl(), video=True),
    "qwen3_vl": lambda: qwen("Qwen3VLForConditionalGeneration", qwen3_vl()),
    "qwen3_vl video": lambda: qwen("Qwen3VLForConditionalGeneration", qwen3_vl(), video=True),
    "glm4v": lambda: qwen("Glm4vForConditionalGeneration", glm4v()),
    "glm4v video": lambda: qwen("Glm4vForConditionalGeneration", glm4v(), video=True),
    "glm4v_moe": lambda: qwen("Glm4vMoeForConditionalGeneration", glm4v_moe()),
    "glm_ocr": lambda: qwen("GlmOcrForConditionalGeneration", glm_ocr()),
    "internvl": internvl,
    "mistral3": mistral3,
    "idefics3": lambda: idefics(transformers.Idefics3Config, "Idefics3ForConditionalGeneration"),
    "smolvlm": lambda: idefics(transformers.SmolVLMConfig, "SmolVLMForConditionalGeneration"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_towers_flops_are_those_that_pytorch_counts(name: str) -> None:
    case = CASES[name]()
    shape = FAMILIES[case.stock].vision_shape(case.config)
    assert shape is not None
    expected = case.counted_by_pytorch()
    assert shape.flops(shape.views(case.spans, case.num_tiles)) == expected


def test_windows_at_an_images_edge_count_as_full() -> None:
    config = qwen2_5_vl()
    inputs = {"pixel_values": patches(1, 14, 10), "image_grid_thw": grid(1, 14, 10)}
    case = Case("Qwen2_5_VLForConditionalGeneration", config, inputs, (Span(0, 35),))
    shape = FAMILIES[case.stock].vision_shape(config)
    assert shape is not None
    expected = case.counted_by_pytorch()
    assert expected < shape.flops(shape.views(case.spans)) < 1.01 * expected


def test_the_released_internvl_costs_what_hugging_faces_form_does() -> None:
    case = internvl()
    vision, text = case.config.vision_config, case.config.text_config
    released = SimpleNamespace(
        vision_config=SimpleNamespace(**vision.to_dict() | {"image_size": 16, "patch_size": 4}),
        llm_config=text,
        force_image_size=32,
        select_layer=-1,
        downsample_ratio=0.5,
    )
    theirs = FAMILIES[case.stock].vision_shape(case.config)
    assert FAMILIES["InternVLChatModel"].vision_shape(released) == theirs


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)])
def test_without_pixels_the_tiles_of_a_picture_without_padding_follow_from_its_tokens(rows: int, columns: int) -> None:
    case = tiled(transformers.LlavaNextConfig, "LlavaNextForConditionalGeneration", clip())
    shape = FAMILIES[case.stock].vision_shape(case.config)
    assert shape is not None
    tokens = 64 + 8 * rows * (8 * columns + 1)
    assert shape.views([Span(0, tokens)]) == [64] * (rows * columns + 1)
    assert shape.views([Span(0, 64)]) == [64]


def text_layers(config: Any) -> Any:
    config._experts_implementation = "eager"  # an expert runs the rows that chose it
    return model_of(config).layers


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: transformers.Qwen3VLMoeTextConfig(**QWEN3_MOE | MROPE), id="qwen3_vl_moe"),
        pytest.param(lambda: transformers.Glm4vMoeTextConfig(**GLM_MOE | MROPE), id="glm4v_moe"),
        pytest.param(lambda: transformers.LlamaConfig(**TEXT), id="llama"),
    ],
)
def test_a_text_layers_flops_are_those_that_pytorch_counts_with_the_experts_that_run(config: Any) -> None:
    config, rows = config(), 11
    shape, width = text_shape(config), 2 * 16
    rope = torch.zeros(1, rows, 16), torch.zeros(1, rows, 16)
    for index, layer in enumerate(text_layers(config)):
        expected = flops(partial(layer, torch.randn(1, rows, 32), position_embeddings=rope))
        # PyTorch's products are of all pairs of rows; ours of those that a causal mask leaves.
        assert shape.layer_flops(rows, index) == expected - 2 * width * rows * (rows - 1), index


def test_experts_are_all_in_memory_and_a_step_reads_those_that_its_rows_choose() -> None:
    shape = text_shape(transformers.Glm4vMoeTextConfig(**GLM_MOE | MROPE))
    model = model_of(transformers.Glm4vMoeTextConfig(**GLM_MOE | MROPE))
    matrices = sum(each.numel() for each in model.layers.parameters() if each.dim() > 1)
    assert shape.num_weights == matrices + 32 * 64
    assert shape.active_weights == shape.num_weights - 2 * 4 * 3 * 32 * 24  # four experts idle in two layers
    assert shape.weights_read(1) == pytest.approx(shape.active_weights)
    assert shape.weights_read(1) < shape.weights_read(4) < shape.weights_read(1000) <= shape.num_weights
    llama = text_shape(transformers.LlamaConfig(**TEXT))
    assert llama.num_weights == llama.active_weights == llama.weights_read(7)
