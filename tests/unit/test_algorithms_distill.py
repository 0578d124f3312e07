"""On-policy distillation: the advantage and the top-k loss against the papers' formulas, sample by sample in Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.algorithms.advantages import compute_advantages
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.policy_losses.distill import distill_topk
from skyrl_mega.config.schema import AlgorithmConfig, KLConfig
from skyrl_mega.errors import ConfigError, DataError
from skyrl_mega.types import TrainSample


def make_samples(seed, *, groups=2, per_group=2):
    """Samples with prompts, answers and, inside those, tokens that a tool wrote."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(groups * per_group):
        length = int(rng.integers(3, 9))
        mask = rng.random(length) < 0.7
        mask[0], mask[-1] = False, True

        def logprobs(mask=mask, length=length):
            return torch.tensor(np.where(mask, -rng.exponential(1.0, length), 0.0), dtype=torch.float32)

        samples.append(
            TrainSample(
                sample_index=index,
                group_index=index // per_group,
                group_id=f"g{index // per_group}",
                token_ids=torch.arange(length),
                loss_mask=torch.tensor(mask),
                rollout_logprobs=logprobs(),
                reward=float(rng.normal()),
                old_logprobs=logprobs(),
                teacher_logprobs=logprobs(),
            )
        )
    return samples


def oracle_advantages(samples, coef=1.0, discount=0.0, reward_weight=0.0):
    """Double loop over the trained tokens of each sample."""
    rewards = {g: [s.reward for s in samples if s.group_index == g] for g in {s.group_index for s in samples}}
    rows = []
    for sample in samples:
        trained = [t for t in range(sample.num_tokens) if sample.loss_mask[t]]
        group = rewards[sample.group_index]
        relative = (sample.reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-6) if len(set(group)) > 1 else 0.0
        row = [0.0] * sample.num_tokens
        for place, t in enumerate(trained):
            for steps, u in enumerate(trained[place:]):
                row[t] += coef * discount**steps * (float(sample.teacher_logprobs[u]) - float(sample.old_logprobs[u]))
            row[t] += reward_weight * relative
        rows.append(row)
    return rows


@pytest.mark.parametrize("options", [{}, {"discount": 1.0}, {"coef": 0.3, "discount": 0.5, "reward_weight": 2.0}])
def test_the_advantage_is_the_discounted_gain_over_the_student_plus_the_rewards_share(options):
    samples = make_samples(3)
    compute_advantages(samples, AlgorithmConfig(advantage="distill", advantage_options=options))
    expected = oracle_advantages(samples, **options)
    for sample, row in zip(samples, expected, strict=True):
        np.testing.assert_allclose(sample.advantages.numpy(), row, atol=1e-6)


def test_by_hand_a_token_that_the_teacher_likes_twice_as_much_is_worth_log_two():
    sample = make_samples(0, groups=1, per_group=1)[0]
    sample.old_logprobs = torch.where(sample.loss_mask, math.log(0.25), 0.0).float()
    sample.teacher_logprobs = torch.where(sample.loss_mask, math.log(0.5), 0.0).float()
    compute_advantages([sample], AlgorithmConfig(advantage="distill"))
    torch.testing.assert_close(sample.advantages, torch.where(sample.loss_mask, math.log(2.0), 0.0).float())


def test_without_a_reward_weight_rewards_change_nothing():
    ours, others = make_samples(5), make_samples(5)
    for sample in others:
        sample.reward *= -3.0
    for samples in (ours, others):
        compute_advantages(samples, AlgorithmConfig(advantage="distill"))
    assert all(torch.equal(a.advantages, b.advantages) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("options", [{"discount": 1.5}, {"discount": -0.1}, {"coef": float("nan")}, {"reward_weight": math.inf}])
def test_options_of_the_advantage_out_of_range_are_errors_that_name_them(options):
    [name] = options
    with pytest.raises(ConfigError, match=f"advantage_options.{name}"):
        compute_advantages(make_samples(1), AlgorithmConfig(advantage="distill", advantage_options=options))


def test_samples_that_no_teacher_saw_are_an_error():
    samples = make_samples(1)
    samples[1].teacher_logprobs = None
    with pytest.raises(DataError, match="has no teacher_logprobs"):
        compute_advantages(samples, AlgorithmConfig(advantage="distill"))


# ---- the loss over the teacher's top-k --------------------------------------------------------------------------------------


def make_distributions(seed, *, tokens=6, vocab=7, k=3, scale=2.0):
    """(student logits with gradient, teacher logprobs at its top k, their ids, loss_mask), float64."""
    generator = torch.Generator().manual_seed(seed)

    def logits():
        return scale * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)

    student = logits().requires_grad_()
    teacher = logits().log_softmax(-1).topk(k, dim=-1)
    mask = torch.rand(tokens, generator=generator) < 0.7
    mask[0] = True
    return student, teacher.values, teacher.indices, mask


def inputs_of(student, teacher, ids, mask):
    logprobs = student.log_softmax(-1).gather(1, ids)
    zeros = torch.zeros(len(mask), dtype=torch.float64)
    # Rows that do not count hold zeros, as the kernels give them.
    at = [torch.where(mask[:, None], values, 0.0) for values in (logprobs, teacher)]
    return LossInputs(zeros, zeros, zeros, zeros, mask, topk_logprobs=at[0], teacher_topk_logprobs=at[1])


def oracle_divergence(student_logprobs, teacher_logprobs, beta):
    """GKD's formula over k + 1 outcomes of one position, in Python floats."""
    q, p = ([math.exp(x) for x in row] for row in (student_logprobs, teacher_logprobs))
    q, p = [*q, 1.0 - sum(q)], [*p, 1.0 - sum(p)]
    if beta == 0.0:
        return sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    if beta == 1.0:
        return sum(qi * math.log(qi / pi) for pi, qi in zip(p, q, strict=True))
    m = [beta * pi + (1 - beta) * qi for pi, qi in zip(p, q, strict=True)]
    first = sum(pi * math.log(pi / mi) for pi, mi in zip(p, m, strict=True))
    second = sum(qi * math.log(qi / mi) for qi, mi in zip(q, m, strict=True))
    return beta * first + (1 - beta) * second


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_loss_is_the_divergence_over_the_top_k_and_the_rest(beta):
    student, teacher, ids, mask = make_distributions(1)
    loss, stats = distill_topk(inputs_of(student, teacher, ids, mask), beta=beta, coef=0.5)
    at = student.detach().log_softmax(-1).gather(1, ids)
    expected = [0.5 * oracle_divergence(at[t].tolist(), teacher[t].tolist(), beta) if mask[t] else 0.0 for t in range(len(mask))]
    np.testing.assert_allclose(loss.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(stats["teacher_divergence"].numpy(), np.array(expected) / 0.5, atol=1e-12)
    np.testing.assert_allclose(stats["teacher_mass"].numpy(), np.where(mask, teacher.exp().sum(1), 0.0), atol=1e-12)
    np.testing.assert_allclose(stats["student_mass"].numpy(), np.where(mask, at.exp().sum(1), 0.0), atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_its_gradient_is_that_of_finite_differences(beta):
    student, teacher, ids, mask = make_distributions(2, tokens=3, vocab=5, k=2)

    def loss(logits):
        return distill_topk(inputs_of(logits, teacher, ids, mask), beta=beta)[0]

    assert torch.autograd.gradcheck(loss, (student,), atol=1e-8)


def test_where_k_is_the_vocabulary_the_reverse_kl_is_the_whole_one():
    student, teacher, ids, mask = make_distributions(4, vocab=5, k=5)
    loss, _ = distill_topk(inputs_of(student, teacher, ids, mask))
    q = student.detach().log_softmax(-1).gather(1, ids)
    whole = torch.where(mask, (q.exp() * (q - teacher)).sum(-1), 0.0)
    torch.testing.assert_close(loss.detach(), whole, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 1.0]), st.integers(1, 7))
def test_the_loss_is_never_negative_and_at_most_that_of_the_whole_vocabulary(seed, beta, k):
    student, teacher, ids, mask = make_distributions(seed, k=k)
    loss, _ = distill_topk(inputs_of(student, teacher, ids, mask), beta=beta)
    generator = torch.Generator().manual_seed(seed)
    torch.randn(6, 7, generator=generator, dtype=torch.float64)
    full = (2.0 * torch.randn(6, 7, generator=generator, dtype=torch.float64)).log_softmax(-1)
    everything = torch.arange(7).expand(6, 7)
    bound, _ = distill_topk(inputs_of(student, full, everything, mask), beta=beta)
    assert bool((loss >= -1e-12).all())
    assert bool((loss <= bound + 1e-9).all())


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    student, _, ids, mask = make_distributions(6)
    same = student.detach().log_softmax(-1).gather(1, ids)
    loss, _ = distill_topk(inputs_of(student, same, ids, mask))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.zeros_like(loss), atol=1e-12, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)


def test_tokens_that_are_not_there_belong_to_the_rest():
    student, teacher, ids, mask = make_distributions(7, k=3)
    fewer = inputs_of(student, teacher[:, :2], ids[:, :2], mask)
    padded_teacher = torch.cat([teacher[:, :2], torch.full((6, 1), float("-inf"), dtype=torch.float64)], dim=1)
    padded = inputs_of(student, padded_teacher, ids, mask)
    padded.topk_logprobs[:, 2] = float("-inf")
    torch.testing.assert_close(distill_topk(padded)[0], distill_topk(fewer)[0])
    distill_topk(padded)[0].sum().backward()
    assert bool(student.grad.isfinite().all())


def test_certain_teachers_and_students_give_finite_losses_and_gradients():
    for scale in (50.0, 500.0):
        student, teacher, ids, mask = make_distributions(8, scale=scale)
        leaves = student.detach().float().requires_grad_()
        inputs = inputs_of(leaves, teacher.float(), ids, mask)
        for beta in (0.0, 0.5, 1.0):
            loss, _ = distill_topk(inputs, beta=beta)
            [gradient] = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
            assert bool(loss.isfinite().all())
            assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("options", [{"beta": 1.5}, {"beta": -0.1}, {"coef": 0.0}])
def test_options_of_the_loss_out_of_range_are_errors_that_name_them(options):
    [name] = options
    with pytest.raises(ConfigError, match=f"loss_options.{name}"):
        distill_topk(inputs_of(*make_distributions(1)), **options)


def test_a_batch_without_the_teachers_tokens_is_an_error():
    inputs = inputs_of(*make_distributions(1))
    with pytest.raises(ConfigError, match=r"teacher\.topk"):
        distill_topk(LossInputs(*(inputs.logprobs,) * 4, inputs.loss_mask))


def test_the_loss_is_computed_for_every_token_whatever_its_advantage():
    objective = Objective(AlgorithmConfig(policy_loss="distill_topk", kl=KLConfig()))
    assert objective.needs == {"teacher_topk"}
    assert not objective.token_separable
