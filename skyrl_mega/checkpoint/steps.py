"""Recorded steps: everything that a step's updates were computed from, so that any layout can compute them again.

    run_dir/steps/step_000812/            a complete record (the rename that gave it this name was its last act)
        record.json                       weight version, metrics, layout, versions, commit; the error, if the step failed
        config.yaml                       every setting of the run
        update_0/inputs.safetensors       the samples of the update, token-aligned and end to end; logprobs
        update_0/weights/                 the weights before the update: a Hugging Face directory in the model's dtype
    run_dir/steps/step_000813.tmp/        one being written; worthless if its writer died
    run_dir/steps/critic_step_000812/     likewise of the critic: its first update of the step that was not finite

Samples, not packed batches, are kept: each layout packs them for itself. Every update has its own weights, because the one
before it has changed them. A record needs nothing outside its directory: it survives the pruning of checkpoints, and can be
carried to another machine. Optimizer state is not part of it: loss, logprobs and gradients need none. Nor are random states: an
update draws nothing at random (models run without dropout).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import Metrics, TrainSample

if TYPE_CHECKING:
    import torch

RECORD_FILE, CONFIG_FILE, INPUTS_FILE, WEIGHTS = "record.json", "config.yaml", "inputs.safetensors", "weights"

#: Token-aligned values by sample_index: float32 [L].
Rows = Mapping[int, "torch.Tensor"]


@dataclass(frozen=True)
class UpdateInputs:
    """What one update saw. `logprobs`: the policy's before the update, of the samples that were computed; {} of the critic's.

    `old_logprobs` and `ref_logprobs` are None where the update used none; `returns` and `values` are the critic's.
    """

    samples: list[TrainSample]
    logprobs: Rows = field(default_factory=dict)
    old_logprobs: Rows | None = None
    ref_logprobs: Rows | None = None
    returns: Rows | None = None
    values: Rows | None = None

    def rows(self) -> dict[str, Rows]:
        """Those that there are, by name."""
        found = {name: getattr(self, name) for name in _ROWS}
        return {name: rows for name, rows in found.items() if rows}


@dataclass(frozen=True)
class RecordedStep:
    """The contents of record.json. `metrics` has one entry per update; that of an update that failed is empty.

    `weight_version` is the version that the step began with; `checkpoint` the run's checkpoint of it, if there was one (it has
    the optimizer state). `error` is empty where the step went well. `surroundings`: layout, device, implementation, versions,
    git_commit.
    """

    step: int
    weight_version: int
    num_updates: int
    metrics: list[Metrics]
    error: str
    checkpoint: str
    surroundings: dict[str, Any]


def steps_dir(run_dir: str | Path) -> Path:
    return Path(run_dir) / "steps"


def list_steps(run_dir: str | Path) -> list[Path]:
    """Complete records of a run, by step."""
    return store.named_steps(steps_dir(run_dir))


def find_step(run_dir: str | Path, step: int) -> Path:
    """The record of `step`. Raises CheckpointError that says which steps are recorded."""
    for path in list_steps(run_dir):
        if store.step_of(path) == step:
            return path
    there = ", ".join(str(store.step_of(path)) for path in list_steps(run_dir)) or "none"
    raise CheckpointError(
        f"{run_dir} has no record of step {step}; recorded steps: {there}. To record it, run it again from an earlier checkpoint "
        f"with `trainer.record_steps=[{step}]`."
    )


def count_failed(run_dir: str | Path, *, besides: int) -> int:
    """How many records, that of the step `besides` left out, are of steps that failed; a damaged one counts too."""

    def failed(path: Path) -> bool:
        try:
            return bool(read_record(path).error)
        except CheckpointError:
            return True

    return sum(failed(path) for path in list_steps(run_dir) if store.step_of(path) != besides)


def update_dir(record: Path, number: int) -> Path:
    return record / f"update_{number}"


def weights_dir(record: Path, number: int) -> Path:
    """The Hugging Face directory of the weights before update `number` of the step."""
    return update_dir(record, number) / WEIGHTS


def size_bytes(record: Path) -> int:
    return sum(path.stat().st_size for path in record.rglob("*") if path.is_file())


# ---- writing (rank 0 only) ------------------------------------------------------------------------------------------------


def begin(run_dir: str | Path, step: int, *, of: str = "") -> Path:
    """An empty directory to write the record of `step` into (`of`: "critic_"); leftovers of dead writers are removed."""
    parent = steps_dir(run_dir)
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob("*.tmp"):
        shutil.rmtree(leftover)
    temporary = temporary_path(run_dir, step, of=of)
    temporary.mkdir()
    return temporary


def temporary_path(run_dir: str | Path, step: int, *, of: str = "") -> Path:
    """Where the record of `step` is while it is written."""
    return steps_dir(run_dir) / f"{of}step_{step:06d}.tmp"


def write_inputs(record: Path, number: int, inputs: UpdateInputs) -> None:
    """Writes what update `number` saw; its weights are written by whoever has them."""
    import torch
    from safetensors.torch import save_file

    samples, by_name = inputs.samples, inputs.rows()
    computed = set().union(*by_name.values())
    tensors = {
        "lengths": torch.tensor([sample.num_tokens for sample in samples]),
        "sample_index": torch.tensor([sample.sample_index for sample in samples]),
        "group_index": torch.tensor([sample.group_index for sample in samples]),
        "reward": torch.tensor([sample.reward for sample in samples], dtype=torch.float64),
        "computed": torch.tensor([sample.sample_index in computed for sample in samples]),
        **{name: torch.cat([getattr(sample, name) for sample in samples]) for name in _SAMPLE_TENSORS},
    }
    staleness = [sample.staleness for sample in samples if sample.staleness is not None]
    if len(staleness) == len(samples):
        tensors["staleness"] = torch.cat(staleness)
    tensors |= _routing_tensors(samples)
    for name, rows in by_name.items():
        absent = {sample.sample_index: torch.zeros(sample.num_tokens) for sample in samples}
        tensors[name] = torch.cat([rows.get(index, zeros) for index, zeros in absent.items()])
    folder = update_dir(record, number)
    folder.mkdir()
    save_file(tensors, folder / INPUTS_FILE, metadata={"group_ids": json.dumps([sample.group_id for sample in samples])})


def _routing_tensors(samples: Sequence[TrainSample]) -> dict[str, torch.Tensor]:
    """routed_experts end to end, of the samples that have them; {} where none has."""
    import torch

    routed = [sample.routed_experts for sample in samples if sample.routed_experts is not None]
    has_routing = torch.tensor([sample.routed_experts is not None for sample in samples])
    return {"routed_experts": torch.cat(routed), "has_routing": has_routing} if routed else {}


def commit(temporary: Path, record: RecordedStep) -> Path:
    """Completes the record and gives it its final name, durably."""
    (temporary / RECORD_FILE).write_text(json.dumps(vars(record), indent=2) + "\n", encoding="utf-8")
    return store.give_final_name(temporary)


# ---- reading --------------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> RecordedStep:
    """Raises CheckpointError if the record is absent or damaged."""
    try:
        return RecordedStep(**json.loads((path / RECORD_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / RECORD_FILE} can't be read ({error}); remove {path} and record the step again."
        ) from error


def read_inputs(record: Path, number: int) -> UpdateInputs:
    """What update `number` saw, bit for bit. Raises CheckpointError if the file is absent or damaged."""
    from safetensors import SafetensorError, safe_open

    file = update_dir(record, number) / INPUTS_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            group_ids = json.loads(opened.metadata()["group_ids"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); remove {record} and record the step again.") from error
    lengths, index = tensors["lengths"].tolist(), tensors["sample_index"].tolist()
    split = {name: tensors[name].split(lengths) for name in (*_SAMPLE_TENSORS, "staleness", *_ROWS) if name in tensors}
    has_routing = tensors["has_routing"].tolist() if "has_routing" in tensors else [False] * len(lengths)
    routed_lengths = [length for length, has in zip(lengths, has_routing, strict=True) if has]
    routing = iter(tensors["routed_experts"].split(routed_lengths) if routed_lengths else ())
    samples = [
        TrainSample(
            sample_index=index[i],
            group_index=int(tensors["group_index"][i]),
            group_id=group_ids[i],
            reward=float(tensors["reward"][i]),
            staleness=split["staleness"][i] if "staleness" in split else None,
            routed_experts=next(routing) if has_routing[i] else None,
            **{name: split[name][i] for name in _SAMPLE_TENSORS},
        )
        for i in range(len(lengths))
    ]
    computed = tensors["computed"].tolist()
    rows = {name: {index[i]: split[name][i] for i in range(len(lengths)) if computed[i]} for name in _ROWS if name in split}
    return UpdateInputs(samples, **rows)


_SAMPLE_TENSORS = ("token_ids", "loss_mask", "rollout_logprobs", "advantages")
_ROWS = ("logprobs", "old_logprobs", "ref_logprobs", "returns", "values")
