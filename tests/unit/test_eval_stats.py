"""Statistics of an evaluation, against enumeration, closed forms and coverage."""

import itertools
import math

import numpy as np
import pytest

from skyrl_mega.telemetry.eval_stats import bootstrap, estimate, ks_up_to, majority_score, pass_at_k, wilson


@pytest.mark.parametrize(("num_samples", "num_passed"), [(1, 0), (1, 1), (4, 1), (6, 2), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_all_subsets_in_which_one_passes(num_samples, num_passed):
    samples = [True] * num_passed + [False] * (num_samples - num_passed)
    for k in range(1, num_samples + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_wants_as_many_samples_as_it_draws():
    with pytest.raises(ValueError, match="needs at least 5 samples"):
        pass_at_k(4, 1, 5)


def test_ks_are_powers_of_two_and_the_number_itself():
    assert [ks_up_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_majority_is_worth_what_its_answer_is_and_ties_share():
    assert majority_score(["7", "7", "8"], [1.0, 1.0, 0.0]) == 1.0
    assert majority_score(["8", "8", "7"], [0.0, 0.0, 1.0]) == 0.0
    assert majority_score(["7", "8"], [1.0, 0.0]) == 0.5
    assert majority_score([None, None, "7"], [0.0, 0.0, 1.0]) == 1.0, "no answer has no vote"
    assert majority_score([None, None], [0.0, 0.0]) == 0.0


def test_wilsons_interval_is_where_the_score_test_accepts():
    for share, count in ((0.3, 50), (0.0, 20), (1.0, 20), (0.97, 128)):
        for bound in wilson(share, count):
            # The bounds solve (share - p)^2 = z^2 p (1 - p) / count.
            assert (share - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / count, abs=1e-12)
    assert wilson(1.0, 20)[0] < 1.0 == wilson(1.0, 20)[1]


def test_the_interval_is_wilsons_for_right_and_wrong_and_the_bootstraps_else():
    binary = estimate([1.0, 0.0, 1.0, 1.0])
    assert (binary.value, binary.low, binary.high, binary.method) == (0.75, *wilson(0.75, 4), "wilson")
    shares = estimate([0.5, 0.25, 1.0, 0.0])
    assert (shares.value, shares.method) == (0.4375, "bootstrap")
    with pytest.raises(ValueError, match="at least one prompt"):
        estimate([])


def test_the_bootstrap_has_the_spread_of_the_mean_and_repeats():
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap(values)
    spread = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.1 * spread)
    assert bootstrap(values) == (low, high)
