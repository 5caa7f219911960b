"""The arms ``hidrop eval --embedded`` compares. The one place that says which checkpoint answers for which arm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_hidrop.embedded import CHECKPOINTS


@dataclass(frozen=True)
class Arm:
    """A checkpoint and how it is asked.

    Attributes:
        serve: arguments of ``hidrop serve``, a checkpoint directory and flags; none serve the embedded model with its
            defaults. Arms with the same arguments share a server.
        xargs: the ``vllm_xargs`` of every request.
    """

    name: str
    serve: tuple[str, ...] = ()
    xargs: Mapping[str, Any] = field(default_factory=dict)


def embedded_arms() -> tuple[Arm, Arm]:
    """The dense checkpoint, then the pruned one with its own schedule."""
    dense, hidrop = (Arm(name, (str(CHECKPOINTS[name]),)) for name in ("dense", "hidrop"))
    return dense, hidrop
