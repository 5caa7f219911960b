"""``hidrop_convert.json``: what a conversion read, how, and which shards it has written."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST_FILE = "hidrop_convert.json"
CHUNK_BYTES = 1 << 24
Advance = Callable[[int], None]
"""Called with the bytes done since the last call."""


class FileRecord(BaseModel):
    """Hash and size of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    size_bytes: int


def hash_file(path: Path, advance: Advance) -> FileRecord:
    """The record of a file, read in chunks of ``CHUNK_BYTES``."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            size += len(data)
            advance(len(data))
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size)


class Manifest(BaseModel):
    """The record of one conversion.

    ``preset`` is HiDrop's or "none"; ``shard_bytes`` limits a shard, so it decides which tensors share one; ``sources``
    are the files read, as ``model/NAME`` or ``tower/NAME``; ``written`` are the finished shards.
    """

    model_config = ConfigDict(extra="forbid")

    preset: str
    shard_bytes: int
    sources: dict[str, FileRecord]
    written: dict[str, FileRecord] = {}
    complete: bool = False


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of an earlier run; None for a new or empty directory, ValueError where it holds anything else."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    path = directory / MANIFEST_FILE
    if path.is_file():
        try:
            return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError):
            raise ValueError(f"{path} is damaged; delete {directory} and convert again") from None
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty and no conversion of ours; choose another directory")
    return None


def check_same(earlier: Manifest, now: Manifest, directory: Path) -> None:
    """ValueError, naming what differs, where the earlier run converted something else."""
    if earlier.preset != now.preset:
        raise ValueError(
            f"{directory} holds a conversion with preset {earlier.preset}, not {now.preset}; choose another directory"
        )
    names = sorted(earlier.sources.keys() | now.sources.keys())
    changed = [name for name in names if earlier.sources.get(name) != now.sources.get(name)]
    if changed or earlier.shard_bytes != now.shard_bytes:
        what = ", ".join(changed) or "the shard size"
        raise ValueError(
            f"the source changed since the conversion into {directory} began: {what}; delete it to start over"
        )
