"""The rows of a run on fixed data: read, encoded and checked before any model is loaded; some of each dataset held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from skyrl_mega.agents.row_encoder import Kind, RowEncoder
from skyrl_mega.config.model_files import inspect_model
from skyrl_mega.config.offline import datasets_of, file_format, kind_of_rows
from skyrl_mega.config.offline_schema import DatasetConfig, OfflineConfig, RMConfig, SFTConfig
from skyrl_mega.data.examples import Example
from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.data.mixing import Dataset, MixedStream
from skyrl_mega.data.prompts import row_key
from skyrl_mega.data.rows import load_rows
from skyrl_mega.errors import DataError

if TYPE_CHECKING:
    from skyrl_mega.data.rows import Row


@dataclass(frozen=True)
class OfflineData:
    """Training rows as a stream, and the rows to evaluate on."""

    stream: MixedStream
    held_out: list[Example]


def read_data(config: OfflineConfig, note: Callable[[str], None]) -> OfflineData:
    """All rows that `config.data` names, encoded; a line on each dataset goes to `note`. The same on every rank.

    Raises DataError, with file and line, for a row that can't be used.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    files, _ = inspect_model(Path(config.model.path))
    vocab_size = files.vocab_size if files is not None else len(tokenizer)
    datasets: list[Dataset] = []
    held_out: list[tuple[int, Example]] = []
    evaluated = DatasetConfig(path=config.data.eval_path, name="held-out rows")
    share = 0.0 if config.data.eval_path or config.evaluation.num_rows == 0 else config.data.eval_share
    for settings in datasets_of(config):
        rows = _read(settings, config, tokenizer, vocab_size, note)
        kept = [example for order, example in rows if order >= share * 2**64]
        held_out += [(order, example) for order, example in rows if order < share * 2**64]
        datasets.append(Dataset(settings.name, kept, settings.weight))
    if config.data.eval_path and config.evaluation.num_rows > 0:
        held_out = _read(evaluated, config, tokenizer, vocab_size, note)
    if not held_out and config.evaluation.num_rows > 0:
        raise DataError(
            f"data.eval_share ({config.data.eval_share:g}) holds no row out of so few. Raise it, give data.eval_path, or set"
            " evaluation.num_rows=0."
        )
    # By hash: a file that is sorted by topic is sampled evenly.
    chosen = [example for _, example in sorted(held_out, key=lambda one: (one[0], one[1].place))]
    return OfflineData(MixedStream(datasets, config.trainer.seed), chosen[: config.evaluation.num_rows])


def _read(
    settings: DatasetConfig, config: OfflineConfig, tokenizer: Any, vocab_size: int, note: Callable[[str], None]
) -> list[tuple[int, Example]]:
    """(a hash of the row's content, the row's example) of a dataset."""
    encoder = RowEncoder(
        tokenizer,
        cast(Kind, kind_of_rows(config)),
        vocab_size=vocab_size,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        chat_template=config.data.chat_template,
        train_on=config.sft.train_on if isinstance(config, SFTConfig) else "assistant",
        aim="score" if isinstance(config, RMConfig) else "tokens",
    )
    rows, places = load_rows(settings.path, file_format(settings), limit=settings.limit)
    examples = []
    for row, place in zip(rows, places, strict=True):
        example = encoder.example(row, place)
        if example is not None:
            examples.append((stable_hash("held out", _key(row, place)), example))
    tokens = sum(example.num_tokens for _, example in examples)
    left = [f"{count} {what}" for what, count in sorted(encoder.counts.items())]
    note(f"{settings.name}: {', '.join([f'{len(rows)} rows', f'{tokens} tokens', *left])}")
    return examples


def _key(row: Row, place: str) -> str:
    try:
        return row_key(row)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place} holds values that are not JSON: {error}.") from error
