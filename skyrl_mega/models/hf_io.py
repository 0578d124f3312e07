"""Weights from a Hugging Face directory into a policy, and back out, every tensor accounted for.

The family's table says which tensors each parameter holds (`families.weights`), `weight_map` which parts are this rank's. Here
each rank reads its own parts of the files, once file and model are seen to hold exactly the same tensors; and an export gathers
one parameter at a time, from its tensor ranks, then from its expert rank and stage to all ranks. It becomes directories that
transformers and vLLM load. An untouched policy exports bit for bit what was loaded.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skyrl_mega.errors import CheckpointError, ModelLoadError
from skyrl_mega.models.build import PolicyModel
from skyrl_mega.models.families import EMBEDDING, LM_HEAD, Split, Weight, tensor_shapes
from skyrl_mega.models.weight_map import (
    expert_tensor_group,
    held_parameters,
    read_local,
    table_of,
    tensor_rank,
    tied_copy,
    to_tensors,
)
from skyrl_mega.parallel.topology import Topology

FLOAT_TYPES = ("F64", "F32", "BF16", "F16")
INDEX_FILE = "model.safetensors.index.json"
#: The head of Hugging Face's sequence classification models: with one label it gives a number for each hidden state.
SCORE = "score.weight"
MAX_SHARD_BYTES = 2_000_000_000
#: Of a checkpoint being read. Parameters lie in the order of the layers, so that few shards are wanted at a time.
MAX_OPEN_FILES = 4
#: Of the beginning and of the end of each file, for its fingerprint.
_SEEN_BYTES = 2**20
#: A mixture of experts has ten thousand tensors; as many lines would hide what is wrong.
MAX_PROBLEMS_SHOWN = 40
_LAYER_NUMBER = re.compile(r"^model\.layers\.(\d+)\.")
#: What config.json calls the number of layers that predict further tokens.
EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
#: Files of a model directory that stay true whatever its weights are.
COPIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a checkpoint directory, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_hf_weights(chunks: Sequence[PolicyModel], path: str | Path, topology: Topology) -> None:
    """Fills the policy, all chunks of this rank, from the safetensors of `path`, cast to the model's dtype. *All ranks.*

    Every rank reads its own parts, one parameter at a time. A `lm_head.weight` beside tied embeddings is accepted if it equals
    them. A ValueModel leaves the LM head out, and its own is zero where `path` has no `score.weight`. Raises ModelLoadError, on
    every rank and before anything is loaded, with the names of the tensors that are missing, left over, of the wrong shape, or
    not floating point, and of parameters that the family's table does not know.
    """
    stored = read_headers(path)
    _check_tensors(chunks[0], stored, path)
    if topology.is_main:
        _warn_of_extra_layers(chunks[0], stored, path)
    held = held_parameters(chunks, topology)
    table = [weight for weight in table_of(chunks[0]) if weight.parameter in held]
    with torch.no_grad(), topology.deadline(f"loading weights from {path}"), TensorReader(stored) as reader:
        for weight in table:
            _fill(held[weight.parameter], weight, reader, topology)
            topology.progress()
        if (copy := tied_copy(chunks)) is not None:
            _fill(copy, next(weight for weight in table_of(chunks[0]) if EMBEDDING in weight.tensors), reader, topology)
        if (head := _value_head(chunks)) is not None and SCORE in stored:
            head.copy_(reader.read(SCORE))


def _fill(parameter: torch.Tensor, weight: Weight, reader: TensorReader, topology: Topology) -> None:
    rank, ranks = tensor_rank(weight, topology)
    local = read_local(weight, reader.read, rank, ranks)
    if local.shape != parameter.shape:
        raise ModelLoadError(
            f"The table of the family has {weight.parameter} as {tuple(local.shape)} on this rank, and the model has it as "
            f"{tuple(parameter.shape)}; correct the table."
        )
    parameter.copy_(local)


def read_headers(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory, by name; reads headers only. Raises ModelLoadError."""
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(Path(path)):
        for name, tensor in _file_headers(file).items():
            if name in stored:
                raise ModelLoadError(f"{path}: {name} is in {stored[name].file.name} and in {file.name}; keep one of them.")
            stored[name] = tensor
    return stored


def fingerprint(path: str | Path) -> str:
    """A short text that differs between checkpoint directories of different weights, from their files' ends and headers."""
    digest = hashlib.blake2b(digest_size=8)
    for file in _weight_files(Path(path)):
        with open(file, "rb") as opened:
            digest.update(opened.read(_SEEN_BYTES))
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - _SEEN_BYTES))
            digest.update(opened.read() + size.to_bytes(8, "big"))
    return digest.hexdigest()


def _file_headers(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return {name: StoredTensor(file, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except SafetensorError as error:
        raise ModelLoadError(f"{file} can't be read: {error}; finish the download or the copy.") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if index.is_file():
        files = sorted(path / name for name in set(json.loads(index.read_text())["weight_map"].values()))
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ModelLoadError(f"{index} names files that are not there: {', '.join(absent)}; finish the download or the copy.")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(
            f"{path} has no *.safetensors; other formats are not read. Save the model with transformers' save_pretrained first."
        )
    return files


def _value_head(chunks: Sequence[PolicyModel]) -> torch.nn.Parameter | None:
    """The head's weight, where this rank holds one of a ValueModel."""
    last = chunks[-1]
    return None if last.has_lm_head or not last.post_process else last.output_layer.weight


def _check_tensors(model: PolicyModel, stored: dict[str, StoredTensor], path: str | Path) -> None:
    expected = tensor_shapes(table_of(model))
    if not model.has_lm_head and SCORE in stored:
        expected[SCORE] = (1, model.architecture.hidden_size)
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            problems.append(f"wrong shape: {name} is {tensor.shape}, the model needs {expected[name]}")
        elif name in expected and tensor.dtype not in FLOAT_TYPES:
            problems.append(f"not floating point: {name} is {tensor.dtype}")
        elif name not in expected and not _is_of_extra_layer(name, model) and not _may_stay(name, model, stored, problems):
            problems.append(f"unexpected: {name} {tensor.shape}")
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ModelLoadError(
            f"{path}: weights and config.json do not fit ({len(problems)} problems):\n  " + "\n  ".join(shown) + more
        )


def _is_of_extra_layer(name: str, model: PolicyModel) -> bool:
    """Whether the tensor belongs to a layer beyond the model's, which predicts further tokens and is not built."""
    number = _LAYER_NUMBER.match(name)
    a = model.architecture
    return number is not None and a.num_layers <= int(number[1]) < a.num_layers + a.num_extra_layers


def _warn_of_extra_layers(model: PolicyModel, stored: dict[str, StoredTensor], path: str | Path) -> None:
    extra = sorted(name for name in stored if _is_of_extra_layer(name, model))
    if extra:
        warnings.warn(
            f"{path}: {len(extra)} tensors of layers that predict further tokens (multi-token prediction) are neither trained nor"
            f" exported: {', '.join(extra[:MAX_PROBLEMS_SHOWN])}{', ...' if len(extra) > MAX_PROBLEMS_SHOWN else ''}.",
            UserWarning,
            stacklevel=3,
        )


def _may_stay(name: str, model: PolicyModel, stored: dict[str, StoredTensor], problems: list[str]) -> bool:
    """True for tensors beyond the model's that change nothing.

    A tied head's copy, the LM head beside a value function, and rotary frequencies of old files.
    """
    if name.endswith(".self_attn.rotary_emb.inv_freq") or (name == LM_HEAD and not model.has_lm_head):
        return True
    if name != LM_HEAD or not model.architecture.tied or EMBEDDING not in stored:
        return False
    with TensorReader(stored) as reader:
        is_copy = torch.equal(reader.read(LM_HEAD), reader.read(EMBEDDING))
    if not is_copy:
        problems.append(f"{LM_HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true: set it to false")
    return True


class TensorReader:
    """Reads tensors of a checkpoint directory, one at a time. A context manager.

    The files read last stay open, `MAX_OPEN_FILES` of them: opening one parses what it says of all its tensors, of which a
    mixture of experts has thousands.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._opened: dict[Path, Any] = {}  #: the one used last at the end

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *unused: object) -> None:
        while self._opened:
            self._close_oldest()

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        """The tensor, or a part of it: only that is read from the file."""
        file = self._stored[name].file
        opened = self._opened.pop(file, None)
        if opened is None:
            if len(self._opened) == MAX_OPEN_FILES:
                self._close_oldest()
            opened = safe_open(file, framework="pt").__enter__()
        self._opened[file] = opened
        return opened.get_slice(name)[slices] if slices else opened.get_tensor(name)

    def _close_oldest(self) -> None:
        self._opened.pop(next(iter(self._opened))).__exit__(None, None, None)


class HFExporter:
    """A model's weights under Hugging Face names (a `WeightSource`); those of a ValueModel as of sequence classification.

    Order: the model's own parameter order, the same in every call. *All ranks* make one.
    """

    def __init__(self, chunks: Sequence[PolicyModel], topology: Topology) -> None:
        self._chunks = list(chunks)
        self.topology = topology
        self.is_value_model = not chunks[0].has_lm_head
        self._table = table_of(chunks[0])
        self._held = held_parameters(chunks, topology)
        self._stages = _stages(self._held, self._table, topology)
        self._groups = _fused_groups(self._table)
        self._float32 = {name for weight in self._table if weight.is_float32 for name in weight.tensors}
        self.shapes = tensor_shapes(self._table)  #: full shape of every exported tensor
        if self.is_value_model:
            self._groups.append((SCORE,))
            self.shapes[SCORE] = (1, chunks[0].architecture.hidden_size)

    def names(self) -> list[str]:
        """Names in export order."""
        return list(itertools.chain.from_iterable(self._groups))

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        """Names that must travel together, in export order: q, k, v (with their biases), and gate, up; others are alone."""
        return self._groups

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What the tensor `name` has in an export in `dtype`: float32 where the family keeps it so whatever the others are."""
        return torch.float32 if name in self._float32 else dtype

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """*All ranks, to the end.* (name, full contiguous tensor), from all tensor ranks and stages, one at a time.

        In `dtype`, but for the few tensors of `dtype_of`.

        The tensor may share memory with a parameter: never write to it, and copy it to keep it beyond the next update of the
        weights. Raises DeadlineError.
        """
        weights = itertools.chain(self._model_weights(), self._value_head_weights())
        while True:
            # Not around the whole loop: the consumer's code between two tensors runs in its own grad mode.
            with torch.no_grad(), self.topology.deadline("exporting weights"):
                item = next(weights, None)
                if item is None:
                    return
                name, tensor = item[0], item[1].detach().to(self.dtype_of(item[0], dtype)).contiguous()
            yield name, tensor

    def _model_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for weight in self._table:
            parts = self._gathered(weight)
            yield from zip(weight.tensors, to_tensors(weight, parts), strict=True)

    def _gathered(self, weight: Weight) -> list[torch.Tensor]:
        """The parts of all tensor ranks, on every rank: from the stage and the expert rank that hold the parameter."""
        stage, shape, dtype = self._stages[weight.parameter]
        topology = self.topology
        held = self._held.get(weight.parameter)
        if held is None:
            held = torch.empty(shape, dtype=dtype, device=topology.device)
        if weight.expert is not None and topology.pp_rank == stage:
            experts = self._chunks[0].architecture.experts
            assert experts is not None
            _broadcast(held, weight.expert // (experts.count // topology.ep_size), topology.ep_group, topology.ep_size)
        _broadcast(held, stage, topology.pp_group, topology.pp_size)
        _, ranks = tensor_rank(weight, topology)
        if weight.split is Split.WHOLE or ranks == 1:
            return [held]
        parts = [torch.empty_like(held) for _ in range(ranks)]
        group = topology.tp_group if weight.expert is None else expert_tensor_group()
        dist.all_gather(parts, held.contiguous(), group=group)
        return parts

    def _value_head_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The head of a ValueModel, from the last pipeline stage; nothing of another model."""
        if self.is_value_model:
            head = _value_head(self._chunks)
            weight = self.topology.from_last_stage(None if head is None else head.detach().cpu(), phase="exporting weights")
            yield SCORE, weight.to(self.topology.device)


def _broadcast(tensor: torch.Tensor, source: int, group: dist.ProcessGroup, ranks: int) -> None:
    """In place, from the rank of place `source` in the group."""
    if ranks > 1:
        dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)


#: Of each parameter of the whole model: the pipeline stage that holds it, and its shape and dtype on one tensor rank.
Stages = dict[str, tuple[int, torch.Size, torch.dtype]]


def _stages(held: dict[str, torch.Tensor], table: list[Weight], topology: Topology) -> Stages:
    """*All ranks of a pipeline, all expert ranks.* Raises ModelLoadError with the parameters that no stage holds."""
    mine: Stages = {name: (topology.pp_rank, tensor.shape, tensor.dtype) for name, tensor in held.items()}
    for group, ranks in ((topology.ep_group, topology.ep_size), (topology.pp_group, topology.pp_size)):
        if ranks > 1:
            every: list[Stages] = [mine] * ranks
            with topology.deadline("naming the model's weights"):
                dist.all_gather_object(every, mine, group=group)
            mine = {name: place for stages in every for name, place in stages.items()}
    if absent := [weight.parameter for weight in table if weight.parameter not in mine]:
        raise ModelLoadError(f"The model has no parameters for these rows of its family's table: {', '.join(absent)}.")
    return mine


def _fused_groups(table: list[Weight]) -> list[tuple[str, ...]]:
    """The table's tensors in groups that travel together: those of one module where a parameter holds several.

    Each expert's matrices are a group of their own: a layer with all its experts would be no bucket's size.
    """

    def module_of(weight: Weight) -> str:
        alone = len(weight.tensors) == 1 or weight.expert is not None
        return weight.parameter if alone else weight.parameter.rpartition(".")[0]

    return [
        tuple(itertools.chain.from_iterable(weight.tensors for weight in weights))
        for _, weights in itertools.groupby(table, key=module_of)
    ]


def save_hf(
    exporter: HFExporter,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model as a Hugging Face directory that transformers and vLLM load. *All ranks*; rank 0 writes.

    Shards of at most `max_shard_bytes` (a larger single tensor gets its own), one in memory at a time; config.json, tokenizer and
    generation settings from `source_dir`. Atomic: written beside `out_dir` and renamed to it at the end, replacing a directory of
    that name. Raises CheckpointError, on every rank, if the files can't be written.
    """
    weights = exporter.iter_weights(dtype)
    failure = ""
    if exporter.topology.is_main:
        try:
            _write_directory(weights, exporter, Path(source_dir), Path(out_dir), dtype, max_shard_bytes)
        except (OSError, SafetensorError) as error:
            failure = f"The Hugging Face export to {out_dir} failed: {error}. Free space or choose another directory, then retry."
    for _ in weights:
        pass  # the gathers of the export need every rank to the end, also after a failure of rank 0
    failure = exporter.topology.broadcast_object(failure, "saving the Hugging Face export")
    if failure:
        raise CheckpointError(failure)


def _write_directory(
    weights: Iterator[tuple[str, torch.Tensor]], exporter: HFExporter, source: Path, target: Path, dtype: torch.dtype, limit: int
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_shards(weights, _plan_shards(exporter, dtype, limit), scratch)
        for pattern in COPIED:
            for file in sorted(source.glob(pattern)):
                shutil.copyfile(file, scratch / file.name)
        _write_config(source, scratch, dtype, is_value_model=exporter.is_value_model)
        _open_permissions(scratch)
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, aside)
            os.replace(scratch, target)
            shutil.rmtree(aside)
        else:
            os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """What exports to `target` left beside it that were killed: each is as large as the model.

    One that was killed between its two renames has moved the old model aside, and nothing into its place: that comes back.
    """
    scratch = re.compile(rf"\.{re.escape(target.name)}\.(old\.)?[a-z0-9_]{{8}}")
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        found = scratch.fullmatch(path.name)
        if found and found.group(1) and not target.exists() and any(path.iterdir()):
            os.replace(path, target)
        elif found:
            shutil.rmtree(path)


def _open_permissions(folder: Path) -> None:
    """What the umask would have given: temporary directories and safetensors files are made private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _plan_shards(exporter: HFExporter, dtype: torch.dtype, limit: int) -> list[list[str]]:
    """The names of each shard, in export order."""
    shards: list[list[str]] = [[]]
    room = limit
    for name in exporter.names():
        size = torch.Size(exporter.shapes[name]).numel() * exporter.dtype_of(name, dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _write_shards(weights: Iterator[tuple[str, torch.Tensor]], plan: list[list[str]], folder: Path) -> None:
    weight_map: dict[str, str] = {}
    size_bytes = 0
    for number, names in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        shard = {name: tensor.to("cpu", copy=True) for name, tensor in itertools.islice(weights, len(names))}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        size_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(plan) > 1:
        index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(source: Path, folder: Path, dtype: torch.dtype, *, is_value_model: bool) -> None:
    settings = json.loads((source / "config.json").read_text())
    # transformers 5 calls the key "dtype", 4 "torch_dtype"; the file keeps the one it came with.
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    settings[key] = str(dtype).removeprefix("torch.")
    settings |= {name: 0 for name in EXTRA_LAYERS if name in settings}  # they are not exported
    if is_value_model:
        # How transformers spells a classifier with one label: a number instead of classes.
        causal = settings.get("architectures") or []
        settings["architectures"] = [name.replace("ForCausalLM", "ForSequenceClassification") for name in causal]
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
