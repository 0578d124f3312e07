"""Weight versions reach the real vLLM engine whole, or not at all. Oracle: Hugging Face in float32 with the same weights."""

from __future__ import annotations

import copy
import multiprocessing

import pytest
import torch

from helpers.tiny import write_tiny_model
from helpers.weight_fleet import one_engine_sink
from skyrl_mega.errors import RolloutError, WeightSyncError
from skyrl_mega.types import GenerationRequest, SamplingParams
from skyrl_mega.weights.publish import publish

BUCKET_BYTES = 60_000  # about ten buckets of the tiny model
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class ModelSource:
    """A Hugging Face model as a WeightSource; `fused=False` pretends that no tensors belong together."""

    def __init__(self, model, *, fused=True):
        self.model, self.fused = model, fused

    def fused_groups(self):
        groups = {}
        for name, _ in self.model.named_parameters():
            key = name
            for members in FUSED if self.fused else ():
                for member in members:
                    key = key.replace(f".{member}.", f".{members[0]}.")
            groups.setdefault(key, []).append(name)
        return [tuple(names) for names in groups.values()]

    def iter_weights(self, dtype):
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().to(dtype)


def perturbed(model, seed, scale=0.5):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * scale)
    return model


@torch.no_grad()
def logprob_error(engine, model, prompt):
    """Largest |engine - Hugging Face| over a sampled turn after `prompt` and over the scored whole."""
    (completion,) = engine.generate([GenerationRequest("probe", prompt, SamplingParams(max_new_tokens=12, seed=1))])
    sequence = [*prompt, *completion.token_ids]
    logprobs = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
    sampled = (torch.tensor(completion.logprobs) - expected[len(prompt) - 1 :]).abs().max()
    scored = (torch.tensor(engine.score([sequence])[0][1:]) - expected).abs().max()
    return max(sampled.item(), scored.item())


PROMPT = [(7 * i) % 250 + 5 for i in range(100)]  # three full cache blocks and a bit


@pytest.fixture(scope="module")
def base_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sink(engine):
    sink = one_engine_sink(engine)
    yield sink
    sink.close()


@pytest.fixture(
    params=[("shm", False), ("gloo", False), ("shm", True), ("gloo", True)], ids=["shm", "gloo", "shm-delta", "gloo-delta"]
)
def any_sink(request, engine):
    transport, delta = request.param
    sink = one_engine_sink(engine, transport, delta=delta)
    yield sink
    sink.close()


@pytest.fixture
def synced(engine, sink, base_model):
    """The engine; after the test it serves the original weights again."""
    yield engine
    sink.abort()
    publish(ModelSource(base_model), sink, 100, torch.float32, bucket_bytes=BUCKET_BYTES)


def push(sink, source, version):
    return publish(source, sink, version, torch.float32, bucket_bytes=BUCKET_BYTES)


def test_every_version_is_served_as_pushed_by_every_transport(synced, any_sink, base_model):
    assert logprob_error(synced, base_model, PROMPT) < 1e-3
    for version in (1, 2):
        model = perturbed(base_model, seed=version)
        assert logprob_error(synced, model, PROMPT) > 0.1
        published = push(any_sink, ModelSource(model), version)
        assert logprob_error(synced, model, PROMPT) < 1e-3
        assert synced.policy_version == published.version == version
        assert published.num_tensors == len(list(model.parameters()))
        assert published.size_bytes == sum(p.numel() * 4 for p in model.parameters())
        phases = {"gather", "pack", "checksum", "wait", "load", "load_unhidden", "worker_load", "finish", "total"}
        assert phases <= published.seconds.keys()


def test_completions_carry_the_version_that_sampled_them(synced, sink, base_model):
    request = GenerationRequest("r", PROMPT, SamplingParams(max_new_tokens=4, seed=0))
    push(sink, ModelSource(base_model), 41)
    assert set(synced.generate([request])[0].policy_versions) == {41}
    push(sink, ModelSource(base_model), 42)
    assert set(synced.generate([request])[0].policy_versions) == {42}


def test_no_cached_prefix_of_old_weights_survives_a_sync(synced, sink, base_model):
    """The same long prompt before and after: keys and values cached by the old weights would give themselves away."""
    assert logprob_error(synced, base_model, PROMPT) < 1e-3
    model = perturbed(base_model, seed=5)
    push(sink, ModelSource(model), 5)
    (completion,) = synced.generate([GenerationRequest("r", PROMPT, SamplingParams(max_new_tokens=12, seed=1))])
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *completion.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-3


def test_the_same_weights_have_the_same_checksum_and_others_another(synced, sink, base_model):
    first, second = push(sink, ModelSource(base_model), 1), push(sink, ModelSource(base_model), 2)
    other = push(sink, ModelSource(perturbed(base_model, seed=1, scale=1e-3)), 3)
    assert first.checksum == second.checksum != other.checksum


def test_a_split_group_is_refused_and_the_old_version_serves_on(synced, sink, base_model):
    push(sink, ModelSource(base_model), 1)
    source = ModelSource(perturbed(base_model, seed=6))
    gate = [(n, t) for n, t in source.iter_weights(torch.float32) if n.endswith("layers.0.mlp.gate_proj.weight")]
    sink.start(2, source.fused_groups())
    with pytest.raises(WeightSyncError, match=r"gate_proj.weight came without .*up_proj"):
        sink.put(gate)
    with pytest.raises(RolloutError, match="version 2 is on its way"):
        synced.score([PROMPT])
    sink.abort()
    assert synced.policy_version == 1
    assert logprob_error(synced, base_model, PROMPT) < 1e-3


def test_an_incomplete_version_is_refused(synced, sink, base_model):
    source = ModelSource(base_model)
    sink.start(3, source.fused_groups())
    sink.put([(n, t) for n, t in source.iter_weights(torch.float32) if "layernorm" in n or n == "model.norm.weight"])
    with pytest.raises(WeightSyncError, match="version 3 is incomplete"):
        sink.finish()


def test_the_engine_itself_refuses_a_fused_layer_that_came_in_part(synced, sink, base_model):
    """A source that doesn't know its groups can lose a tensor; the layer would hold garbage in its place."""
    source = ModelSource(perturbed(base_model, seed=7), fused=False)
    groups = [group for group in source.fused_groups() if "layers.1.self_attn.v_proj" not in group[0]]
    sink.start(4, groups)
    sink.put([(n, t) for n, t in source.iter_weights(torch.float32) if (n,) in groups])
    with pytest.raises(WeightSyncError, match="only part of a fused group"):
        sink.finish()
    sink.abort()
    with pytest.raises(RolloutError, match="version 4 reached the engine only in part"):
        synced.generate([GenerationRequest("r", PROMPT, SamplingParams(max_new_tokens=1))])

    model = perturbed(base_model, seed=8)
    push(sink, ModelSource(model), 5)
    assert logprob_error(synced, model, PROMPT) < 1e-3


@pytest.mark.parametrize("corrupted_bucket", [0, 3])
def test_a_corrupted_bucket_is_refused(synced, sink, base_model, monkeypatch, corrupted_bucket):
    """One flipped byte after the checksums were made. Nothing loaded yet: the old version serves on. Else: nothing does."""
    push(sink, ModelSource(base_model), 1)
    send, sent = synced._load_bucket, []

    def flip_a_byte_and_send(bucket):
        if len(sent) == corrupted_bucket:
            slot = bucket["slots"][-1]
            with open(bucket["path"], "r+b") as file:
                file.seek(slot["offset"] + slot["size_bytes"] // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
        sent.append(bucket)
        send(bucket)

    monkeypatch.setattr(synced, "_load_bucket", flip_a_byte_and_send)
    with pytest.raises(WeightSyncError, match=r"checksum of .* must be"):
        push(sink, ModelSource(perturbed(base_model, seed=9)), 2)
    monkeypatch.undo()
    assert len(sent) > 4

    if corrupted_bucket == 0:
        assert synced.policy_version == 1
        assert logprob_error(synced, base_model, PROMPT) < 1e-3
    else:
        with pytest.raises(RolloutError, match="version 2 reached the engine only in part"):
            synced.score([PROMPT])

    model = perturbed(base_model, seed=10)
    push(sink, ModelSource(model), 3)
    assert synced.policy_version == 3
    assert logprob_error(synced, model, PROMPT) < 1e-3


def test_a_tensor_of_the_wrong_shape_is_refused_after_half_of_its_layer_arrived(synced, sink, base_model):
    class WrongShape(ModelSource):
        def iter_weights(self, dtype):
            for name, tensor in super().iter_weights(dtype):
                yield name, tensor[:-1] if name == "model.layers.1.mlp.up_proj.weight" else tensor

    with pytest.raises(WeightSyncError, match="could not load a bucket"):
        push(sink, WrongShape(base_model), 2)
    push(sink, ModelSource(base_model), 3)
    assert logprob_error(synced, base_model, PROMPT) < 1e-3


def serve_untied_model_in_child_processes(model_dir, results):
    """Runs in a process of its own: an untied Qwen2 with biases behind vLLM's child processes."""
    from transformers import AutoModelForCausalLM

    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

    rollout = RolloutConfig(dtype="float32", max_model_len=128, max_num_seqs=8)
    engine = VLLMEngine.start(rollout, model_path=str(model_dir), seed=0, threads=1, in_process=False, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    observed = {"start": (engine.policy_version, logprob_error(engine, model, PROMPT))}
    sinks = [one_engine_sink(engine), one_engine_sink(engine, "gloo"), one_engine_sink(engine, "gloo", delta=True)]
    for version, sink in enumerate([*sinks, sinks[-1]], start=1):
        model = perturbed(model, seed=version, scale=0.1)
        # Buckets so small that a layer's weights and its biases come in different ones.
        publish(ModelSource(model), sink, version, torch.float32, bucket_bytes=1)
        observed[f"push {version}"] = (engine.policy_version, logprob_error(engine, model, PROMPT))
    sink = sinks[0]
    sink.start(3, [("model.norm.weight",)])
    sink.put([("model.norm.weight", model.model.norm.weight)])
    try:
        sink.finish()
    except WeightSyncError as error:
        observed["incomplete"] = str(error)
    sink.abort()
    observed["dead"] = push_to_an_engine_that_dies(engine, sinks[1], ModelSource(model))
    for sink in sinks:
        sink.close()
    engine.close()
    observed["children"] = [child.name for child in multiprocessing.active_children()]
    results.put(observed)


def push_to_an_engine_that_dies(engine, sink, source) -> str:
    """What the sink says when the engine's processes are killed after the first bucket."""
    send = engine._load_bucket

    def send_and_die(bucket):
        send(bucket)
        for child in multiprocessing.active_children():
            child.kill()

    engine._load_bucket = send_and_die
    try:
        publish(source, sink, 9, torch.float32, bucket_bytes=1)
    except WeightSyncError as error:
        return str(error)
    return "nothing was refused"


def test_an_untied_model_in_child_processes_serves_every_version(tmp_path):
    model_dir = write_tiny_model(tmp_path / "qwen2", "qwen2", tied=False, hidden_size=128)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=serve_untied_model_in_child_processes, args=(model_dir, results))
    process.start()
    observed = results.get(timeout=400)
    process.join(timeout=60)
    pushes = {"start": 0, "push 1": 1, "push 2": 2, "push 3": 3, "push 4": 4}
    assert {key: observed[key][0] for key in pushes} == pushes
    assert all(observed[key][1] < 1e-3 for key in pushes), observed
    assert "no engine received weight version 9" in observed["dead"]
    assert "vLLM failed" in observed["dead"]
    assert "parameters did not arrive" in observed["incomplete"]
    assert observed["children"] == []
