"""A teacher beside the policy: its passes, and an update towards it, against float64 on Hugging Face models."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.oracle import token_logprobs
from helpers.policy import make_policy, tiny_config
from helpers.tiny import write_tiny_model
from skyrl_mega.config.model_files import inspect_model
from skyrl_mega.config.teacher_files import teacher_problems
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import ConfigError
from skyrl_mega.orchestration.teacher import check_teacher, fill_teacher_topk
from skyrl_mega.training.reference import ReferenceModel

TOPK = 4
DISTILL = ["algorithm.policy_loss=distill_topk", f"teacher.topk={TOPK}"]


def pack(samples):
    return balance_and_pack(
        samples, tokens_per_micro_batch=60, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=True
    )


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """Of another family and width, with the tiny tokenizer's vocabulary."""
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "model", "qwen3", tied=False, seed=7, hidden_size=96)


def in_float64(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def test_a_teachers_logprobs_and_likeliest_tokens_are_those_of_hugging_face(tmp_path, teacher_dir):
    config = tiny_config(tmp_path, "rollout.temperature=0.8")
    samples = random_samples(3, 2, seed=1)
    oracle = in_float64(teacher_dir)
    with make_policy(config) as policy, torch.no_grad():
        teacher = ReferenceModel(config, policy.topology, str(teacher_dir))
        batch = pack(samples)
        rows = unpack(teacher.compute_logprobs(batch), batch, samples)
        topk = teacher.compute_topk(batch, TOPK, vocab_size=policy.vocab_size)
        best = unpack([logprobs_TK[:, 0] for _, logprobs_TK in topk], batch, samples)
        ids = unpack([ids_TK[:, 1].float() for ids_TK, _ in topk], batch, samples)
        for sample, row, first, second in zip(samples, rows, best, ids, strict=True):
            mask = sample.loss_mask[1:]
            expected = token_logprobs(oracle, sample.token_ids, 0.8)[0]
            torch.testing.assert_close(row[1:].double(), expected * mask, atol=1e-4, rtol=0)
            likeliest = (oracle(sample.token_ids[None]).logits[0, :-1] / 0.8).log_softmax(-1).topk(2, dim=-1)
            torch.testing.assert_close(first[1:].double()[mask], likeliest.values[mask, 0], atol=1e-4, rtol=0)
            assert second[1:][mask].long().tolist() == likeliest.indices[mask, 1].tolist()
        for micro_batch, (ids_TK, logprobs_TK) in zip(batch.micro_batches, topk, strict=True):
            assert bool((ids_TK[~micro_batch.loss_mask] == -1).all())
            assert bool((logprobs_TK[~micro_batch.loss_mask] == 0).all())
        few = teacher.compute_topk(batch, TOPK, vocab_size=50)
        for micro_batch, (ids_TK, logprobs_TK) in zip(batch.micro_batches, few, strict=True):
            unknown_TK = (ids_TK < 0) & micro_batch.loss_mask[:, None]
            assert bool(unknown_TK.any())
            assert bool((ids_TK < 50).all())
            assert bool((logprobs_TK.isinf() == unknown_TK).all())


def oracle_loss(student, teacher, samples, *, beta, entropy_coef, kl_coef):
    """GKD over the teacher's top tokens and the rest, with an entropy bonus and a k3 distance to the teacher; token mean."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        mask = sample.loss_mask[1:]
        q = student(sample.token_ids[None]).logits[0, :-1].log_softmax(-1)[mask]
        with torch.no_grad():
            p = teacher(sample.token_ids[None]).logits[0, :-1].log_softmax(-1)[mask]
        ids = p.topk(TOPK, dim=-1).indices
        labels = sample.token_ids[1:][mask][:, None]
        outcomes = []
        for logprobs in (p, q):
            at = logprobs.gather(1, ids)
            others = torch.ones_like(logprobs).scatter(1, ids, 0.0)
            outcomes.append(torch.cat([at, (logprobs.exp() * others).sum(1, keepdim=True).log()], dim=1))
        p_k, q_k = outcomes
        m_k = torch.logaddexp(p_k + math.log(beta), q_k + math.log(1 - beta)) if 0 < beta < 1 else None
        if m_k is None:
            a, b = (p_k, q_k) if beta == 0.0 else (q_k, p_k)
            divergence = (a.exp() * (a - b)).sum(1)
        else:
            divergence = beta * (p_k.exp() * (p_k - m_k)).sum(1) + (1 - beta) * (q_k.exp() * (q_k - m_k)).sum(1)
        log_r = (p.gather(1, labels) - q.gather(1, labels))[:, 0]
        entropy = -(q.exp() * q).sum(1)
        total = total + (divergence + kl_coef * (log_r.exp() - 1 - log_r) - entropy_coef * entropy).sum()
    return total / sum(int(sample.loss_mask.sum()) for sample in samples)


@pytest.mark.parametrize(("tied", "beta", "entropy_coef", "kl_coef"), [(True, 1.0, 0.0, 0.0), (False, 0.3, 0.02, 0.1)])
def test_an_update_towards_the_teacher_is_that_of_float64(tmp_path, teacher_dir, tied, beta, entropy_coef, kl_coef):
    """With an entropy bonus and a KL term two operators add to the head's gradient in its float32 buffer."""
    config = tiny_config(
        tmp_path,
        *DISTILL,
        f"teacher.path={teacher_dir}",
        f"algorithm.loss_options.beta={beta}",
        f"algorithm.entropy_coef={entropy_coef}",
        f"algorithm.kl.coef={kl_coef}",
        "optimizer.eps=1e-6",
        tied=tied,
    )
    samples = random_samples(4, 3, seed=2)
    student, teacher_model = in_float64(config.model.path), in_float64(teacher_dir)
    loss = oracle_loss(student, teacher_model, samples, beta=beta, entropy_coef=entropy_coef, kl_coef=kl_coef)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.clip_grad_norm)
    settings = config.optimizer
    torch.optim.AdamW(
        student.parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0
    ).step()
    expected = dict(student.named_parameters())
    with make_policy(config) as policy:
        teacher = ReferenceModel(config, policy.topology, config.teacher.path)
        batch = pack(samples)
        assert len(batch.micro_batches) > 1
        fill_teacher_topk(teacher, [batch], config, vocab_size=policy.vocab_size)
        for micro_batch, logprobs in zip(batch.micro_batches, teacher.compute_logprobs(batch), strict=True):
            micro_batch.ref_logprobs = logprobs
        metrics = policy.train_step(batch)
        assert metrics["loss/total"] == pytest.approx(float(loss.detach()), abs=2e-6)
        assert metrics["update/grad_norm"] == pytest.approx(float(grad_norm), rel=2e-5)
        assert 0.0 < metrics["policy/teacher_mass"] < 1.0
        for name, value in policy.iter_weights(torch.float32):
            difference = (value.double() - expected[name].detach()).abs()
            assert difference.max() < 0.05 * settings.lr, name
            assert difference.mean() < 1e-3 * settings.lr, name


def test_an_update_without_the_teachers_tokens_says_what_is_missing(tmp_path):
    with make_policy(tiny_config(tmp_path, *DISTILL)) as policy, pytest.raises(ConfigError, match=r"teacher\.topk"):
        policy.train_step(pack(random_samples(2, 2)))


def test_a_distillation_without_a_teacher_and_a_teacher_without_a_pupil_are_refused(tmp_path):
    for overrides, words in (
        (["algorithm.advantage=distill"], "`teacher.path` is empty"),
        (["algorithm.policy_loss=distill_topk", "teacher.topk=4"], "`teacher.path` is empty"),
        (["algorithm.policy_loss=distill_topk", "teacher.path=somewhere"], "`teacher.topk` is 0"),
        (["teacher.path=somewhere"], "nothing asks a teacher"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_teacher(tiny_config(tmp_path, *overrides))
    check_teacher(tiny_config(tmp_path, "algorithm.advantage=distill", "teacher.path=somewhere"))


def test_only_a_model_of_the_same_tokens_can_teach(tmp_path, teacher_dir):
    path = write_tiny_model(tmp_path / "policy")
    policy = inspect_model(path)[0]
    assert teacher_problems(teacher_dir, policy, max_model_len=128) == []
    [problem] = teacher_problems(teacher_dir, policy, max_model_len=1024)
    assert "knows 512" in problem
    [problem] = teacher_problems(tmp_path / "nowhere", policy, max_model_len=128)
    assert "`teacher.path` must be the directory" in problem

    # More rows than the policy are padding where the tokenizers are one; fewer can't judge every token.
    assert teacher_problems(path, dataclasses.replace(policy, vocab_size=270), max_model_len=128) == []
    [problem] = teacher_problems(path, dataclasses.replace(policy, vocab_size=300), max_model_len=128)
    assert "as many tokens" in problem
    # Without a tokenizer to compare, only equal sizes will do.
    bare = tmp_path / "bare"
    write_tiny_model(bare)
    (bare / "tokenizer.json").rename(bare / "tokenizer.model")
    assert teacher_problems(bare, policy, max_model_len=128) == []
    [problem] = teacher_problems(bare, dataclasses.replace(policy, vocab_size=270), max_model_len=128)
    assert "equally many tokens" in problem

    other = write_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    [problem] = teacher_problems(other, policy, max_model_len=128)
    assert "one vocabulary" in problem
    assert f"token {min(vocabulary['a'], vocabulary['b'])} is 'b'" in problem
