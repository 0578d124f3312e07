"""Weights from a Hugging Face directory into a policy, and back out, every tensor accounted for.

mbridge maps names and layouts (q, k, v interleaved by group into `linear_qkv`; gate and up into `linear_fc1`; tensor-parallel
splits). This module streams the files, checks that file and model hold exactly the same tensors, and writes directories that
transformers and vLLM load. An untouched policy exports bit for bit what was loaded.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skyrl_mega.errors import CheckpointError, ModelLoadError
from skyrl_mega.models.build import EXPERTS, PolicyModel
from skyrl_mega.models.families import Architecture, hf_tensor_shapes, read_hf_config
from skyrl_mega.parallel.device import install_megatron_cpu_shim
from skyrl_mega.parallel.topology import Topology

FLOAT_TYPES = ("F64", "F32", "BF16", "F16")
INDEX_FILE = "model.safetensors.index.json"
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 2_000_000_000
#: A mixture of experts has ten thousand tensors; as many lines would hide what is wrong.
MAX_PROBLEMS_SHOWN = 40
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

    Streams: one tensor is in memory at a time; tensor rank 0 of each replica reads and scatters. A `lm_head.weight` beside tied
    embeddings is accepted if it equals them. Raises ModelLoadError, on every rank and before anything is loaded, with the
    names of the tensors that are missing, left over, of the wrong shape, or not floating point.
    """
    architecture = chunks[0].architecture
    stored = read_headers(path)
    _check_tensors(architecture, stored, path)
    bridge = _make_bridge(chunks[0], path)
    _check_mapping(architecture, _mapping(bridge, chunks, topology))
    with torch.no_grad(), topology.deadline(f"loading weights from {path}"):
        bridge.load_weights([MappedModel(chunk) for chunk in chunks], str(path), memory_efficient=True)


def read_headers(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory, by name; reads headers only. Raises ModelLoadError."""
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(Path(path)):
        for name, tensor in _file_headers(file).items():
            if name in stored:
                raise ModelLoadError(f"{path}: {name} is in {stored[name].file.name} and in {file.name}; keep one of them.")
            stored[name] = tensor
    return stored


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


def _check_tensors(architecture: Architecture, stored: dict[str, StoredTensor], path: str | Path) -> None:
    expected = hf_tensor_shapes(architecture)
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            problems.append(f"wrong shape: {name} is {tensor.shape}, config.json asks for {expected[name]}")
        elif name in expected and tensor.dtype not in FLOAT_TYPES:
            problems.append(f"not floating point: {name} is {tensor.dtype}")
        elif name not in expected and not _may_stay(name, architecture, stored, problems):
            problems.append(f"unexpected: {name} {tensor.shape}")
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ModelLoadError(
            f"{path}: weights and config.json do not fit ({len(problems)} problems):\n  " + "\n  ".join(shown) + more
        )


def _may_stay(name: str, architecture: Architecture, stored: dict[str, StoredTensor], problems: list[str]) -> bool:
    """True for tensors beyond the architecture's that change nothing: a tied head's copy, and rotary frequencies of old files."""
    if name.endswith(".self_attn.rotary_emb.inv_freq"):
        return True
    if name != TIED_HEAD or not architecture.tied or EMBEDDING not in stored:
        return False
    if not torch.equal(_read(stored, TIED_HEAD), _read(stored, EMBEDDING)):
        problems.append(f"{TIED_HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true: set it to false")
    return True


def _read(stored: dict[str, StoredTensor], name: str) -> torch.Tensor:
    with safe_open(stored[name].file, framework="pt") as opened:
        return opened.get_tensor(name)


class MappedModel:
    """A policy as mbridge knows models: its parameters under TransformerEngine's names, one per expert and matrix.

    Megatron's experts without TransformerEngine are modules of their own (`experts.local_experts.3.linear_fc1.weight`); with it
    they are numbered parameters (`experts.linear_fc1.weight3`). Looked up once: Megatron's state_dict of a thousand experts is
    slow, and mbridge asks for it once a tensor.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self.decoder = policy.decoder
        self._experts_are_whole = policy.config.expert_tensor_parallel_size == 1
        self._parameters = {_grouped_name(name): parameter for name, parameter in policy.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            # mbridge gathers over tensor ranks what is marked as split. Whole experts are marked too, for the gradient norm.
            yield name, parameter.detach() if self._experts_are_whole and EXPERTS in name else parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._parameters


_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")
_GROUPED_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.weight)(\d+)$")


def _grouped_name(name: str) -> str:
    return _LOCAL_EXPERT.sub(r".experts.\2.weight\1", name)


#: (parameter's name in the whole model, the Hugging Face tensors that it holds), in export order.
Mapping = list[tuple[str, list[str]]]


def _mapping(bridge: Any, chunks: Sequence[PolicyModel], topology: Topology) -> Mapping:
    """The parameters of all pipeline stages, all experts among them. *All ranks.*

    With tied weights the last of several stages holds a copy of the embedding as its head: it is no tensor of its own.
    """
    names = []
    for chunk in chunks:
        mapped = MappedModel(chunk)
        to_global = bridge._weight_name_mapping_mcore_local_to_global(mapped, consider_ep=False)
        names += [every for name in mapped.state_dict() for every in _on_every_rank(to_global[name], chunk, topology)]
    mine = [(name, list(bridge._weight_name_mapping_mcore_to_hf(name))) for name in names]
    stages: list[Mapping] = [mine] * topology.pp_size
    if topology.pp_size > 1:
        with topology.deadline("naming the model's weights"):
            dist.all_gather_object(stages, mine, group=topology.pp_group)
    mapping = list(itertools.chain.from_iterable(stages))
    is_tied_copy = chunks[0].architecture.tied and topology.pp_size > 1
    return [pair for pair in mapping if not (is_tied_copy and pair[0] == "output_layer.weight")]


def _on_every_rank(name: str, policy: PolicyModel, topology: Topology) -> list[str]:
    """The names of the parameter `name` of this rank and, for an expert, of those in its place on the other expert ranks."""
    match = _GROUPED_EXPERT.search(name)
    if match is None:
        return [name]
    assert policy.architecture.experts is not None
    held = policy.architecture.experts.count // topology.ep_size
    return [_GROUPED_EXPERT.sub(rf"\g<1>{rank * held + int(match[2])}", name) for rank in range(topology.ep_size)]


def _check_mapping(architecture: Architecture, mapping: Mapping) -> None:
    """Guards the seam to mbridge: the names it maps the model's parameters to must be the architecture's tensors, each once."""
    names = list(itertools.chain.from_iterable(hf_names for _, hf_names in mapping))
    expected = hf_tensor_shapes(architecture)
    if sorted(names) != sorted(expected):
        wrong = sorted(set(names) ^ set(expected)) or [name for name in expected if names.count(name) != 1]
        raise ModelLoadError(f"mbridge maps this {architecture.family} model to other tensors than its config has: {wrong}.")


def _make_bridge(policy: PolicyModel, path: str | Path) -> Any:
    """mbridge's bridge for the model: maps names and layouts only; the model itself is ours."""
    from mbridge import AutoBridge
    from mbridge.core import Bridge

    install_megatron_cpu_shim()  # again: mbridge has just been imported
    a = policy.architecture
    hf_config = read_hf_config(path)
    hf_config.head_dim = a.head_dim
    dtype = next(policy.parameters()).dtype
    bridge = AutoBridge.from_config(hf_config, dtype=dtype)
    # mbridge notes a tied head in a dictionary of the class: a tied Qwen would redirect the head of every later untied one.
    head = EMBEDDING if a.tied else TIED_HEAD
    bridge._DIRECT_MAPPING = {**bridge._DIRECT_MAPPING, "output_layer.weight": head}
    # A mixture of experts may have dense layers too; mbridge's bridges for it know none.
    bridge._MLP_MAPPING = {**Bridge._MLP_MAPPING, **bridge._MLP_MAPPING}
    if policy.padded_vocab_size != policy.vocab_size:
        bridge.make_vocab_size_divisible_by = policy.config.tensor_model_parallel_size
        bridge.vocab_size, bridge.padded_vocab_size = policy.vocab_size, policy.padded_vocab_size
    return bridge


class HFExporter:
    """The policy's weights under Hugging Face names (a `WeightSource`).

    `hf_path` is the directory the model was built from. Order: the model's own parameter order, the same in every call. *All
    ranks* make one.
    """

    def __init__(self, chunks: Sequence[PolicyModel], hf_path: str | Path, topology: Topology) -> None:
        self._chunks = list(chunks)
        self._architecture = chunks[0].architecture
        self.topology = topology
        self._bridge = _make_bridge(chunks[0], hf_path)
        mapping = _mapping(self._bridge, chunks, topology)
        _check_mapping(self._architecture, mapping)
        self._groups = _fused_groups(mapping)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every exported tensor."""
        return hf_tensor_shapes(self._architecture)

    def names(self) -> list[str]:
        """Names in export order."""
        return list(itertools.chain.from_iterable(self._groups))

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        """Names that must travel together, in export order: q, k, v (with their biases), and gate, up; others are alone."""
        return self._groups

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """*All ranks, to the end.* (name, full contiguous tensor in `dtype`), from all tensor ranks and stages, one at a time.

        The tensor may share memory with a parameter: never write to it, and copy it to keep it beyond the next update of the
        weights. Raises DeadlineError.
        """
        weights = self._bridge.export_weights([MappedModel(chunk) for chunk in self._chunks])
        seen: set[str] = set()
        while True:
            # Not around the whole loop: the consumer's code between two tensors runs in its own grad mode.
            with torch.no_grad(), self.topology.deadline("exporting weights"):
                item = next(weights, None)
                if item is None:
                    return
                name, tensor = item[0], item[1].detach().to(dtype).contiguous()
            if name not in seen:  # the last stage's copy of a tied embedding comes a second time
                seen.add(name)
                yield name, tensor


def _fused_groups(mapping: Mapping) -> list[tuple[str, ...]]:
    """The mapping's tensors in groups that travel together: those of one module where a parameter holds several.

    Each expert is a group of its own: a layer with all its experts would be no bucket's size.
    """

    def module_of(pair: tuple[str, list[str]]) -> str:
        name, hf_names = pair
        return name.rpartition(".")[0] if len(hf_names) > 1 and not _GROUPED_EXPERT.search(name) else name

    return [
        tuple(itertools.chain.from_iterable(hf_names for _, hf_names in pairs))
        for _, pairs in itertools.groupby(mapping, key=module_of)
    ]


def save_hf(
    exporter: HFExporter,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the policy as a Hugging Face directory that transformers and vLLM load. *All ranks*; rank 0 writes.

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
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_shards(weights, _plan_shards(exporter, dtype.itemsize, limit), scratch)
        for pattern in COPIED:
            for file in sorted(source.glob(pattern)):
                shutil.copyfile(file, scratch / file.name)
        _write_config(source, scratch, dtype)
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


def _open_permissions(folder: Path) -> None:
    """What the umask would have given: temporary directories and safetensors files are made private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _plan_shards(exporter: HFExporter, itemsize: int, limit: int) -> list[list[str]]:
    """The names of each shard, in export order."""
    shards: list[list[str]] = [[]]
    room = limit
    for name in exporter.names():
        size = torch.Size(exporter.shapes[name]).numel() * itemsize
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


def _write_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    settings = json.loads((source / "config.json").read_text())
    # transformers 5 calls the key "dtype", 4 "torch_dtype"; the file keeps the one it came with.
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    settings[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
