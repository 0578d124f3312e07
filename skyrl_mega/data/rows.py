"""Rows of prompt files: jsonl, parquet, and directories written by `datasets.save_to_disk`.

A row becomes a prompt's payload as it is, so it must be a JSON object; every fault is a DataError naming file and row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skyrl_mega.errors import DataError

Row = Mapping[str, Any]


def load_rows(path: str | Path, source: str, *, limit: int = 0) -> tuple[list[Row], list[str]]:
    """(rows, where each stands: "file:line" or "file row N"), the first `limit` ones if limit > 0.

    Raises DataError for a missing or empty file, an unknown format, or a bad row.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hf_dataset": _read_hf_dataset}
    if source not in readers:
        raise DataError(f"data.source must be one of {', '.join(readers)} to read rows, but is {source!r}.")
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"data path {str(path)!r} does not exist; set data.path (or data.eval_path) to a {source} file or directory."
        )
    pairs = readers[source](path)
    located = list(itertools.islice(pairs, limit) if limit > 0 else pairs)
    if not located:
        raise DataError(f"data path {str(path)!r} holds no rows.")
    return [row for row, _ in located], [where for _, where in located]


def _read_jsonl(path: Path) -> Iterator[tuple[Row, str]]:
    if path.is_dir():
        raise DataError(f"data path {str(path)!r} is a directory, but data.source=jsonl reads one file.")
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_line(line.rstrip("\r\n"), f"{path}:{number}"), f"{path}:{number}"
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}.") from error


def _parse_line(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON: {error.msg} at column {error.colno}; each line must be one JSON object."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object, but is a {type(row).__name__}.")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[Row, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path} row {number}"
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"data path {str(path)!r} can't be read as parquet: {error}") from error


def _read_hf_dataset(path: Path) -> Iterator[tuple[Row, str]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"data path {str(path)!r} is not a directory written by datasets.save_to_disk: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(split) for split in loaded]
        raise DataError(
            f"data path {str(path)!r} holds the splits {', '.join(splits)}; give the directory of one of them, "
            f"such as {str(path / splits[0])!r}."
        )
    for number, row in enumerate(loaded, start=1):
        yield dict(row), f"{path} row {number}"
