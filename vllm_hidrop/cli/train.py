"""``hidrop train``: train a LLaVA with a pruning schedule on, or go on with an interrupted run."""

from pathlib import Path

import typer

from vllm_hidrop.outputs import check_folder


def run(config_path: Path) -> int:
    """Train as a YAML file says; returns the exit code, 1 when training had to stop.

    Raises:
        ValueError: the configuration, the model or the data are not what they should be.
        OSError: the output cannot be written, or the disk is full.
    """
    from vllm_hidrop.lab.train.train_config import read_train_config

    config = read_train_config(config_path)
    check_folder(config.output)
    try:
        from vllm_hidrop.lab.train.trainer import TrainingStopped, train
    except ModuleNotFoundError as error:
        raise ValueError(f'hidrop train needs the package {error.name}: pip install "vllm-hidrop[train]"') from None
    try:
        directory = train(config)
    except TrainingStopped as stop:
        typer.echo(f"hidrop: {stop}", err=True)
        return 1
    typer.echo(f"{directory}: serve it with hidrop serve {directory}")
    return 0
