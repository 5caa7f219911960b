"""Write files whole or not at all, and safetensors one tensor at a time. Knows no model.

safetensors' own writer wants all tensors of a file at once and reports a full disk in its own words; the format is a
length, a JSON header and the bytes of the tensors.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from vllm_hidrop.lab.convert.manifest import FileRecord
from vllm_hidrop.lab.convert.weights import DTYPES, TensorInfo

TEMPORARY = ".tmp"
"""Ending of a file that is being written."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK_BYTES = 1 << 24
Advance = Callable[[int], None]
"""Called with the bytes read or written since the last call."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when it is complete and on disk; on any error nothing is left.

    What an earlier run left under the temporary name is removed, never written to: it may be a link elsewhere.

    Raises:
        ValueError: the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise ValueError(
                f"no space left on the disk of {path.parent} for {path.name}; free some and go on"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def num_bytes(info: TensorInfo) -> int:
    """Size of a tensor in a file."""
    return prod(info.shape) * DTYPES[info.dtype].itemsize


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], load: Callable[[str], torch.Tensor], advance: Advance
) -> FileRecord:
    """Write tensors in the order of their element sizes, largest first, so that each is aligned.

    Args:
        path: the file.
        infos: shape and type of every tensor, by its name in the file.
        load: reads one tensor; called once each.
        advance: progress.

    Returns:
        The file's hash and size.
    """
    names = sorted(infos, key=lambda name: -DTYPES[infos[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + num_bytes(infos[name])
        header[name] = {"dtype": infos[name].dtype, "shape": infos[name].shape, "data_offsets": (start, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, size = hashlib.sha256(), 0
    with atomic_file(path) as file:
        for data in _pieces(encoded, names, load):
            file.write(data)
            digest.update(data)
            size += len(data)
            advance(len(data))
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size)


def _pieces(header: bytes, names: list[str], load: Callable[[str], torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for name in names:
        yield load(name).contiguous().flatten().view(torch.uint8).numpy().data


def hash_file(path: Path, advance: Advance) -> FileRecord:
    """Hash and size of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            size += len(data)
            advance(len(data))
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size)
