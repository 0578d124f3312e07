"""docs/algorithms.md has a row for every name, with every option it takes."""

import inspect
import re
from pathlib import Path

import pytest

from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES
from skyrl_mega.algorithms.kl import KL_ESTIMATORS
from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES
from skyrl_mega.algorithms.reductions import REDUCTIONS

DOC = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
NAMES = [(registry, name) for registry in (ADVANTAGES, POLICY_LOSSES) for name in registry.built_in]


@pytest.mark.parametrize(("registry", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_name_has_a_row_with_its_options(registry, name):
    section = DOC.split(f"`{registry.setting}`", 1)[1].split("\n## ", 1)[0]
    rows = [row for row in section.splitlines() if row.startswith("|") and f"`{name}`" in row.split("|")[1]]
    assert len(rows) == 1, name
    parameters = inspect.signature(registry.find(name).function).parameters.values()
    options = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if "the same" not in rows[0].split("|")[3]:
        assert options == set(re.findall(r"`(\w+)`", rows[0].split("|")[3])), name


def test_reductions_and_estimators_have_rows():
    first_cells = " ".join(row.split("|")[1] for row in DOC.splitlines() if row.startswith("|"))
    for name in (*REDUCTIONS, *KL_ESTIMATORS):
        assert f"`{name}`" in first_cells, name
