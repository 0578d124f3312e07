"""Every stage of the off-policy correction against its formula, sequence by sequence in Python floats; options out of range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.algorithms.loss import Objective, mean_stats
from skyrl_mega.algorithms.off_policy import STAGES, bind_stages, off_policy_correction
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.algorithm_rules import ALGORITHM_COMBINATIONS
from skyrl_mega.config.rule import Facts
from skyrl_mega.config.schema import AlgorithmConfig, Config, OffPolicyConfig, TrainerConfig
from skyrl_mega.errors import ConfigError


class Case:
    """Sequences of log-ratios [(log w, is trained, staleness) ...], and their pack."""

    def __init__(self, lengths, seed=0, *, noise=0.4):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        total = sum(lengths)
        scale = torch.repeat_interleave(torch.rand(len(lengths), generator=generator, dtype=torch.float64), torch.tensor(lengths))
        self.log_w = scale * noise * torch.randn(total, generator=generator, dtype=torch.float64)
        self.mask = torch.rand(total, generator=generator) < 0.8
        self.old = -torch.rand(total, generator=generator, dtype=torch.float64) * 3 - 0.1
        self.logprobs = self.old + 0.3 * torch.randn(total, generator=generator, dtype=torch.float64)
        self.advantages = torch.randn(total, generator=generator, dtype=torch.float64)
        self.staleness = torch.randint(0, 5, (total,), generator=generator).double() * self.mask
        self.loss_weights = torch.rand(total, generator=generator, dtype=torch.float64) * self.mask

    def sequences(self):
        """Lists of (index, log w, staleness) of each sequence's trained tokens."""
        rows, start = [], 0
        for length in self.lengths:
            rows.append(
                [(i, float(self.log_w[i]), float(self.staleness[i])) for i in range(start, start + length) if self.mask[i]]
            )
            start += length
        return rows

    def pack(self):
        return Sequences.packed(torch.tensor([0, *self.lengths]).cumsum(0))

    def correct(self, *stages, sequences=None):
        everything = {"sequences": sequences or self.pack(), "staleness_T": self.staleness}
        return off_policy_correction(self.old, self.old - self.log_w, self.mask, bind_stages(stages), **everything)


def ratio_at(level, row):
    """w of each token of a sequence, as the level judges it."""
    logs = [log_w for _, log_w, _ in row]
    if level == "token":
        return [math.exp(x) for x in logs]
    shared = math.fsum(logs) / (len(logs) if level == "geometric" else 1)
    return [math.exp(min(max(shared, -20.0), 20.0))] * len(logs)


def k3(log_w):
    return math.exp(log_w) - 1 - log_w


def between(low, high, ratios):
    return [1.0 if low <= w <= high else 0.0 for w in ratios]


#: (stage, the factor of each trained token of one sequence).
FORMULAS = [
    ({"name": "truncated_is", "cap": 1.2, "level": "token"}, lambda row: [min(w, 1.2) for w in ratio_at("token", row)]),
    ({"name": "truncated_is", "cap": 1.2, "level": "sequence"}, lambda row: [min(w, 1.2) for w in ratio_at("sequence", row)]),
    (
        {"name": "truncated_is", "cap": 1.001, "level": "geometric"},
        lambda row: [min(w, 1.001) for w in ratio_at("geometric", row)],
    ),
    ({"name": "masked_is", "cap": 1.2}, lambda row: [w if w <= 1.2 else 0.0 for w in ratio_at("token", row)]),
    ({"name": "masked_is", "cap": 1.2, "level": "sequence"}, lambda row: [w * (w <= 1.2) for w in ratio_at("sequence", row)]),
    ({"name": "icepop", "low": 0.8, "cap": 1.2}, lambda row: [w * (0.8 <= w <= 1.2) for w in ratio_at("token", row)]),
    (
        {"name": "icepop", "low": 0.7, "cap": 1.5, "level": "sequence"},
        lambda row: [w * (0.7 <= w <= 1.5) for w in ratio_at("sequence", row)],
    ),
    (
        {"name": "icepop", "low": 0.97, "cap": 1.02, "level": "geometric"},
        lambda row: [w * (0.97 <= w <= 1.02) for w in ratio_at("geometric", row)],
    ),
    ({"name": "token_mask", "low": 0.9, "high": 1.2}, lambda row: between(0.9, 1.2, ratio_at("token", row))),
    ({"name": "sequence_mask"}, lambda row: between(0.5, 2.0, ratio_at("sequence", row))),
    ({"name": "geometric_mask"}, lambda row: between(0.99, 1.01, ratio_at("geometric", row))),
    (
        {"name": "outlier_mask", "low": 0.6, "high": 1.6},
        lambda row: [float(min(ratio_at("token", row)) >= 0.6 and max(ratio_at("token", row)) <= 1.6)] * len(row),
    ),
    ({"name": "outlier_mask", "low": 0.6, "high": 1.6, "level": "token"}, lambda row: between(0.6, 1.6, ratio_at("token", row))),
    ({"name": "divergence_mask", "level": "token"}, lambda row: [float(k3(x) <= 0.01) for _, x, _ in row]),
    ({"name": "divergence_mask"}, lambda row: [float(math.fsum(k3(x) for _, x, _ in row) / len(row) <= 0.01)] * len(row)),
    (
        {"name": "divergence_mask", "level": "sum", "limit": 0.1},
        lambda row: [float(math.fsum(k3(x) for _, x, _ in row) <= 0.1)] * len(row),
    ),
    (
        {"name": "divergence_mask", "level": "max", "estimator": "k2", "limit": 0.05},
        lambda row: [float(max(x * x / 2 for _, x, _ in row) <= 0.05)] * len(row),
    ),
    ({"name": "staleness_decay"}, lambda row: [(1 + age) ** -0.5 for _, _, age in row]),
    (
        {"name": "staleness_decay", "power": 1.5, "free": 2.0, "level": "sequence"},
        lambda row: [(1 + max(0.0, sum(age for _, _, age in row) / len(row) - 2)) ** -1.5] * len(row),
    ),
]


def name_of(stage):
    return "-".join(str(value) for value in stage.values())


def test_every_stage_has_a_formula_here():
    assert {stage["name"] for stage, _ in FORMULAS} == set(STAGES)


@pytest.mark.parametrize(("stage", "formula"), FORMULAS, ids=[name_of(stage) for stage, _ in FORMULAS])
def test_weights_and_gradient_are_the_formulas(stage, formula):
    # Lengths of one and of hundreds; a sequence whose tokens are all masked would have no say.
    case = Case([1, 2, 5, 9, 30, 60, 200, 7, 7, 7, 40, 15])
    expected = torch.ones(sum(case.lengths), dtype=torch.float64)
    for row in case.sequences():
        if row:
            for (index, _, _), factor in zip(row, formula(row), strict=True):
                expected[index] = factor
    done = case.correct(stage)
    torch.testing.assert_close(done.weights_T, expected, rtol=1e-12, atol=0)
    changed = done.token_stats[f"off_policy/{stage['name']}_fraction"]
    ratios = torch.ones_like(expected)
    for row in case.sequences():
        for (index, _, _), ratio in zip(row, ratio_at(stage.get("level", "token"), row) if row else [], strict=True):
            ratios[index] = ratio
    plain = ratios if stage["name"] in ("truncated_is", "masked_is", "icepop") else torch.ones_like(expected)
    assert torch.equal(changed.bool(), ((expected - plain).abs() > 1e-9) & case.mask)
    assert 0.02 < float(changed[case.mask].mean()) < 0.98, "the case must have tokens on both sides"

    def gradient(config):
        leaf = case.logprobs.clone().requires_grad_()
        rollout = case.old - case.log_w
        inputs = LossInputs(leaf, case.old, rollout, case.advantages, case.mask, sequences=case.pack(), staleness=case.staleness)
        Objective(config)(inputs, case.loss_weights)[0].backward()
        return leaf.grad

    corrected = gradient(AlgorithmConfig(off_policy=OffPolicyConfig((stage,))))
    torch.testing.assert_close(corrected, gradient(AlgorithmConfig()) * expected, rtol=1e-12, atol=1e-15)


def test_by_hand():
    # Two sequences: ratios (2, 1/4) with product 1/2 and geometric mean sqrt(1/2); (1, 3, 3) with product 9.
    old = torch.zeros(6, dtype=torch.float64)
    ratios = torch.tensor([2.0, 0.25, 77.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, True])
    sequences = Sequences.packed(torch.tensor([0, 3, 6]))

    def weights(*stages):
        return off_policy_correction(old, -ratios.log(), mask, bind_stages(stages), sequences).weights_T.tolist()

    assert weights({"name": "truncated_is"}) == pytest.approx([2, 0.25, 1, 1, 2, 2])
    assert weights({"name": "truncated_is", "level": "sequence"}) == pytest.approx([0.5, 0.5, 1, 2, 2, 2])
    assert weights({"name": "masked_is", "level": "sequence"}) == pytest.approx([0.5, 0.5, 1, 0, 0, 0])
    assert weights({"name": "truncated_is", "level": "geometric"}) == pytest.approx([0.5**0.5] * 2 + [1] + [2.0] * 3)
    assert weights({"name": "sequence_mask", "low": 0.4}) == [1, 1, 1, 0, 0, 0]
    assert weights({"name": "geometric_mask", "low": 0.5, "high": 2.0}) == [1, 1, 1, 0, 0, 0]
    assert weights({"name": "outlier_mask", "low": 0.3}) == [0, 0, 1, 1, 1, 1], "masked tokens veto nothing"
    both = weights({"name": "truncated_is"}, {"name": "outlier_mask", "low": 0.3})
    assert both == pytest.approx([0, 0, 1, 1, 2, 2]), "factors multiply"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.lists(st.sampled_from(range(len(FORMULAS))), min_size=1, max_size=3, unique_by=lambda i: FORMULAS[i][0]["name"]),
    st.data(),
)
def test_any_split_of_the_sequences_into_micro_batches_gives_the_same_weights_and_statistics(lengths, seed, chosen, data):
    stages = [FORMULAS[i][0] for i in chosen]
    if sum(STAGES.find(stage["name"]).traits["weighs"] for stage in stages) > 1:
        return
    case = Case(lengths, seed)
    config = AlgorithmConfig(off_policy=OffPolicyConfig(tuple(stages)))

    def run(first, last):
        start, end = sum(lengths[:first]), sum(lengths[:last])
        take = slice(start, end)
        inputs = LossInputs(
            case.logprobs[take],
            case.old[take],
            (case.old - case.log_w)[take],
            case.advantages[take],
            case.mask[take],
            sequences=Sequences.packed(torch.tensor([0, *lengths[first:last]]).cumsum(0)),
            staleness=case.staleness[take],
        )
        loss, stats = Objective(config)(inputs, case.loss_weights[take])
        return {name: float(value) for name, value in stats.sums.items()} | {"loss": float(loss)}

    cut = data.draw(st.integers(0, len(lengths)))
    whole, parts = run(0, len(lengths)), (run(0, cut), run(cut, len(lengths)))
    assert {name: parts[0][name] + parts[1][name] for name in whole} == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_statistics_of_sequences_are_averages_over_the_sequences_with_trained_tokens():
    case = Case([1, 2, 5, 9, 30, 60, 7], noise=0.6)
    case.mask[1:3] = False  # one sequence has no trained token
    case.loss_weights = torch.rand(len(case.mask), dtype=torch.float64) * case.mask
    stages = ({"name": "truncated_is", "cap": 1.5}, {"name": "sequence_mask"})
    inputs = LossInputs(
        case.logprobs,
        case.old,
        case.old - case.log_w,
        case.advantages,
        case.mask,
        sequences=case.pack(),
        staleness=case.staleness,
    )
    sums = Objective(AlgorithmConfig(off_policy=OffPolicyConfig(stages)))(inputs, case.loss_weights)[1].sums
    metrics = mean_stats({name: float(value) for name, value in sums.items()})
    rows = [row for row in case.sequences() if row]
    products = [ratio_at("sequence", row)[0] for row in rows]
    kept = [0.5 <= product <= 2.0 for product in products]
    bounded = [
        sum(min(w, 1.5) for w in ratio_at("token", row)) / len(row) * is_kept for row, is_kept in zip(rows, kept, strict=True)
    ]

    def effective(values):
        return sum(values) ** 2 / len(values) / sum(value**2 for value in values)

    assert 0 < sum(kept) < len(kept)
    assert {name: metrics[name] for name in metrics if name.startswith(("off_policy/sequence/", "weight/seq"))} == pytest.approx(
        {
            "weight/sequences": len(rows),
            "off_policy/sequence/weight": sum(products) / len(rows),
            "off_policy/sequence/effective_sample_share": effective(products),
            "off_policy/sequence/bounded_weight": sum(bounded) / len(rows),
            "off_policy/sequence/bounded_effective_sample_share": effective(bounded),
            "off_policy/sequence/masked_fraction": 1 - sum(kept) / len(kept),
        },
        rel=1e-12,
    )


def test_the_product_of_ratios_is_unbiased_and_tokens_alone_are_not():
    # Two tokens out of three, the second's distribution depends on the first: expectations are sums over all nine sequences.
    generator = torch.Generator().manual_seed(5)
    policy, engine = (torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    reward = torch.randn(9, generator=generator, dtype=torch.float64)

    def logprobs(table):
        return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a in range(3) for b in range(3)])

    def gradient(level):
        leaf = policy.clone().requires_grad_()
        current, sampled = logprobs(leaf), logprobs(engine)
        probability = sampled.sum(1).exp()
        inputs = LossInputs(
            current.flatten(),
            current.detach().flatten(),
            sampled.flatten(),
            reward.repeat_interleave(2),
            torch.ones(18, dtype=torch.bool),
            sequences=Sequences.packed(torch.arange(0, 19, 2)),
        )
        config = AlgorithmConfig(off_policy=OffPolicyConfig(({"name": "truncated_is", "cap": 1e6, "level": level},)))
        Objective(config)(inputs, probability.repeat_interleave(2))[0].backward()
        return leaf.grad

    leaf = policy.clone().requires_grad_()
    (-(logprobs(leaf).sum(1).exp() * reward).sum()).backward()
    torch.testing.assert_close(gradient("sequence"), leaf.grad, rtol=1e-12, atol=1e-14)
    assert (gradient("token") - leaf.grad).abs().max() > 1e-3
    assert (gradient("geometric") - leaf.grad).abs().max() > 1e-3


def test_context_ranks_weigh_a_sequence_that_they_share_as_one_rank_does():
    # What one rank's all-reduce would bring is the sum of both ranks' parts: computed here before either is asked.
    case = Case([8, 3, 12, 1], noise=0.8)
    stages = ({"name": "truncated_is", "level": "sequence"}, {"name": "geometric_mask", "low": 0.9, "high": 1.1})
    whole = case.correct(*stages)
    index = torch.repeat_interleave(torch.tensor(case.lengths))
    mine = torch.arange(len(index)) % 3 == 0

    def exchange(recorded, replies):
        def all_reduce(values_S):
            recorded.append(values_S)
            return replies[len(recorded) - 1] if replies is not None else values_S

        return all_reduce

    def run(tokens, replies=None):
        recorded = []
        sequences = Sequences(index[tokens], len(case.lengths), exchange(recorded, replies))
        done = off_policy_correction(
            case.old[tokens], (case.old - case.log_w)[tokens], case.mask[tokens], bind_stages(stages), sequences
        )
        return done, recorded

    # The last exchange looks at weights, which are right only once the earlier ones are: so once more with their sums.
    replies = [a + b for a, b in zip(run(mine)[1], run(~mine)[1], strict=True)]
    replies = [a + b for a, b in zip(run(mine, replies)[1], run(~mine, replies)[1], strict=True)]
    parts = [(tokens, run(tokens, replies)[0]) for tokens in (mine, ~mine)]
    for tokens, part in parts:
        torch.testing.assert_close(part.weights_T, whole.weights_T[tokens], rtol=1e-12, atol=0)
    for name, value in whole.sequence_sums.items():
        assert float(sum(part.sequence_sums[name] for _, part in parts)) == pytest.approx(float(value), rel=1e-12), name


def test_a_bound_is_met_in_whatever_order_a_sequence_is_added_up():
    # In float32 the sum of these 4,000 log-ratios depends on their order by more than 1e-6.
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(4000, generator=generator) * 3
    inputs = [torch.zeros(4000), -log_w, torch.ones(4000, dtype=torch.bool)]
    bounds = {"low": 1e-9, "high": float(log_w.double().mean().exp()) * (1 + 1e-12)}
    stage = bind_stages([{"name": "geometric_mask", **bounds}])
    for seed in range(5):
        order = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))
        done = off_policy_correction(*(x[order] for x in inputs), stage, Sequences.packed(torch.tensor([0, 4000])))
        assert done.weights_T.min() == 1


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "truncated_is", "cap": 0.0}, r"`cap` of the off-policy stage truncated_is must be above 0; got 0.0"),
        ({"name": "truncated_is", "level": "sentence"}, r"`level` .* token, sequence or geometric; got 'sentence'"),
        ({"name": "icepop", "low": 6.0}, r"`low` of the off-policy stage icepop must lie in \[0, `cap` = 5.0\); got 6.0"),
        ({"name": "geometric_mask", "low": 1.02}, r"`low` of the off-policy stage geometric_mask must lie in"),
        ({"name": "outlier_mask", "level": "geometric"}, "must be token or sequence; got 'geometric'"),
        ({"name": "divergence_mask", "estimator": "k1"}, "must be k2 or k3; got 'k1'"),
        ({"name": "divergence_mask", "level": "geometric"}, "must be token, sum, mean or max; got 'geometric'"),
        ({"name": "divergence_mask", "limit": -1.0}, "`limit` of the off-policy stage divergence_mask must be above 0"),
        ({"name": "staleness_decay", "power": -1.0}, r"`power` \(-1.0\) .* must be at least 0"),
        ({"name": "staleness_decay", "level": "geometric"}, "must be token or sequence; got 'geometric'"),
    ],
)
def test_options_out_of_range_are_refused_before_the_first_step(stage, message):
    with pytest.raises(ConfigError, match=message):
        Objective(AlgorithmConfig(off_policy=OffPolicyConfig((stage,))))


@pytest.mark.parametrize(
    ("stage", "separable"),
    [
        ({"name": "truncated_is"}, True),
        ({"name": "truncated_is", "level": "sequence"}, False),
        ({"name": "icepop", "level": "geometric"}, False),
        ({"name": "token_mask"}, True),
        ({"name": "sequence_mask"}, False),
        ({"name": "outlier_mask"}, False),
        ({"name": "outlier_mask", "level": "token"}, True),
        ({"name": "divergence_mask"}, False),
        ({"name": "divergence_mask", "level": "token"}, True),
        ({"name": "staleness_decay"}, True),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else None,
)
def test_stages_that_look_at_sequences_are_not_run_chunk_by_chunk(stage, separable):
    assert Objective(AlgorithmConfig(off_policy=OffPolicyConfig((stage,)))).token_separable == separable


def test_a_stage_of_ones_own_that_looks_at_sequences_must_say_so(tmp_path):
    own = tmp_path / "own_stage.py"
    own.write_text("def last_word(inputs):\n    return inputs.log_ratio_at('sequence').exp(), inputs.loss_mask\n")
    with pytest.raises(ConfigError, match="register it with token_separable=False"):
        bind_stages([{"name": f"{own}:last_word"}])


def test_a_stage_of_ones_own_that_says_so_weighs_whole_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(STAGES, "_entries", dict(STAGES._entries))
    own = tmp_path / "own_declared_stage.py"
    own.write_text(
        "from skyrl_mega.algorithms.off_policy import STAGES\n\n\n"
        "@STAGES.register('half_trust', weighs=True, token_separable=False)\n"
        "def half_trust(inputs, *, power: float = 0.5):\n"
        "    factor_T = (power * inputs.log_ratio_at('sequence')).exp()\n"
        "    return factor_T, factor_T != 1\n"
    )
    stage = {"name": f"{own}:half_trust", "power": 0.25}
    case = Case([3, 8])
    assert not Objective(AlgorithmConfig(off_policy=OffPolicyConfig((stage,)))).token_separable
    expected = torch.ones(11, dtype=torch.float64)
    for row in case.sequences():
        for (index, _, _), ratio in zip(row, ratio_at("sequence", row), strict=True):
            expected[index] = ratio**0.25
    done = case.correct(stage)
    torch.testing.assert_close(done.weights_T, expected, rtol=1e-12, atol=0)
    assert "off_policy/half_trust_fraction" in done.token_stats
    with pytest.raises(ConfigError, match="weighs by the ratio more than once"):
        bind_stages([stage, {"name": "truncated_is"}])


def test_samples_without_versions_can_not_be_weighed_by_age():
    [stage] = bind_stages([{"name": "staleness_decay"}])
    ones = torch.ones(2)
    with pytest.raises(ConfigError, match="which weight version sampled each token"):
        off_policy_correction(ones, ones, ones.bool(), [stage])


def test_weighing_by_what_the_loss_already_divides_by_is_refused_and_masking_is_not():
    def objective(name):
        return Objective(AlgorithmConfig(old_logprobs="rollout", off_policy=OffPolicyConfig(({"name": name},))))

    for name in ("truncated_is", "masked_is", "icepop"):
        with pytest.raises(ConfigError, match=r"it would count twice. Set `algorithm.old_logprobs=policy`"):
            objective(name)
    # The mask compares the current policy, not the engine with itself.
    rollout = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    logprobs = (rollout + torch.tensor([0.0, 1.5, -1.5])).requires_grad_()
    everything, ones = torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.float64)
    loss, stats = objective("token_mask")(LossInputs(logprobs, rollout, rollout, ones, everything), ones)
    loss.backward()
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0]
    assert float(stats.sums["off_policy/token_mask_fraction"]) == 2
    assert float(stats.sums["mismatch/abs_logprob_diff_mean"]) == pytest.approx(3.0)
    assert float(stats.sums["mismatch/kl_k1"]) == pytest.approx(0.0)
    assert float(stats.sums["mismatch/kl"]) == pytest.approx(math.exp(1.5) + math.exp(-1.5) - 2)


@pytest.mark.parametrize(("max_staleness", "warns"), [(0, True), (4, False)])
def test_decay_by_age_is_warned_of_where_nothing_ages(max_staleness, warns):
    config = Config(
        trainer=TrainerConfig(max_staleness=max_staleness),
        algorithm=AlgorithmConfig(off_policy=OffPolicyConfig(({"name": "staleness_decay"},))),
    )
    messages = [
        m for rule in ALGORITHM_COMBINATIONS if "staleness_decay" in rule.statement for m in rule.messages(config, Facts(1, None))
    ]
    assert [is_warning for _, is_warning in messages] == ([True] if warns else [])
