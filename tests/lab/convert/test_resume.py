"""A conversion that was cut off goes on; what is finished is verified, what changed is noticed."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.lab.convert.originals import Checkpoint, make_original
from vllm_hidrop.lab.atomic_write import unfinished_path
from vllm_hidrop.lab.convert.conversion import Conversion, prepare

SHARD_BYTES = 60_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make_original(tmp_path)


def start(checkpoint: Checkpoint, preset: str | None = None) -> Conversion:
    return prepare(checkpoint.directory, checkpoint.directory.parent / "out", preset, checkpoint.tower, SHARD_BYTES)


def stop_after(num_bytes: int, error: BaseException | None = None) -> Callable[[int], None]:
    """Progress that raises when so much is done; the user's interrupt unless another error is given."""
    left = num_bytes

    def advance(done: int) -> None:
        nonlocal left
        left -= done
        if left < 0:
            raise error or KeyboardInterrupt

    return advance


def shards_of(conversion: Conversion) -> list[str]:
    return list(conversion.shards)


def interrupt(conversion: Conversion) -> int:
    """Stop inside the third shard; returns the number of finished ones."""
    sources = sum(path.stat().st_size for path in conversion.sources.values())
    first, second, third = (conversion.shard_size(shard) for shard in shards_of(conversion)[:3])
    with pytest.raises(KeyboardInterrupt):
        conversion.run(stop_after(sources + first + second + third // 2 + 8000))
    return 2


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_interrupted_conversion_goes_on_and_ends_with_the_same_files(checkpoint: Checkpoint) -> None:
    conversion = start(checkpoint)
    finished = interrupt(conversion)
    out = conversion.destination
    assert not (out / "config.json").exists()
    unfinished = unfinished_path(out / shards_of(conversion)[2])
    assert not unfinished.exists()
    unfinished.write_bytes(b"cut off by a power failure")
    summary = start(checkpoint).run(lambda _: None)
    assert len(summary.verified) == finished
    assert len(summary.written) == len(conversion.shards) - finished
    resumed = contents(out)
    out.rename(out.with_name("resumed"))
    start(checkpoint).run(lambda _: None)
    straight = contents(out)
    manifests = [json.loads(files.pop("hidrop_convert.json")) for files in (resumed, straight)]
    assert manifests[0] == manifests[1]
    assert resumed == straight


def test_a_finished_conversion_is_verified_and_not_written_again(checkpoint: Checkpoint) -> None:
    conversion = start(checkpoint)
    conversion.run(lambda _: None)
    times = {path: path.stat().st_mtime_ns for path in conversion.destination.glob("*.safetensors")}
    summary = start(checkpoint).run(lambda _: None)
    assert len(summary.verified) == len(conversion.shards)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_written_shard_that_changed_is_written_again(checkpoint: Checkpoint) -> None:
    conversion = start(checkpoint)
    conversion.run(lambda _: None)
    path = conversion.destination / shards_of(conversion)[1]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    summary = start(checkpoint).run(lambda _: None)
    assert summary.repaired == [path.name]
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", ["model/pytorch_model-00001-of-00002.bin", "tower/config.json"])
def test_a_source_that_changed_is_refused_by_name(checkpoint: Checkpoint, name: str) -> None:
    interrupt(start(checkpoint))
    path = checkpoint.directory.parent / name
    if path.suffix == ".bin":
        weights = torch.load(path)
        torch.save({key: value + 1 for key, value in weights.items()}, path)
    else:
        path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=f"the source changed since .* began: {name};"):
        start(checkpoint).run(lambda _: None)


def test_another_preset_into_the_same_directory_is_refused(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, num_layers=32)
    start(checkpoint, "tok48").run(lambda _: None)
    with pytest.raises(ValueError, match="holds a conversion with preset tok48, not tok64"):
        start(checkpoint, "tok64").run(lambda _: None)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(checkpoint: Checkpoint, code: int) -> None:
    conversion = start(checkpoint)
    sources = sum(path.stat().st_size for path in conversion.sources.values())
    full = OSError(code, os.strerror(code))
    with pytest.raises(OSError, match=f"disk full while writing .*{shards_of(conversion)[0]}"):
        conversion.run(stop_after(sources, full))
    assert {path.name for path in conversion.destination.iterdir()} == {"hidrop_convert.json"}
    assert len(start(checkpoint).run(lambda _: None).written) == len(conversion.shards)


def test_a_link_under_a_temporary_name_is_not_followed(checkpoint: Checkpoint) -> None:
    conversion = start(checkpoint)
    interrupt(conversion)
    elsewhere = checkpoint.directory.parent / "elsewhere"
    elsewhere.write_text("mine")
    unfinished_path(conversion.destination / shards_of(conversion)[2]).symlink_to(elsewhere)
    start(checkpoint).run(lambda _: None)
    assert elsewhere.read_text() == "mine"
    assert not [path for path in conversion.destination.iterdir() if path.is_symlink()]
