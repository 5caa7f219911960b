"""The tasks by name; one file per benchmark holds its file format, prompt and scoring rule."""

from importlib import import_module

from vllm_hidrop.evaluation.samples import Task

TASKS = {
    "synthetic": "vllm_hidrop.evaluation.tasks.synthetic",
    "pope": "vllm_hidrop.evaluation.tasks.pope",
    "scienceqa": "vllm_hidrop.evaluation.tasks.scienceqa",
    "gqa": "vllm_hidrop.evaluation.tasks.gqa",
    "textvqa": "vllm_hidrop.evaluation.tasks.textvqa",
    "mme": "vllm_hidrop.evaluation.tasks.mme",
    "mmbench": "vllm_hidrop.evaluation.tasks.mmbench",
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
