"""The how-to's file of one's own runs as it stands: through the check, the estimator and the loss."""

import re
from pathlib import Path

import torch

from skyrl_mega.algorithms.advantages import compute_advantages
from skyrl_mega.algorithms.check import check_algorithm
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.data.synthetic import random_samples

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "own_algorithm.md"


def test_the_file_of_the_howto_is_an_algorithm(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    file = tmp_path / "my_algorithm.py"
    file.write_text(code)
    config = AlgorithmConfig(
        advantage=f"{file}:median",
        advantage_options={"scale": 2.0},
        policy_loss=f"{file}:soft_wall",
        loss_options={"stiffness": 3.0},
    )
    check_algorithm(config)
    samples = random_samples(2, 3)
    compute_advantages(samples, config)
    rewards = [sample.reward for sample in samples[:3]]
    assert float(samples[0].advantages[-1]) == torch.tensor(2 * (rewards[0] - (max(rewards) + min(rewards)) / 2)).float()

    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -1.5]), torch.tensor([1.0, -1.0])
    objective = Objective(config)
    assert objective.token_separable
    loss, _ = objective(LossInputs(logprobs, old, old, advantages, torch.ones(2, dtype=torch.bool)), torch.ones(2))
    ratio = torch.tensor(-0.5).exp()
    torch.testing.assert_close(loss, -1.0 + ratio + 3.0 * 0.25)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.stack([torch.tensor(-1.0), ratio + 2 * 3.0 * -0.5]))
