"""The tasks by name; one file per benchmark holds its file format, prompt and scoring rule."""

from importlib import import_module

from vllm_hidrop.lab.evaluate.samples import Task

TASKS = {
    "synthetic": "vllm_hidrop.lab.evaluate.tasks.synthetic",
    "pope": "vllm_hidrop.lab.evaluate.tasks.pope",
    "scienceqa": "vllm_hidrop.lab.evaluate.tasks.scienceqa",
    "gqa": "vllm_hidrop.lab.evaluate.tasks.gqa",
    "textvqa": "vllm_hidrop.lab.evaluate.tasks.textvqa",
    "mme": "vllm_hidrop.lab.evaluate.tasks.mme",
    "mmbench": "vllm_hidrop.lab.evaluate.tasks.mmbench",
}
"""Modules with a ``TASK``; imported when used, because drawing scenes needs the ``train`` extra."""


def load_task(name: str) -> Task:
    """A task by name.

    Raises:
        ValueError: unknown; lists the known.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name}; known: {', '.join(TASKS)}")
    task: Task = import_module(TASKS[name]).TASK
    return task
