"""What is public of HiDrop's checkpoints: names of runs, and which numbers belong to them.

From the released scripts and the paper (section 4.1). The hub's file list was not seen. A run's folder is named
``llava-v1.5-7b-exit-topk-Tok64``: size, program, and the mean number of vision tokens, then a letter or the filter
layers where there are several of a mean. Nothing in the folder repeats the schedule. Scripts are of the 7B model only;
runs called 3b in its result files are taken for MobileLLaMA-2.7B.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_hidrop.lab.convert.original import Original
from vllm_hidrop.methods import METHODS

NO_PRESET = "none"
PRESETS = (*(name for name in METHODS["hidrop"].presets if name != "embedded"), NO_PRESET)
ALIASES = {"c1": "tok48-c1"}
RUNS = {
    "tok48": "tok48",
    "tok48-t10t14t16t18": "tok48",
    "tok48-c1": "tok48-c1",
    "tok64": "tok64",
    "tok64-t10t14t16t18": "tok64",
    "tok80": "tok80",
}
"""Runs of the 7B model whose schedule is in a released script, by name; and its preset."""
RUN = re.compile(r"exit-topk-(tok\d+(?:-(?:c\d+|(?:t\d+)+))?)$", re.IGNORECASE)
SIZE = re.compile(r"(?<![\d.])(2\.7|3|7|13)b(?![a-z])", re.IGNORECASE)
SIZES_BY_SHAPE = {(32, 2560): "2.7b", (32, 4096): "7b", (40, 5120): "13b"}
"""Layers and hidden size of MobileLLaMA-2.7B, Vicuna-7B and Vicuna-13B."""
KNOWN = {
    "2.7b": "for MobileLLaMA-2.7B the paper names injection 15, filters 16, 19, 22, 25 and exit 28, and no keeps",
    "13b": "for Vicuna-13B no number of the schedule is published",
}
EXAMPLE = '{"inject_layer": 15, "filter_layers": [16], "keeps": [64], "exit_layer": 28}'
OWN = f"give your own, such as --schedule '{EXAMPLE}'"


@dataclass(frozen=True)
class Choice:
    """The schedule of a conversion: ``label`` names it in the manifest, ``entry`` is "hidrop" of ``config.json``."""

    label: str
    entry: Mapping[str, Any] | None
    warnings: tuple[str, ...] = ()


def size_of(original: Original) -> str | None:
    """One of 2.7b, 7b and 13b, by the folder's name, the name in its configuration, or the sizes of its layers."""
    config = original.config
    for name in (original.directory.resolve().name, str(config.get("_name_or_path") or "")):
        if found := SIZE.search(name):
            return {"3": "2.7b", "2.7": "2.7b"}.get(found[1], f"{found[1]}b")
    return SIZES_BY_SHAPE.get((config.get("num_hidden_layers", 0), config.get("hidden_size", 0)))


def choose(preset: str | None, schedule: Mapping[str, Any] | None, original: Original) -> Choice:
    """The schedule from the user's preset or own options, or the folder's name.

    Raises ValueError: an unknown preset, one of another size, or no choice for a checkpoint trained with a schedule
    that nothing names.
    """
    if schedule is not None:
        if preset is not None:
            raise ValueError("--preset and --schedule are two choices; give one")
        label = ", ".join(f"{key} {schedule[key]}" for key in sorted(schedule))
        return Choice(label, {"method": "hidrop", "options": dict(schedule)}, _untrained("the schedule", original))
    named = _run_of(original)
    chosen = _checked(preset, original) if preset is not None else _inferred(named, original)
    if chosen == NO_PRESET:
        pruned = "this checkpoint was trained with a HiDrop schedule; without a preset it will be served dense"
        return Choice(chosen, None, (pruned,) if original.is_pruned else ())
    warnings = _untrained(f"HiDrop preset {chosen}", original)
    if named is not None and RUNS.get(named) not in (chosen, None):
        warnings += (f"the folder's name says {named}, not {chosen}",)
    return Choice(chosen, {"method": "hidrop", "preset": chosen}, warnings)


def _run_of(original: Original) -> str | None:
    found = RUN.search(original.directory.resolve().name)
    return found[1].lower() if found and original.is_pruned else None


def _checked(preset: str, original: Original) -> str:
    name = ALIASES.get(preset.lower(), preset.lower())
    if name not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    size = size_of(original)
    if name != NO_PRESET and size in KNOWN:
        raise ValueError(f"preset {name} is the 7B model's; {KNOWN[size]}: {OWN}")
    return name


def _inferred(named: str | None, original: Original) -> str:
    if not original.is_pruned:
        return NO_PRESET
    size = size_of(original)
    if size in KNOWN:
        raise ValueError(f"this checkpoint was trained with a HiDrop schedule, and {KNOWN[size]}: {OWN}")
    if named in RUNS:
        return RUNS[named]
    if named is not None:
        raise ValueError(f"the numbers of run {named} are not published: {OWN}")
    raise ValueError(
        "this checkpoint was trained with a HiDrop schedule, but neither a file of it nor its folder's name says "
        f"which; name it with --preset: {', '.join(PRESETS)}"
    )


def _untrained(what: str, original: Original) -> tuple[str, ...]:
    return () if original.is_pruned else (f"plain LLaVA was not trained for {what}; expect worse answers than dense",)
