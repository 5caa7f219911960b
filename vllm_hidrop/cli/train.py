"""``hidrop train``: train a LLaVA with a pruning schedule on, or go on with an interrupted run."""

from pathlib import Path

import typer

from vllm_hidrop.outputs import check_folder


def run(config_path: Path) -> int:
    """Train; returns 1 when it had to stop. Raises ValueError: bad configuration, model or data; OSError: no output."""
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
