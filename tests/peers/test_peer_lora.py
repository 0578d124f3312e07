"""Our adapters beside PEFT's: its files are read, ours are read by it; logits and the gradients of A and B are the same.

Skipped where peft is not installed (extra `test`).
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from helpers.hf_oracle import load_oracle, make_micro_batch, make_sequences, oracle_logits, probe_loss
from helpers.lora import factors, logits_of, randomise
from helpers.offline import offline_config, random_examples
from helpers.policy import make_policy, tiny_config
from helpers.tiny import write_tiny_model
from helpers.updates import variant
from skyrl_mega.config.lora_files import WEIGHTS_FILE
from skyrl_mega.config.offline import training_config
from skyrl_mega.orchestration.offline_tasks import make_task
from skyrl_mega.parallel.topology import init_topology

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", ["lora.use_rslora=true"]),
        ("qwen2", ["lora.targets=[q_proj,v_proj,o_proj,down_proj]"]),
        ("deepseek_v3", ["lora.targets=[q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj]"]),
    ],
)
def test_logits_and_gradients_equal_pefts(tmp_path, family, settings):
    settings = ["lora.rank=4", "lora.alpha=6", *settings]
    config = tiny_config(tmp_path, *settings, family=family, tied=True)
    sequences = make_sequences([7, 33, 1, 20], 272)
    micro_batch = make_micro_batch(sequences)
    with make_policy(config) as policy:
        fresh = factors(policy)
        randomise(policy)
        policy.save_adapter(str(tmp_path / "ours"))
        logits = logits_of(policy, micro_batch)
        for ddp in policy.ddps:
            ddp.zero_grad_buffer()
        probe_loss(logits, micro_batch).backward()
        gradients = factors(policy, gradients=True)
    theirs = peft.PeftModel.from_pretrained(load_oracle(config.model.path), tmp_path / "ours", is_trainable=True)
    expected = oracle_logits(theirs, sequences)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    probe_loss(expected, micro_batch).backward()
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            got = gradients[name.replace(".default.", ".")]
            assert (got - parameter.grad).abs().max() < 2e-5 * max(1.0, float(parameter.grad.abs().max())), name
            compared += 1
            if ".lora_A." in name:  # the bound of PEFT's own first values
                first, bound = fresh[name.replace(".default.", ".")], parameter.shape[1] ** -0.5
                assert 0.9 * bound < first.abs().max() <= bound
    assert compared == len(gradients)
    theirs.save_pretrained(tmp_path / "theirs")
    with make_policy(variant(config, *settings, f"lora.path={tmp_path / 'theirs'}")) as policy:
        assert torch.equal(logits_of(policy, micro_batch), logits)


def test_a_reward_models_adapter_and_head_score_in_peft_as_they_do_here(tmp_path):
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    config = offline_config("rm", model, "lora.rank=4", "lora.alpha=6", "lora.targets=[q_proj,down_proj]", "optimizer.lr=1e-2")
    examples = random_examples(config, 4, seed=3)
    derived = training_config(config)
    topology = init_topology(derived.parallel, torch.device("cpu"), seed=0)
    try:
        task = make_task(config, derived, topology)
        for seed in (1, 2):
            task.update(random_examples(config, 6, seed=seed))
        task.trained.save_adapter(str(tmp_path / "ours"))
        loss = task.evaluate(examples)["loss"]
    finally:
        topology.destroy()
    base = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float64, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").double().eval()
    with torch.no_grad():
        scores = [[theirs(one.token_ids[:-1].long()[None]).logits[0, 0] for one in e.sequences] for e in examples]
    expected = -torch.stack([logsigmoid(better - worse) for better, worse in scores]).mean()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert abs(loss - float(torch.tensor(2.0).log())) > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / WEIGHTS_FILE).keys() == load_file(tmp_path / "ours" / WEIGHTS_FILE).keys()
