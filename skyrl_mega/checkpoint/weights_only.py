"""A checkpoint that holds a model's weights and nothing else: what `skyrl-mega convert` writes of a Hugging Face directory.

Beside the files of a run's checkpoint (of step 0, without optimizer and random state) lie config.json and tokenizer of the model:
what is needed to build it, and to write it back.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.checkpoint import manifest, store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

if TYPE_CHECKING:
    import torch

    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


def save_weights(chunks: Sequence[PolicyModel], output: Path, model_path: Path, topology: Topology) -> None:
    """Writes the chunks of all ranks to the directory `output`, whole or not at all. *All ranks.*

    `model_path`: the Hugging Face directory the model was built from. Raises CheckpointError, on every rank, where a file can't
    be written or `output` exists.
    """
    from skyrl_mega.checkpoint.files import write_index, write_part
    from skyrl_mega.checkpoint.pieces import pieces_to_write
    from skyrl_mega.checkpoint.state import layout
    from skyrl_mega.models.build import sharded_state
    from skyrl_mega.models.hf_io import COPIED

    temporary = output.with_name(output.name + store.TEMPORARY)

    def begin() -> None:
        if output.exists():
            raise CheckpointError(f"{output} exists; name a directory that does not")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for pattern in ("config.json", *COPIED):
            for file in sorted(model_path.glob(pattern)):
                shutil.copyfile(file, temporary / file.name)

    def complete() -> None:
        files = write_index(temporary, topology.world_size)
        state = TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0)
        store.write_state(temporary, state, layout(topology), metrics={})
        manifest.write_manifest(temporary, files)
        store.give_final_name(temporary)

    _together(topology, begin if topology.is_main else None, output)
    pieces = pieces_to_write({"model": sharded_state(chunks)})
    _together(topology, lambda: write_part(temporary, topology.rank, pieces), output)
    _together(topology, complete if topology.is_main else None, output)


def stored_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtype of every weight of the model that a checkpoint holds, by Megatron's name. Raises CheckpointError."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from skyrl_mega.checkpoint.files import INDEX_FILE

    try:
        with open(path / INDEX_FILE, "rb") as file:
            contents = pickle.load(file).state_dict_metadata
    except (OSError, pickle.UnpicklingError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no Megatron checkpoint that can be read ({error}).") from error
    apart = ("optimizer.", "critic.")
    return {
        name: entry.properties.dtype
        for name, entry in contents.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(apart)
    }


def _together(topology: Topology, act: Callable[[], object] | None, output: Path) -> None:
    """Runs `act` (None: nothing, on this rank); where it fails on any rank, every rank raises CheckpointError."""
    failure = ""
    try:
        if act is not None:
            act()
    except (OSError, CheckpointError) as error:
        failure = str(error)
    failures = [text for text in topology.gather_objects(failure, phase="converting") if text]
    if failures:
        raise CheckpointError(f"the checkpoint {output} could not be written: {failures[0]}")
