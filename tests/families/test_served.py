"""Every family over HTTP: images of two sizes, a video, text alone and a bad option, by the openai client."""

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError

from tests.engine.harness import picture
from tests.families.checkpoints import CHECKPOINTS
from tests.server.conftest import serving
from tests.server.harness import Server, data_url, kept
from tests.server.media.clips import clip

pytestmark = pytest.mark.server

ALIKE = (
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl_moe",
    "glm4v_moe",
    "idefics3",
    "qwen3_5_moe",
    "internvl_chat",
    "internvl_chat_internlm2",
    "glm_ocr",
)
"""Served only in slow tests: another of the same code is served in every run."""
FLAGS = (
    *("--method", "fastv", "--max-model-len", "1024", "--block-size", "32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(1 << 28), "--skip-mm-profiling", "--max-video-frames", "8"),
)


def image(seed: int, size: tuple[int, int]) -> dict[str, Any]:
    file = BytesIO()
    picture(seed, size).save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}


def video() -> dict[str, Any]:
    file = base64.b64encode(clip(num_frames=40, size=(64, 64))).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{file}"}}


def asked(server: Server, parts: list[dict[str, Any]], **xargs: Any) -> dict[str, Any]:
    """The report of an answer."""
    content: Any = [{"type": "text", "text": "t5 t6"}, *parts, {"type": "text", "text": "t7 t8"}]
    answer = server.openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=3,
        temperature=0,
        extra_body={"vllm_xargs": xargs} if xargs else {},
    )
    report: dict[str, Any] = answer.model_dump()["hidrop"]
    return report


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in CHECKPOINTS]
)
def test_a_family_answers_pruned_and_dense(name: str, checkpoint: Callable[[str], Path]) -> None:
    family = CHECKPOINTS[name]
    prompts = [[image(i, size)] for i, size in enumerate(family.image_sizes)] if family.image else []
    prompts += [[*prompts[0], *prompts[1]]] if len(prompts) > 1 else []
    prompts += [[video()]] if family.video else []
    remote_code = ["--trust-remote-code"] if family.is_remote_code else []
    with serving([str(checkpoint(name)), "--dtype", family.dtype, *remote_code, *FLAGS]) as server:
        for parts in prompts:
            report, off = asked(server, parts), asked(server, parts, hidrop="off")
            assert (report["mode"], off["mode"]) == ("pruned", "off")
            first, *later = kept(report)
            assert first == off["vision_tokens"] > 0
            assert later
            assert all(0 < count <= first // 2 for count in later)
            assert report["prefill_flops"] < report["prefill_flops_dense"]
        assert asked(server, [])["mode"] == "text"
        with pytest.raises(BadRequestError, match="hidrop_keep"):
            asked(server, prompts[0], hidrop_keep="few")
