"""The tasks by name; one file per benchmark holds its file format, prompt and scoring rule."""

from importlib import import_module

from vllm_hidrop.lab.evaluate.samples import Task

TASKS = ("synthetic", "pope", "scienceqa", "gqa", "textvqa", "mme", "mmbench")
"""Modules of this package with a ``TASK``; imported when used, because drawing scenes needs the ``train`` extra."""


def load_task(name: str) -> Task:
    """A task by name; ValueError for an unknown one lists the known."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name}; known: {', '.join(TASKS)}")
    task: Task = import_module(f"{__name__}.{name}").TASK
    return task
