"""``hidrop train``: train a LLaVA with a pruning schedule on, or go on with an interrupted run."""

from pathlib import Path

import typer


def run(config_path: Path) -> int:
    """Train as a YAML file says; returns the exit code, 1 when training had to stop.

    Raises:
        ValueError: the configuration, the model or the data are not what they should be.
    """
    from vllm_hidrop.training.run_config import read_train_config
    from vllm_hidrop.training.unfinished import TrainingStopped, is_disk_full

    config = read_train_config(config_path)
    try:
        from vllm_hidrop.training.run import train
    except ModuleNotFoundError as error:
        raise ValueError(f'hidrop train needs the package {error.name}: pip install "vllm-hidrop[train]"') from None
    try:
        directory = train(config)
    except TrainingStopped as stop:
        typer.echo(f"hidrop: {stop}", err=True)
        return 1
    except OSError as error:
        if not is_disk_full(error):
            raise
        typer.echo(f"hidrop: disk full while writing {error.filename or config.output}", err=True)
        return 1
    typer.echo(f"{directory}: serve it with hidrop serve {directory}")
    return 0
