"""The registry of pruning methods. To add one: write ``methods/<paper>.py`` and add a row here."""

from vllm_hidrop.methods.adaptive import Adaptive
from vllm_hidrop.methods.base import Method, ModelShape
from vllm_hidrop.methods.controls import Random, Uniform
from vllm_hidrop.methods.fastv import FastV
from vllm_hidrop.methods.hidrop import HiDrop
from vllm_hidrop.methods.mustdrop import MustDrop
from vllm_hidrop.methods.none import NoPruning
from vllm_hidrop.methods.pyramiddrop import PyramidDrop
from vllm_hidrop.methods.visipruner import VisiPruner

__all__ = ["METHODS", "Adaptive", "Method", "ModelShape"]

METHODS: dict[str, type[Method]] = {
    "none": NoPruning,
    "hidrop": HiDrop,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "visipruner": VisiPruner,
    "mustdrop": MustDrop,
    "random": Random,
    "uniform": Uniform,
}
