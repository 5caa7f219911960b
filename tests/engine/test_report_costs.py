"""What a report's FLOPs read of a request: the tiles that the tower ran, and sizes that went through JSON."""

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import TypeAdapter

from vllm_hidrop.engine.report import Costing, num_tiles
from vllm_hidrop.methods.fastv import FastV
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.planner import Alternative, Planner
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.shapes import Experts, TextShape
from vllm_hidrop.plan.vision import VisionShape

TEXT = TextShape(4, 8, 16, 2, 1, 4, 32, experts=Experts(4, 2, 6, 3, (1, 3)))
VISION = VisionShape(2, 8, 64, 4, 100, tile_patches=16, tile_tokens=20, num_class_tokens=1)


def feature(shape: tuple[int, ...] | None) -> Any:
    """vLLM's, with pixels of that shape; None: features that a client sent."""
    if shape is None:
        return SimpleNamespace(data={"image_embeds": SimpleNamespace(data=torch.zeros(3, 8))})
    return SimpleNamespace(data={"pixel_values": SimpleNamespace(data=torch.zeros(shape))})


def costing() -> Costing:
    """As an engine reads it from its configuration, which travels as JSON."""
    schedule = Schedule.of({0: "all", 2: 0.5}, 4)
    methods = {"fastv": Alternative(schedule, FastV.signal, adaptive=False)}
    planner = Planner("fastv", None, methods, 1000, PositionScheme.PERSISTENT)
    shapes = json.loads(json.dumps({"text": asdict(TEXT), "vision": asdict(VISION)}))
    text = TypeAdapter(TextShape).validate_python(shapes["text"])
    vision = TypeAdapter(VisionShape | None).validate_python(shapes["vision"])
    assert (text, vision) == (TEXT, VISION)
    return Costing(planner, text, vision, 1, {})


def test_tiles_are_read_off_the_pixels_of_an_image_that_was_cut() -> None:
    features = [feature((5, 3, 16, 16)), feature((3, 16, 16)), feature((96, 48)), feature(None)]
    assert num_tiles([*features, SimpleNamespace(data=None)]) == {0: 5}


def test_a_request_costs_the_tower_by_the_tiles_and_frames_of_each_item() -> None:
    found, schedule = costing(), costing().planner.schedule
    video = [Span(60 + 5 * frame, 5, 1) for frame in range(3)]
    plan = make_plan(schedule, 100, [Span(0, 50, 0), *video])
    text = found.flops_dense(plan, [], {})
    assert text == TEXT.layers_flops(100, range(4)) + TEXT.lm_head_flops
    assert found.flops_dense(plan, [0, 1], {0: 5}) - text == VISION.flops([16] * 8)
    assert found.flops_dense(plan, [0], {}) - text == VISION.flops([16] * 3)
