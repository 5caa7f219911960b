"""Checkpoints that are trained once for all files of this folder."""

from pathlib import Path

import pytest

from vllm_hidrop.lab.train import embedded
from vllm_hidrop.lab.train.schedules import FORMS

SMOKE_FORMS = ("dense", "hidrop", "hidrop_seed1", "flat")


@pytest.fixture(scope="session")
def smoke_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``embedded all-ablations --smoke`` leaves, of a few forms."""
    directory = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "FORMS", {name: FORMS[name] for name in SMOKE_FORMS})
        embedded.main(["all-ablations", "--smoke", "--out", str(directory)])
    return directory
