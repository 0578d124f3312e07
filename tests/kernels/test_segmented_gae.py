"""segmented_gae, segmented_returns and segmented_scan against plain float64 loops, on every backend that this machine has."""

import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import torch

from skyrl_mega.errors import BackendUnavailableError
from skyrl_mega_kernels.segmented_gae import ops as gae_ops
from skyrl_mega_kernels.segmented_gae import segmented_gae, segmented_returns, segmented_scan

#: Empty sequences, single tokens, lengths around every vector width, and one long enough for many vectors.
LENGTHS = (0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 15, 16, 17, 31, 33, 64, 301, 0)
BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = gae_ops.OPERATOR.unavailable(request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def borders(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def make_case(lengths=LENGTHS, *, seed=0, counting=0.6):
    """(rewards, values, cu_seqlens, loss_mask, bootstrap_values); the first token of every sequence counts."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = borders(lengths)
    num_tokens = int(cu_seqlens[-1])
    rewards, values = torch.randn(2, num_tokens, generator=generator)
    mask = torch.rand(num_tokens, generator=generator) < counting
    mask[cu_seqlens[:-1][cu_seqlens[:-1] < num_tokens]] = True
    return rewards, values, cu_seqlens, mask, torch.randn(len(lengths), generator=generator)


def gae_loop(rewards, values, cu_seqlens, *, gamma, lam, loss_mask=None, bootstrap_values=None):
    """The definition, token by token, in Python floats (float64)."""
    num_tokens, starts = len(rewards), cu_seqlens.tolist()
    rewards, values = rewards.double().tolist(), values.double().tolist()
    counts = [True] * num_tokens if loss_mask is None else loss_mask.tolist()
    advantages, returns = [0.0] * num_tokens, [0.0] * num_tokens
    for sequence, (start, stop) in enumerate(pairwise(starts)):
        next_value = 0.0 if bootstrap_values is None else bootstrap_values[sequence].double().item()
        advantage, paid_later = 0.0, 0.0
        for t in reversed(range(start, stop)):
            if not counts[t]:
                paid_later += rewards[t]
                continue
            advantage = rewards[t] + paid_later + gamma * next_value - values[t] + gamma * lam * advantage
            next_value, paid_later = values[t], 0.0
            advantages[t], returns[t] = advantage, advantage + values[t]
    return torch.tensor([advantages, returns], dtype=torch.float64)


def gae_float32_loop(rewards, values, cu_seqlens, gamma, lam):
    """The same recursion token by token in float32: the error that a straightforward implementation makes."""
    out = torch.zeros(2, len(rewards))
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        advantage, next_value = torch.zeros(()), torch.zeros(())
        for t in reversed(range(start, stop)):
            advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * advantage
            next_value = values[t]
            out[0, t], out[1, t] = advantage, advantage + next_value
    return out


def assert_close(ours, exact, *, tolerance=2e-6):
    error, scale = (ours.double() - exact).abs().max().item(), max(1.0, exact.abs().max().item())
    assert error <= tolerance * scale, f"error {error:.3e} where values reach {scale:.3g}"


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.0, 0.5), (0.9, 0.0)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_advantages_and_returns_match_the_definition(backend, gamma, lam, index_dtype):
    rewards, values, cu_seqlens, _, _ = make_case()
    ours = segmented_gae(rewards, values, cu_seqlens.to(index_dtype), gamma=gamma, lam=lam, backend=backend)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_close(torch.stack(ours), gae_loop(rewards, values, cu_seqlens, gamma=gamma, lam=lam))


@pytest.mark.parametrize("counting", [0.03, 0.5, 0.97])
def test_the_recursion_jumps_over_masked_tokens_and_their_rewards_reach_the_action_before(backend, counting):
    rewards, values, cu_seqlens, mask, bootstrap = make_case(counting=counting)
    values[~mask] = torch.nan
    settings = dict(gamma=0.97, lam=0.9, loss_mask=mask, bootstrap_values=bootstrap)
    ours = torch.stack(segmented_gae(rewards, values, cu_seqlens, **settings, backend=backend))
    assert (ours[:, ~mask] == 0).all()
    assert_close(ours, gae_loop(rewards, values.nan_to_num(), cu_seqlens, **settings))


def test_masked_runs_of_every_length_around_the_vector_width_are_found(backend):
    for run in (1, 7, 8, 9, 16, 17, 40):
        mask = (torch.arange(400) // run) % 2 == 0
        rewards, values, cu_seqlens, _, bootstrap = make_case((400,), seed=run)
        settings = dict(gamma=0.99, lam=0.95, loss_mask=mask, bootstrap_values=bootstrap)
        ours = torch.stack(segmented_gae(rewards, values, cu_seqlens, **settings, backend=backend))
        assert_close(ours, gae_loop(rewards, values, cu_seqlens, **settings))


def test_bootstrap_values_stand_for_what_a_cut_off_episode_would_still_have_earned(backend):
    # With a constant value c, gamma 1 and no rewards, a cut episode has no advantage anywhere; a finished one lost c.
    rewards, values, cu_seqlens = torch.zeros(5), torch.full((5,), 3.0), torch.tensor([0, 2, 5])
    advantages, returns = segmented_gae(
        rewards, values, cu_seqlens, gamma=1.0, lam=0.5, bootstrap_values=torch.tensor([3.0, 0.0]), backend=backend
    )
    assert advantages.tolist() == [0.0, 0.0, -0.75, -1.5, -3.0]
    assert returns.tolist() == [3.0, 3.0, 2.25, 1.5, 0.0]


@pytest.mark.parametrize("masked", [False, True])
def test_returns_are_discounted_rewards_to_go(backend, masked):
    rewards, values, cu_seqlens, mask, bootstrap = make_case()
    settings = dict(gamma=0.93, loss_mask=mask if masked else None, bootstrap_values=bootstrap)
    ours = segmented_returns(rewards, cu_seqlens, **settings, backend=backend)
    assert_close(ours, gae_loop(rewards, torch.zeros_like(values), cu_seqlens, lam=1.0, **settings)[1])


def test_scan_with_a_decay_of_its_own_for_every_token_matches_a_loop(backend):
    values, decay, cu_seqlens, _, _ = make_case()
    decay = decay.tanh()
    expected, starts = values.double().clone(), cu_seqlens.tolist()
    for start, stop in pairwise(starts):
        for t in reversed(range(start, stop - 1)):
            expected[t] += decay[t].double() * expected[t + 1]
    assert_close(segmented_scan(decay, values, cu_seqlens, backend=backend), expected)


def test_no_more_error_than_a_float32_loop_makes_over_a_long_sequence(backend):
    rewards, values, cu_seqlens, _, _ = make_case((1, 3000, 2))
    ours = torch.stack(segmented_gae(rewards, values, cu_seqlens, gamma=1.0, lam=1.0, backend=backend)).double()
    exact = gae_loop(rewards, values, cu_seqlens, gamma=1.0, lam=1.0)
    loop_error = (gae_float32_loop(rewards, values, cu_seqlens, 1.0, 1.0) - exact).abs().max()
    assert (ours - exact).abs().max() <= 3 * loop_error


def test_float64_inputs_give_float64_to_its_own_precision():
    rewards, values, cu_seqlens, mask, bootstrap = make_case()
    settings = dict(gamma=0.99, lam=0.95, loss_mask=mask, bootstrap_values=bootstrap.double())
    ours = torch.stack(segmented_gae(rewards.double(), values.double(), cu_seqlens, **settings))
    assert ours.dtype == torch.float64
    assert_close(ours, gae_loop(rewards, values, cu_seqlens, **settings), tolerance=1e-14)


def test_a_sequence_gets_the_same_bits_alone_and_packed(backend):
    if backend == "reference":
        pytest.skip("the reference doubles up to the longest sequence of the batch")
    rewards, values, cu_seqlens, mask, bootstrap = make_case()
    settings = dict(gamma=0.99, lam=0.95, backend=backend)
    packed = segmented_gae(rewards, values, cu_seqlens, loss_mask=mask, bootstrap_values=bootstrap, **settings)
    for sequence, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        own = slice(start, stop)
        alone = segmented_gae(
            rewards[own], values[own], borders([stop - start]),
            loss_mask=mask[own], bootstrap_values=bootstrap[sequence : sequence + 1], **settings,
        )  # fmt: skip
        assert torch.equal(packed[0][own], alone[0])
        assert torch.equal(packed[1][own], alone[1])


def test_threads_share_the_sequences_and_change_no_bit(backend):
    rewards, values, cu_seqlens, mask, _ = make_case((3, 40_000, 0, 17, 20_000, 1, 30_000))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ours = segmented_gae(rewards, values, cu_seqlens, gamma=1, lam=0.95, loss_mask=mask, backend=backend)
            results.append(torch.stack(ours))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nothing_at_all_is_a_valid_batch(backend):
    nothing = torch.zeros(0)
    for cu_seqlens in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        advantages, returns = segmented_gae(nothing, nothing, cu_seqlens, gamma=1, lam=1, backend=backend)
        assert advantages.shape == returns.shape == (0,)
    rewards = torch.zeros(4)
    no_token = segmented_gae(
        rewards, rewards, torch.tensor([0, 4]), gamma=1, lam=1, loss_mask=torch.zeros(4, dtype=torch.bool), backend=backend
    )
    assert all((tensor == 0).all() for tensor in no_token)


def test_outputs_are_targets_without_gradient_and_inputs_stay_as_they_were(backend):
    rewards, values, cu_seqlens, mask, _ = make_case()
    before = values.clone()
    advantages, returns = segmented_gae(
        rewards, values.requires_grad_(), cu_seqlens, gamma=0.9, lam=0.9, loss_mask=mask, backend=backend
    )
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert torch.equal(values, before)


def test_strided_inputs_give_what_their_copies_give(backend):
    rewards, values, cu_seqlens, mask, _ = make_case()
    wide = torch.stack([rewards, values], dim=1)
    settings = dict(gamma=0.9, lam=0.9, loss_mask=mask, backend=backend)
    ours = segmented_gae(wide[:, 0], wide[:, 1], cu_seqlens, **settings)
    for mine, expected in zip(ours, segmented_gae(rewards, values, cu_seqlens, **settings), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("lost_at", [0, 12])
def test_a_reward_that_no_action_could_have_earned_is_refused(backend, lost_at):
    rewards, mask = torch.zeros(30), torch.ones(30, dtype=torch.bool)
    mask[0], mask[10:13] = False, False
    rewards[lost_at] = 1.0
    with pytest.raises(ValueError, match=r"last counting token before it in its sequence; (a )?token .* has none"):
        segmented_gae(rewards, rewards, torch.tensor([0, 10, 30]), gamma=1, lam=1, loss_mask=mask, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "must ascend: entry 1 is 3 and entry 2 is 2"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"number of tokens \(5\); got 0 .. 3"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "got 1 .. 5"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"\[S \+ 1\]"),
        ({"rewards": torch.zeros(5, dtype=torch.bfloat16)}, "rewards must be float32 or float64"),
        ({"rewards": torch.zeros(1, 5)}, "pack"),
        ({"values": torch.zeros(4)}, r"values must be torch.float32 \(5,\)"),
        ({"values": torch.zeros(5, dtype=torch.float64)}, "values must be torch.float32"),
        ({"loss_mask": torch.ones(5)}, "loss_mask must be bool"),
        ({"bootstrap_values": torch.zeros(3)}, r"bootstrap_values must be torch.float32 \[2\]"),
        ({"gamma": 1.5}, r"gamma \(1.5\) must lie in \[0, 1\]"),
        ({"lam": -0.1}, "lam"),
        ({"lam": float("nan")}, "lam"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = dict(rewards=torch.zeros(5), values=torch.zeros(5), cu_seqlens=torch.tensor([0, 3, 5]), gamma=0.9, lam=0.9)
    with pytest.raises(ValueError, match=message):
        segmented_gae(**{**arguments, **change})


def test_a_backend_that_cannot_run_is_an_error_with_the_reason():
    with pytest.raises(BackendUnavailableError, match="NVIDIA"):
        segmented_gae(torch.zeros(2), torch.zeros(2), torch.tensor([0, 2]), gamma=1, lam=1, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="float64"):
        segmented_returns(torch.zeros(2).double(), torch.tensor([0, 2]), gamma=1, backend="cpu")


def test_opcheck_passes(backend):
    rewards, values, cu_seqlens, mask, bootstrap = make_case((3, 5, 0))
    torch.library.opcheck(gae_ops.segmented_gae_op, (rewards, values, cu_seqlens, mask, bootstrap, 0.9, 0.8, backend))
    torch.library.opcheck(gae_ops.segmented_returns_op, (rewards, cu_seqlens, None, None, 0.9, backend))
    torch.library.opcheck(gae_ops.segmented_scan_op, (rewards, values, cu_seqlens, backend))


def test_compiled_graphs_go_through_without_a_break(backend):
    rewards, values, cu_seqlens, mask, _ = make_case((3, 50, 7))

    def normalised(rewards, values, cu_seqlens, mask):
        advantages, _ = segmented_gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.8, loss_mask=mask, backend=backend)
        return (advantages - advantages.mean()) / advantages.std()

    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager")(rewards, values, cu_seqlens, mask)
    torch.testing.assert_close(compiled, normalised(rewards, values, cu_seqlens, mask))


ISA_PROBE = """
    import sys, torch
    from skyrl_mega_kernels.segmented_gae import segmented_gae, segmented_scan
    rewards, values, cu_seqlens, mask, bootstrap, expected, scanned = torch.load(sys.argv[1])
    settings = dict(gamma=0.97, lam=0.9, loss_mask=mask, bootstrap_values=bootstrap, backend="cpu")
    ours = segmented_gae(rewards, values, cu_seqlens, **settings)
    torch.testing.assert_close(torch.stack(ours), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(segmented_scan(values.tanh(), rewards, cu_seqlens, backend="cpu"), scanned, rtol=2e-6, atol=2e-6)
    print(torch.ops.skyrl_mega_cpu.isa())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_instruction_sets_give_the_same_numbers(isa, tmp_path, monkeypatch):
    reason = gae_ops.OPERATOR.unavailable("cpu", torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    if isa == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    rewards, values, cu_seqlens, mask, bootstrap = make_case()
    settings = dict(gamma=0.97, lam=0.9, loss_mask=mask, bootstrap_values=bootstrap)
    expected = gae_loop(rewards, values, cu_seqlens, **settings).float()
    scanned = segmented_scan(values.tanh(), rewards, cu_seqlens, backend="reference")
    torch.save((rewards, values, cu_seqlens, mask, bootstrap, expected, scanned), tmp_path / "case.pt")
    monkeypatch.setenv("SKYRL_MEGA_CPU_ISA", isa)
    probe = [sys.executable, "-c", textwrap.dedent(ISA_PROBE), str(tmp_path / "case.pt")]
    assert subprocess.run(probe, check=True, capture_output=True, text=True, timeout=120).stdout.strip() == isa
