"""Small hand-made figures as docs/accuracy.json has them."""

from typing import Any

Row = dict[str, Any]


def row(group: str, label: str, accuracy: float, tokens: float | None, **more: Any) -> Row:
    kinds = {kind: {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy], "questions": 10} for kind in "ab"}
    kept = {"retention": accuracy / 0.9, "retention_interval": [0.5, 1.0]}
    reference = "ablation/dense" if group == "ablation" else "shipped/dense"
    return {
        "name": f"{group}/{label}",
        "group": group,
        "label": label,
        "reference": reference,
        "meaning": f"what {label} is",
        "stages": "576 in layers 0-11",
        "accuracy": accuracy,
        "interval": [accuracy - 0.05, accuracy + 0.05],
        "mean_vision_tokens": tokens,
        "questions": 20,
        "failed": 0,
        "by_type": {kind: figures | kept for kind, figures in kinds.items()},
        **kept,
        **more,
    }


def against(difference: float) -> Row:
    return {"against_hidrop": {"difference": difference, "interval": [difference - 0.02, difference + 0.02]}}


def result() -> Row:
    return {
        "task": "synthetic",
        "questions": 20,
        "limit": 20,
        "seed": 3,
        "concurrency": 4,
        "precision": "bfloat16",
        "flags": "--enforce-eager",
        "num_layers": 12,
        "late_layer": 4,
        "machine": "a processor, 2 cores, no GPU",
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {"vllm-hidrop": "0.1.0"},
        "rows": [
            row("shipped", "dense", 0.9, 576.0),
            row("shipped", "hidrop", 0.85, 64.0),
            row("equal_tokens", "fastv", 0.31, 63.6),
            row("late_cut", "random", 0.5, 208.0, failed=2),
            row("ablation", "dense", 0.8, 576.0, **against(0.05)),
            row("ablation", "hidrop", 0.75, 64.0, **against(0.0)),
            row("ablation", "hidrop_seed1", 0.737, 64.0, **against(-0.013)),
            row("ablation", "flat", 0.7, 64.0, **against(-0.05)),
        ],
        "left_out": [{"name": "ablation/strange", "reason": "unknown key"}],
        "agreement": [agreed("float32", 0.995, 0.002), agreed("bfloat16", 0.98, 0.002)],
    }


def agreed(precision: str, same: float, difference: float) -> Row:
    return {
        "checkpoint": "hidrop",
        "precision": precision,
        "questions": 20,
        "same": same,
        "served": 0.85 + difference,
        "training_code": 0.85,
        "difference": difference,
        "interval": [-0.004, 0.004],
    }
