"""What does a weight version cost on its way from the trainer's memory to where an engine can read it?

Limits, written down first: over shm at most 3 times a plain copy of the same bytes; over gloo at least 60% of the rate of a bare
gloo broadcast of the same bytes in buckets of the same size; checksums of both ends adding under 5% to a sync with a real engine.

- `synthetic_1b`: 1.24 billion bfloat16 parameters in a Llama's shapes, from tensors in this process to a receiving process that
  has checked every byte ("engine-visible"); no engine, no repacking. Each round measures by turns: the plain copy (`memcpy`, to
  memory that was touched before), the bare broadcast (`raw_gloo`), and a whole version by `shm`, by `gloo`, and as differences
  after one element in fifty changed by its last bit (`shm_delta`, `gloo_delta`).
- `smollm2`: the same from SmolLM2-135M in bfloat16 into a real vLLM engine in a child process, until it serves the version.
  `worker_load` is vLLM's own loading and repacking. Each round also pushes with checksums taken out of both ends (`unchecked`):
  `checksum_cost` is what they add to a sync: median to median, of three times the rounds, for rounds differ by a tenth and more.
  `checksum_share`, the seconds spent summing at both ends over the sync's, is higher: the sender sums while others work.

Of every road the best round counts, and ratios are of best to best within one run: other people's work on the machine only
ever slows a round down. Sender and receiver have one thread each.

    python scripts/bench/weight_sync.py --json docs/benchmarks/weight_sync.json

SmolLM2 comes from .cache/models/SmolLM2-135M-Instruct, or from the directory that SKYRL_MEGA_BENCH_MODEL names.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to call `sum_nothing` in vLLM's worker

import torch

from skyrl_mega.rollout.transport.choose import make_transport
from skyrl_mega.rollout.transport.gloo_group import LOOPBACK, broadcast, join_group
from skyrl_mega.rollout.transport.receiver import BucketReceiver
from skyrl_mega.telemetry.resources import load_average
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware
from skyrl_mega.weights.fleet_sink import FleetSink
from skyrl_mega.weights.publish import publish

ROOT = Path(__file__).resolve().parents[2]
MODEL = os.environ.get("SKYRL_MEGA_BENCH_MODEL", str(ROOT / ".cache/models/SmolLM2-135M-Instruct"))
BUCKET_BYTES = 64 * 2**20
TIMEOUT_S = 120.0
CHANGED_SHARE = 0.02
ROADS = ("shm", "gloo", "shm_delta", "gloo_delta")  # whole versions first
UNCHECKED = "_unchecked"
NO_CHECKSUM = "0" * 16


class Tensors:
    """Named tensors as a `WeightSource`, q/k/v and gate/up together."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def fused_groups(self) -> list[tuple[str, ...]]:
        groups: dict[str, list[str]] = {}
        for name in self.tensors:
            key = name
            for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                for member in members:
                    key = key.replace(member, members[0])
            groups.setdefault(key, []).append(name)
        return [tuple(names) for names in groups.values()]

    def iter_weights(self, dtype: torch.dtype):
        yield from self.tensors.items()

    def change_some(self, seed: int) -> None:
        """Flips the last bit of some elements: what a small step leaves of itself in bfloat16."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.tensors.values():
            bits = tensor.view(torch.int16).view(-1)
            places = torch.randint(0, bits.numel(), (int(bits.numel() * CHANGED_SHARE),), generator=generator)
            bits[places] ^= 1


def synthetic_1b() -> Tensors:
    """A Llama of hidden size 2048: 16 layers, feed-forward 8192, 8 heads of keys of 64, vocabulary 128256, tied."""
    hidden, ffn, keys, vocab = 2048, 8192, 512, 128256
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(16):
        p = f"model.layers.{layer}"
        shapes |= {f"{p}.self_attn.{n}_proj.weight": (s, hidden) for n, s in (("q", hidden), ("k", keys), ("v", keys))}
        shapes |= {f"{p}.self_attn.o_proj.weight": (hidden, hidden), f"{p}.mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"{p}.mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes |= {f"{p}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(2**20, generator=generator).to(torch.bfloat16)
    return Tensors(
        {name: some.repeat(-(-(s := torch.Size(shape).numel()) // len(some)))[:s].view(shape) for name, shape in shapes.items()}
    )


def receive(pipe: Any) -> None:
    """The receiving process: a worker without a model."""
    torch.set_num_threads(1)
    receiver = BucketReceiver()
    while True:
        what, argument = pipe.recv()
        answer: Any = None
        if what == "connect":
            receiver.connect(argument, 0)
        elif what == "begin":
            receiver.begin()
        elif what == "load":
            receiver.receive(argument)
            receiver.release(argument)
        elif what == "report":
            answer = [{"error": receiver.error, **receiver.totals(), **receiver.state(), "seconds": receiver.seconds}]
        elif what == "commit":
            receiver.commit()
        elif what == "abandon":
            receiver.abandon()
        elif what == "raw":
            receive_raw(**argument)
        else:
            return
        pipe.send(answer)


def receive_raw(port: int, count: int, bucket_bytes: int) -> None:
    import datetime

    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False, timeout=timeout)
    group = join_group(store, "raw", 1, 2, host=LOOPBACK, timeout_s=TIMEOUT_S)
    buffer = torch.zeros(bucket_bytes, dtype=torch.uint8)
    for _ in range(count + 1):
        broadcast(group, buffer)


class ReceivingProcess:
    """A `WeightReceiver` over a process that runs `receive`."""

    name = "receiver"

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(theirs,), daemon=True)
        self._process.start()
        self._calls = ThreadPoolExecutor(1)

    def ask(self, what: str, argument: Any = None) -> Future[Any]:
        def call() -> Any:
            self._pipe.send((what, argument))
            return self._pipe.recv()

        return self._calls.submit(call)

    def connect(self, endpoint: Any) -> Future[None]:
        return self.ask("connect", endpoint)

    def begin(self, version: int) -> Future[None]:
        return self.ask("begin")

    def load(self, bucket: Any) -> Future[None]:
        return self.ask("load", bucket)

    def report(self) -> Future[Any]:
        return self.ask("report")

    def commit(self, version: int) -> Future[None]:
        return self.ask("commit")

    def abandon(self) -> Future[bool]:
        return self.ask("abandon")

    def close(self) -> None:
        self._pipe.send(("end", None))
        self._process.join()
        self._calls.shutdown()


def memcpy(source: Tensors, copies: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    for name, tensor in source.tensors.items():
        copies[name].copy_(tensor)
    return time.perf_counter() - started


def raw_gloo(receiver: ReceivingProcess, values: torch.Tensor) -> float:
    """Seconds of broadcasting `values` (uint8) by pieces of a bucket's size, from where they lie into one warm buffer."""
    import datetime

    import torch.distributed as dist

    count = values.numel() // BUCKET_BYTES
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=TIMEOUT_S))
    done = receiver.ask("raw", {"port": store.port, "count": count, "bucket_bytes": BUCKET_BYTES})
    group = join_group(store, "raw", 0, 2, host=LOOPBACK, timeout_s=TIMEOUT_S)
    broadcast(group, values[:BUCKET_BYTES])
    started = time.perf_counter()
    for index in range(count):
        broadcast(group, values[index * BUCKET_BYTES : (index + 1) * BUCKET_BYTES])
    done.result()
    return (time.perf_counter() - started) * values.numel() / (count * BUCKET_BYTES)


def make_sink(road: str, receiver: Any) -> FleetSink:
    name, _, delta = road.partition("_")
    transport = make_transport(name, delta=bool(delta), timeout_s=TIMEOUT_S)
    return FleetSink(lambda: [receiver], transport, timeout_s=TIMEOUT_S)


def push(source: Tensors, sink: FleetSink, version: int) -> dict[str, float]:
    published = publish(source, sink, version, torch.bfloat16, bucket_bytes=BUCKET_BYTES)
    assert published is not None
    if published.failed:
        raise RuntimeError(f"the push failed: {published.failed}")
    return {**published.seconds, "payload_bytes": sink.payload_bytes}


def sum_nothing(worker: Any = None, *, on: bool) -> None:
    """Takes checksums out of this process's ends of the transports, or puts them back. Also called in vLLM's worker."""
    from skyrl_mega.rollout.transport import checksum, encode, receiver

    def copy_only(target: torch.Tensor, tensor: torch.Tensor) -> tuple[str, float]:
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return NO_CHECKSUM, 0.0

    for module in (encode, receiver):
        module.tensor_checksum = (lambda tensor: NO_CHECKSUM) if on else checksum.tensor_checksum
    encode.copy_with_checksum = copy_only if on else checksum.copy_with_checksum


Turns = list[dict[str, float]]
#: Takes checksums out at both ends (True), or puts them back.
Switch = Callable[[bool], None]


def measure(
    source: Tensors, receiver: Any, rounds: int, *, with_raw_gloo: bool, uncheck: Switch | None = None
) -> list[dict[str, Turns]]:
    """Per road the seconds of every round, by phase; the first round touches new memory. One dict per group of roads by turns."""
    flat = torch.zeros(source.size_bytes, dtype=torch.uint8)
    copies, at = {}, 0
    for name, tensor in source.tensors.items():
        size = tensor.numel() * tensor.element_size()
        copies[name], at = flat[at : at + size].view(tensor.dtype).view(tensor.shape), at + size
    groups = []
    version = 0
    # Whole versions by turns. Differences afterwards, one road at a time: they build on the road's own last version.
    for roads in (ROADS[:2], ROADS[2:3], ROADS[3:]):
        seconds: dict[str, Turns] = {}
        sinks = {road: make_sink(road, receiver) for road in roads}
        if roads != ROADS[:2]:
            version += 1
            push(source, sinks[roads[0]], version)
        for turn in range((3 * rounds if uncheck is not None and roads == ROADS[:2] else rounds) + 1):
            seconds.setdefault("memcpy", []).append({"total": memcpy(source, copies)})
            if with_raw_gloo:
                seconds.setdefault("raw_gloo", []).append({"total": raw_gloo(receiver, flat)})
            for road, sink in sinks.items():
                version += 1
                if road.endswith("_delta"):
                    source.change_some(version)
                seconds.setdefault(road, []).append(push(source, sink, version))
                if uncheck is not None and roads == ROADS[:2]:
                    version += 1
                    uncheck(True)
                    seconds.setdefault(road + UNCHECKED, []).append(push(source, sink, version))
                    uncheck(False)
            print(f"  round {turn}: " + ", ".join(f"{k} {v[-1]['total']:.3f} s" for k, v in seconds.items()), file=sys.stderr)
        for sink in sinks.values():
            sink.close()
        groups.append(seconds)
    return groups


def records(case: str, source: Tensors, groups: list[dict[str, Turns]]) -> list[dict[str, Any]]:
    """A line per road. Ratios are to the copy and the broadcast that were measured by turns with it."""
    lines = []
    for index, seconds in enumerate(groups):
        best = {road: min(turns[1:], key=lambda phases: phases["total"]) for road, turns in seconds.items()}
        for road, phases in best.items():
            if (index == 0 or road in ROADS) and not road.endswith(UNCHECKED):
                lines.append(record(case, source, road, seconds, best, phases))
    return lines


def record(
    case: str,
    source: Tensors,
    road: str,
    seconds: dict[str, Turns],
    best: dict[str, dict[str, float]],
    phases: dict[str, float],
) -> dict[str, Any]:
    total = phases["total"]
    line = {
        "bench": "weight_sync",
        "case": case,
        "road": road,
        "size_bytes": source.size_bytes,
        "num_tensors": len(source.tensors),
        "payload_bytes": phases.get("payload_bytes", source.size_bytes),
        "bytes_per_s": source.size_bytes / total,
        "times_memcpy": total / best["memcpy"]["total"],
        "seconds": {name: value for name, value in phases.items() if name != "payload_bytes"},
        "first_push_s": seconds[road][0]["total"],
        "every_round_s": [turn["total"] for turn in seconds[road][1:]],
    }
    if "raw_gloo" in best:
        line["share_of_raw_gloo"] = best["raw_gloo"]["total"] / total
    if "checksum" in phases:
        if road + UNCHECKED in seconds:
            unchecked_s = [turn["total"] for turn in seconds[road + UNCHECKED][1:]]
            line["checksum_cost"] = statistics.median(line["every_round_s"]) / statistics.median(unchecked_s) - 1
            line["unchecked_every_round_s"] = unchecked_s
        line["checksum_share"] = (phases["checksum"] + phases["worker_checksum"]) / total
    if "worker_load" in phases:
        ours = sum(phases[name] for name in ("pack", "checksum", "worker_receive", "worker_checksum_wait"))
        line["times_memcpy_without_vllm"] = ours / best["memcpy"]["total"]
    return line


def run_synthetic(rounds: int) -> list[dict[str, Any]]:
    source, receiver = synthetic_1b(), ReceivingProcess()
    groups = measure(source, receiver, rounds, with_raw_gloo=True)
    receiver.close()
    return records("synthetic_1b", source, groups)


def run_smollm2(rounds: int) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

    tensors = {
        name: value.to(torch.bfloat16)
        for file in sorted(Path(MODEL).glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    source = Tensors(tensors)
    rollout = RolloutConfig(dtype="bfloat16", max_model_len=256, max_num_seqs=8)
    engine = VLLMEngine.start(rollout, model_path=MODEL, seed=0, threads=1, in_process=False, device="cpu")
    try:

        def uncheck(on: bool) -> None:
            sum_nothing(on=on)
            engine._living_llm().collective_rpc(sum_nothing, kwargs={"on": on})

        groups = measure(source, engine.weight_receiver(), rounds, with_raw_gloo=False, uncheck=uncheck)
    finally:
        engine.close()
    return records("smollm2", source, groups)


def print_table(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        phases = ", ".join(f"{name} {value:.3f}" for name, value in line["seconds"].items())
        extra = [f"{line['bytes_per_s'] / 1e9:.2f} GB/s", f"{line['times_memcpy']:.2f} x memcpy"]
        extra += [f"{100 * line['share_of_raw_gloo']:.0f}% of raw gloo"] if "share_of_raw_gloo" in line else []
        extra += [f"checksums {100 * line['checksum_share']:.1f}%"] if "checksum_share" in line else []
        extra += [f"(adding {100 * line['checksum_cost']:.1f}%)"] if "checksum_cost" in line else []
        print(f"{line['case']:<13} {line['road']:<10} {', '.join(extra)}; {phases}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there as a JSON list")
    parser.add_argument("--only", choices=("synthetic_1b", "smollm2"), help="one of the two cases")
    parser.add_argument("--bucket-mib", type=int, default=BUCKET_BYTES // 2**20, help="bytes of a bucket (default: that of runs)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5), after one that is not")
    options = parser.parse_args()
    if options.only != "synthetic_1b" and not Path(MODEL).is_dir():
        parser.error(f"no model at {MODEL}; run scripts/quickstart.sh once, or set SKYRL_MEGA_BENCH_MODEL")
    torch.set_num_threads(1)
    BUCKET_BYTES = options.bucket_mib * 2**20
    found = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "load": load_average(), "hardware": hardware()}
    found |= {"versions": collect_versions(), "commit": git_commit()}
    measured: list[dict[str, Any]] = []
    for case, run in (("synthetic_1b", run_synthetic), ("smollm2", run_smollm2)):
        if options.only in (None, case):
            print(case, file=sys.stderr)
            measured += run(options.rounds)
    print_table(measured)
    if options.json is not None:
        options.json.write_text(json.dumps([{**line, **found} for line in measured], indent=1) + "\n")
