"""The critic's values, losses, gradients and exported weights against Hugging Face in float64."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.critic import CriticOracle, critic_batch, critic_rows, make_critic
from helpers.hf_oracle import by_file_name
from helpers.policy import make_policy, tiny_config
from skyrl_mega.data.packing import unpack
from skyrl_mega.errors import DataError, ModelLoadError, NumericsError


def classifier_config(directory: Path, *overrides: str, family: str = "llama", tied: bool = True):
    """A configuration whose critic begins with a random head of one label beside the model's own body."""
    config = tiny_config(directory, *overrides, family=family, tied=tied)
    path = write_classifier(Path(config.model.path), directory / "critic")
    return tiny_config(directory, f"critic.path={path}", *overrides, family=family, tied=tied)


def write_classifier(source: Path, target: Path, *, labels: int = 1) -> Path:
    target.mkdir()
    tensors = {name: value for name, value in load_file(source / "model.safetensors").items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(3)
    # Of a size that makes values as large as the returns of `critic_batch`.
    tensors["score.weight"] = 0.2 * torch.randn(labels, tensors["model.norm.weight"].numel(), generator=generator)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_moe"])
def test_values_of_every_position_equal_hugging_face(tmp_path, family):
    config = classifier_config(tmp_path, family=family, tied=family != "qwen3")
    oracle = CriticOracle(config.critic.path)
    with make_critic(config) as critic, torch.no_grad():
        for share_prompts in (True, False):
            batch, samples = critic_batch(config, critic.topology, 1, share_prompts=share_prompts)
            computed = critic.compute_values(batch)
            assert [(v.dtype, v.shape) for v in computed] == [(torch.float32, b.input_ids.shape) for b in batch.micro_batches]
            for row, sample in zip(unpack(computed, batch, samples), samples, strict=True):
                expected = oracle.values(sample.token_ids)[:-1]
                spoken = torch.where(sample.loss_mask[1:], row[1:].double() - expected, 0.0)
                assert spoken.abs().max() < 1e-4
        # Without shared prompts each sample is one sequence: its prompt, and what follows its last token, have values too.
        for values_T, micro_batch in zip(computed, batch.micro_batches, strict=True):
            for start, end in itertools.pairwise(micro_batch.cu_seqlens.tolist()):
                difference = values_T[start:end].double() - oracle.values(micro_batch.input_ids[start:end])
                assert difference.abs().max() < 1e-4


CASES = {
    "clipped": ["critic.value_clip=0.5"],
    "mse": ["critic.loss=mse", "algorithm.reduction=sequence_mean"],
    "huber": [
        "critic.loss=huber",
        "critic.huber_delta=0.7",
        "critic.optimizer.weight_decay=0.1",
        "critic.optimizer.clip_grad_norm=0.05",
        "critic.optimizer.eps=1e-6",
    ],
}


@pytest.mark.parametrize(("case", "family"), [*((case, "llama") for case in CASES), ("mse", "qwen3_moe")])
def test_two_updates_match_the_float64_oracle(tmp_path, case, family):
    config = classifier_config(tmp_path, *CASES[case], "critic.optimizer.lr=1e-3", family=family, tied=family == "llama")
    oracle = CriticOracle(config.critic.path)
    settings = config.critic.optimizer
    groups = [
        {"params": [p for p in oracle.model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in oracle.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    with make_critic(config) as critic:
        for seed in (1, 2):
            batch, samples = critic_batch(config, critic.topology, seed)
            loss, grad_norm = oracle.update(optimizer, samples, seed, config)
            metrics = critic.train_step(batch)
            assert metrics["critic/loss"] == pytest.approx(loss, rel=1e-5)
            assert metrics["critic/grad_norm"] == pytest.approx(grad_norm, rel=2e-5)
            assert metrics["critic/lr"] == 1e-3
            weights = by_file_name(dict(oracle.model.named_parameters()), family)
            for name, value in critic.iter_weights(torch.float32):
                # Adam divides by the gradient's size: where a gradient is nearly zero its rounding error is seen in full.
                difference = (value.double() - weights[name].detach()).abs()
                assert difference.max() < 0.05 * settings.lr, f"{name} after update {seed}"
                assert difference.mean() < 1e-3 * settings.lr, f"{name} after update {seed}"


def test_statistics_are_those_of_all_tokens(tmp_path):
    config = classifier_config(tmp_path)
    oracle = CriticOracle(config.critic.path)
    with make_critic(config) as critic, torch.no_grad():
        batch, samples = critic_batch(config, critic.topology, 4)
        _, rows = critic_rows(samples, 4)
        values = torch.cat([oracle.values(s.token_ids)[:-1][s.loss_mask[1:]] for s in samples])
        returns = torch.cat([rows[s.sample_index][s.loss_mask] for s in samples]).double()
        with torch.enable_grad():
            metrics = critic.train_step(batch)
    assert metrics["critic/value_mean"] == pytest.approx(float(values.mean()), abs=1e-5)
    assert metrics["critic/return_mean"] == pytest.approx(float(returns.mean()), abs=1e-5)
    assert metrics["critic/error_rms"] == pytest.approx(float((values - returns).square().mean().sqrt()), abs=1e-5)
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["critic/explained_variance"] == pytest.approx(float(explained), abs=1e-5)


def test_a_critic_of_a_causal_model_begins_at_zero_and_learns(tmp_path):
    config = tiny_config(tmp_path, "critic.loss=mse", "critic.optimizer.lr=1e-2", family="qwen3", tied=False)
    with make_critic(config) as critic:
        batch, _ = critic_batch(config, critic.topology, 1)
        assert all((values == 0).all() for values in critic.compute_values(batch))
        losses = [critic.train_step(batch)["critic/loss"] for _ in range(20)]
        explained = critic.train_step(batch)["critic/explained_variance"]
    assert losses[-1] < 0.5 * losses[0]
    assert explained > 0.5


def test_an_exported_critic_is_read_by_transformers_and_by_the_next_run(tmp_path):
    config = classifier_config(tmp_path)
    saved = tmp_path / "saved"
    with make_critic(config) as critic:
        batch, samples = critic_batch(config, critic.topology, 1)
        critic.train_step(batch)
        critic.save_hf(str(saved))
        expected = {name: value.clone() for name, value in critic.iter_weights(torch.float32)}
        values = unpack(critic.compute_values(batch), batch, samples)
    settings = json.loads((saved / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    assert expected.keys() == load_file(saved / "model.safetensors").keys()
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.num_labels == 1
    with torch.no_grad():
        # What the class says of a sequence is the value after its last token: ask it of all but that.
        for row, sample in zip(values, samples, strict=True):
            assert float(model(sample.token_ids[None, :-1]).logits[0, 0]) == pytest.approx(float(row[-1]), abs=1e-4)
    again = tiny_config(tmp_path, f"critic.path={saved}")
    with make_critic(again) as critic:
        assert all(torch.equal(value, expected[name]) for name, value in critic.iter_weights(torch.float32))


def test_an_untouched_critic_exports_bit_for_bit_what_it_loaded(tmp_path):
    config = classifier_config(tmp_path, "precision=bfloat16", family="qwen2", tied=True)
    loaded = load_file(Path(config.critic.path) / "model.safetensors")
    with make_critic(config) as critic:
        exported = dict(critic.iter_weights(torch.bfloat16))
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name].bfloat16()) for name, value in exported.items())


def test_a_policy_and_a_critic_in_one_process_do_not_disturb_each_other(tmp_path):
    config = tiny_config(tmp_path, "critic.loss=mse")
    alone = {}
    with make_policy(config) as policy:
        batch, _ = critic_batch(config, policy.topology, 1)
        alone["policy"] = [policy.train_step(batch)["update/grad_norm"] for _ in range(2)]
    with make_critic(config) as critic:
        alone["critic"] = [critic.train_step(batch)["critic/grad_norm"] for _ in range(2)]
    with make_policy(config) as policy, make_critic(config, topology=policy.topology) as critic:
        together = [(policy.train_step(batch), critic.train_step(batch)) for _ in range(2)]
    assert [step["update/grad_norm"] for step, _ in together] == alone["policy"]
    assert [step["critic/grad_norm"] for _, step in together] == alone["critic"]


def test_a_critics_optimizer_waits_in_host_memory_and_updates_as_ever(tmp_path):
    config = tiny_config(tmp_path)
    offloaded = tiny_config(tmp_path, "critic.optimizer.offload=true")
    results = []
    for settings in (config, offloaded):
        with make_critic(settings) as critic:
            batch, _ = critic_batch(settings, critic.topology, 1)
            metrics = [critic.train_step(batch) for _ in range(2)]
            results.append((metrics, {name: value.clone() for name, value in critic.iter_weights(torch.float32)}))
            assert settings is config or critic._parked.is_parked
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def test_a_batch_without_returns_or_old_values_is_refused_before_anything_is_computed(tmp_path):
    config = tiny_config(tmp_path)
    with make_critic(config) as critic:
        batch, _ = critic_batch(config, critic.topology, 1)
        batch.micro_batches[-1].values = None
        with pytest.raises(DataError, match="one has no values"):
            critic.train_step(batch)
        batch.micro_batches[-1].returns = None
        with pytest.raises(DataError, match="one has no returns"):
            critic.train_step(batch)
        assert critic.num_updates == 0


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_weights_alone(tmp_path):
    config = tiny_config(tmp_path)
    with make_critic(config) as critic:
        before = {name: value.clone() for name, value in critic.iter_weights(torch.float32)}
        batch, _ = critic_batch(config, critic.topology, 1)
        batch.micro_batches[0].returns[batch.micro_batches[0].loss_mask] = torch.inf
        with pytest.raises(NumericsError, match=r"critic's update 0 .* not applied"):
            critic.train_step(batch)
        assert all(torch.equal(value, before[name]) for name, value in critic.iter_weights(torch.float32))


def test_a_head_of_several_labels_is_no_value_function(tmp_path):
    config = tiny_config(tmp_path)
    path = write_classifier(Path(config.model.path), tmp_path / "critic", labels=3)
    wrong = r"score\.weight is \(3, 64\), the model needs \(1, 64\)"
    with pytest.raises(ModelLoadError, match=wrong), make_critic(tiny_config(tmp_path, f"critic.path={path}")):
        pass
