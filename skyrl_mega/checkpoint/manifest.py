"""The list of a checkpoint's files, by which damage is found before anything is loaded.

`manifest.json` names every file with its size and its checksum (XXH3, 64 bits, taken while the tensors are written). It is
written last: a checkpoint that has none, and was written by a version that makes them, is damaged. Checking sizes costs
nothing; checking checksums costs one reading of the files, which the ranks share and which loading then finds in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import xxhash

MANIFEST_FILE = "manifest.json"
Verification = Literal["sizes", "checksums"]
_READ_BYTES = 2**22


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint. `checksum`: XXH3-64, 16 hexadecimal digits."""

    name: str
    size_bytes: int
    checksum: str


def write_manifest(directory: Path, known: list[FileRecord]) -> None:
    """Writes the manifest of `directory`: the `known` files, and what else is there."""
    names = {record.name for record in known}
    others = sorted(path for path in directory.iterdir() if path.name not in names)
    records = [*known, *(FileRecord(path.name, path.stat().st_size, checksum_of(path)) for path in others)]
    text = json.dumps({"algorithm": "xxh3_64", "files": [asdict(record) for record in records]}, indent=1)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> list[FileRecord]:
    """Raises OSError if there is none, ValueError, KeyError or TypeError if it is damaged."""
    content = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    return [FileRecord(**record) for record in content["files"]]


def damage(directory: Path, how: Verification, *, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
    """A line for each file that is not as it was written; nothing if all is well.

    share: (i, n) reads for checksums only every n-th file, from the i-th on; sizes are always checked of all.
    """
    try:
        records = read_manifest(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{MANIFEST_FILE} can't be read ({error})"
        return
    index, of = share
    for number, record in enumerate(sorted(records, key=lambda record: -record.size_bytes)):
        path = directory / record.name
        if not path.is_file():
            yield f"{record.name} is missing"
        elif path.stat().st_size != record.size_bytes:
            yield f"{record.name} has {path.stat().st_size} bytes instead of {record.size_bytes}"
        elif how == "checksums" and number % of == index and checksum_of(path) != record.checksum:
            yield f"{record.name} has other content than was written (checksum)"


def checksum_of(path: Path) -> str:
    """XXH3-64 of a file's bytes."""
    hashed = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            hashed.update(block)
    return hashed.hexdigest()
