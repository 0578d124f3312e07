"""Hugging Face directories to Megatron checkpoints and back, each with the proof that nothing was lost on the way.

After writing, the result is read again into a model of its own, and every tensor of that is compared bit for bit, one at a time,
with what the source holds. Any layout converts: each rank holds, writes and reads its part. A rank needs the memory of its part
of the model twice where the source is a Megatron checkpoint, once otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.state import load_model
from skyrl_mega.checkpoint.weights_only import save_weights, stored_dtypes
from skyrl_mega.config.load import load_saved
from skyrl_mega.config.schema import Config, ModelConfig
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import CheckpointError, ConfigError
from skyrl_mega.models.build import build_model
from skyrl_mega.models.hf_io import HFExporter, TensorReader, load_hf_weights, read_headers, save_hf
from skyrl_mega.training.policy import forward_logprobs
from skyrl_mega.training.schedule import packing_multiples

if TYPE_CHECKING:
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology

Direction = Literal["hf to megatron", "megatron to hf"]

#: safetensors' names of the dtypes that a model is kept in.
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
#: Largest difference of a logprob from Hugging Face's, both in float32.
LOGPROB_TOLERANCE = 2e-3
_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 48


@dataclass(frozen=True)
class Source:
    """What is converted. `model_path`: the Hugging Face directory whose config.json the model is built from."""

    path: Path
    direction: Direction
    model_path: Path
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorLine:
    """A tensor before and after. `dtype` is the result's, `source_dtype` what the source keeps it in.

    `max_abs_diff`: between the two in float64, the rounding to a narrower dtype included. `is_same`: bit for bit, once the
    source's has been rounded to `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    max_abs_diff: float
    is_same: bool


@dataclass(frozen=True)
class Conversion:
    """The proof. `left_out`: tensors of the source that no model needs (a tied head's copy, say).

    `logprob_diff`: largest difference from Hugging Face on a few random sequences in float32; None where it was not asked for.
    """

    source: str
    output: str
    direction: Direction
    dtype: str
    layout: dict[str, int]
    tensors: list[TensorLine]
    left_out: list[str] = field(default_factory=list)
    logprob_diff: float | None = None
    logprob_tolerance: float = LOGPROB_TOLERANCE

    @property
    def agrees(self) -> bool:
        good_logprobs = self.logprob_diff is None or self.logprob_diff <= self.logprob_tolerance
        return bool(self.tensors) and all(line.is_same for line in self.tensors) and good_logprobs

    def as_dict(self) -> dict[str, Any]:
        return {"agrees": self.agrees, **asdict(self)}


def describe_source(path: Path, *, model: Path | None = None, dtype: str = "auto") -> Source:
    """What `path` is: a directory of safetensors, or a checkpoint of a run or of an earlier conversion.

    `model`: where a checkpoint's config.json and tokenizer are, if neither it nor its run says. `dtype` auto: what the source
    is in (float32 where it is in several). Raises ConfigError, CheckpointError, ModelLoadError.
    """
    if (path / ".metadata").is_file():
        dtypes = set(stored_dtypes(path).values())
        place = Source(path, "megatron to hf", model or _model_of(path), _widest(dtypes))
    elif (path / "config.json").is_file():
        unknown = {tensor.dtype for tensor in read_headers(path).values()} - _DTYPES.keys()
        if unknown:
            raise ConfigError(
                f"{path} holds tensors of the types {', '.join(sorted(unknown))}; only floating-point weights convert."
            )
        place = Source(path, "hf to megatron", path, _widest({_DTYPES[t.dtype] for t in read_headers(path).values()}))
    else:
        raise ConfigError(
            f"`{path}` is neither a Hugging Face model (config.json, *.safetensors) nor a Megatron checkpoint (.metadata)."
            " Give the directory itself, as in runs/quickstart/checkpoints/step_000100."
        )
    return place if dtype == "auto" else replace(place, dtype=getattr(torch, dtype))


def model_config(source: Source, config: Config) -> Config:
    """`config`, of which the layout counts, for the model of `source` in the dtype of the result."""
    name: Any = str(source.dtype).removeprefix("torch.")
    return replace(config, model=ModelConfig(path=str(source.model_path), dtype=name, kernels=config.model.kernels))


def convert(source: Source, output: Path, config: Config, topology: Topology, *, check_logprobs: bool = False) -> Conversion:
    """Writes `source` to `output` in the other format, and compares. *All ranks*; the tensors are listed on rank 0.

    `config` is `model_config`'s. Raises CheckpointError or ModelLoadError where either can't be read or written.
    """
    route = _to_megatron if source.direction == "hf to megatron" else _to_hf
    before, written, exporter = route(source, output, config, topology)
    lines = []
    # Both sides are gathered over the ranks, tensor by tensor and in the same order.
    for (name, first), (_, second) in zip(before, exporter.iter_weights(source.dtype), strict=True):
        if first is not None and topology.is_main:
            lines.append(_compare(name, first, second))
    hf_dir = source.path if source.direction == "hf to megatron" else output
    names = set(exporter.names())
    return Conversion(
        source=str(source.path),
        output=str(output),
        direction=source.direction,
        dtype=str(source.dtype).removeprefix("torch."),
        layout={name: size for name, size in vars(config.parallel).items() if type(size) is int and size > 1},
        tensors=lines,
        left_out=sorted(read_headers(hf_dir).keys() - names),
        logprob_diff=_logprob_diff(written, config, topology, hf_dir) if check_logprobs else None,
    )


#: (name and source tensor in export order, None on ranks that do not compare; the model read from what was written; its exporter)
_Route = tuple[Iterator[tuple[str, "torch.Tensor | None"]], "list[PolicyModel]", HFExporter]


def _to_megatron(source: Source, output: Path, config: Config, topology: Topology) -> _Route:
    chunks = build_model(config, topology)
    load_hf_weights(chunks, source.path, topology)
    save_weights(chunks, output, source.path, topology)
    del chunks  # what is compared is what was written, not what is still in memory
    written = build_model(config, topology)
    load_model(output, written)
    exporter = HFExporter(written, topology)
    return _stored_tensors(source.path, exporter.names(), topology), written, exporter


def _to_hf(source: Source, output: Path, config: Config, topology: Topology) -> _Route:
    chunks = build_model(config, topology)
    load_model(source.path, chunks)
    before = HFExporter(chunks, topology)
    if topology.broadcast_object(output.exists(), phase="converting"):
        raise CheckpointError(f"{output} exists; name a directory that does not")
    save_hf(before, source.model_path, output, source.dtype)
    written = build_model(config, topology)
    load_hf_weights(written, output, topology)
    return before.iter_weights(source.dtype), written, HFExporter(written, topology)


def _stored_tensors(path: Path, names: list[str], topology: Topology) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The tensors of a directory in the order of `names`, read on rank 0."""
    if not topology.is_main:
        yield from ((name, None) for name in names)
        return
    with TensorReader(read_headers(path)) as reader:
        for name in names:
            yield name, reader.read(name)


def _compare(name: str, source: torch.Tensor, result: torch.Tensor) -> TensorLine:
    source, result = source.cpu(), result.cpu()
    same_shape = source.shape == result.shape
    difference = (source.double() - result.double()).abs().max() if same_shape and source.numel() else torch.tensor(float("inf"))
    return TensorLine(
        name,
        tuple(result.shape),
        str(source.dtype).removeprefix("torch."),
        str(result.dtype).removeprefix("torch."),
        float(difference),
        same_shape and torch.equal(_bits(source.to(result.dtype)), _bits(result)),
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals NaN and 0 is not -0."""
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def _logprob_diff(chunks: list[PolicyModel], config: Config, topology: Topology, hf_dir: Path) -> float:
    """The largest difference between the logprobs of `chunks`, in float32, and Hugging Face's of `hf_dir`. *All ranks.*"""
    config = replace(config, model=replace(config.model, dtype="float32"))
    single = build_model(config, topology)
    with torch.no_grad():
        for target, chunk in zip(single, chunks, strict=True):
            for parameter, value in zip(target.parameters(), chunk.parameters(), strict=True):
                parameter.copy_(value)
    vocab = min(single[0].vocab_size, 10_000)
    samples = random_samples(_PROBE_SEQUENCES, 1, vocab=vocab, max_len=_PROBE_TOKENS, seed=0)
    batch = balance_and_pack(
        samples,
        tokens_per_micro_batch=_PROBE_SEQUENCES * _PROBE_TOKENS,
        dp_rank=0,  # every copy of the model computes all of them
        dp_size=1,
        skip_zero_advantage=False,
        **packing_multiples(config, topology),
    )
    rows = unpack(forward_logprobs(single, batch, config, topology, temperature=1.0), batch, samples)
    difference = None
    if topology.is_main:
        difference = _difference_from_hf(hf_dir, [(s.token_ids, s.loss_mask, row) for s, row in zip(samples, rows, strict=True)])
    return float(topology.broadcast_object(difference, phase="converting"))


def _difference_from_hf(hf_dir: Path, rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """`rows`: (token_ids, loss_mask, logprobs) of each sequence, token-aligned."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    worst = 0.0
    with torch.no_grad():
        for token_ids, mask, logprobs in rows:
            logits_TV = model(token_ids[None]).logits[0, :-1].float()
            expected = logits_TV.log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
            worst = max(worst, float((expected - logprobs[1:])[mask[1:]].abs().max()))
    return worst


def _model_of(path: Path) -> Path:
    """The Hugging Face directory of a checkpoint's model: beside it, or what its run was started from."""
    if (path / "config.json").is_file():
        return path
    saved = path.resolve().parent.parent / "config.yaml"
    if path.resolve().parent == store.checkpoints_dir(saved.parent).resolve() and saved.is_file():
        return Path(load_saved(saved).model.path)
    raise ConfigError(
        f"Nothing says what model `{path}` holds: it has no config.json and lies in no run. Give `--model DIR`, a directory with"
        " its config.json and tokenizer."
    )


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """bfloat16 where everything is; else float32, which holds float16 too (and rounds float64)."""
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
