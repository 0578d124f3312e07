"""Updates on fixed data are those of one process in every layout: the same losses, gradients, evaluations and weights."""

from __future__ import annotations

import pytest

from helpers.offline import LR, offline_config, random_examples, updates
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model

LAYOUTS = {
    **{"dp2": [], "tp2": ["parallel=tp2_sp"], "pp2": ["parallel=pp2"], "cp2": ["parallel=cp2"]},
    **{"ep2": ["parallel=ep2"], "vpp2": ["parallel=pp2_vpp2"]},
}
ALL = tuple(LAYOUTS)
#: The layouts that need a mixture of experts, or four layers.
OF_EXPERTS = ("ep2", "vpp2")
#: Command and settings by name; each is run in the layouts named, and one of them in all.
CASES = {
    "sft": ("sft", [], ALL),
    "dpo": ("dpo", ["preference.sft_coef=0.2"], ALL),
    "kto": ("dpo", ["preference.loss=kto", "preference.beta=1.0"], ("dp2", "cp2")),
    "precomputed": ("dpo", ["preference.loss=ipo", "preference.reference=precomputed"], ("dp2",)),
    "rm": ("rm", ["reward_model.centering_coef=0.1"], ALL),
    "rm_lora": ("rm", ["lora.rank=4", "lora.alpha=8"], ("tp2", "vpp2")),
    "regression": ("rm", ["reward_model.loss=regression"], ("cp2",)),
}


def run_case(config):
    batches = [random_examples(config, 6, seed=seed) for seed in (1, 2)]
    return updates(config, batches, random_examples(config, 5, seed=3))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one process's results by (case, whether of experts), both ranks' results by (case, layout))."""
    folder = tmp_path_factory.mktemp("offline")
    # A reference of its own: with the policy's first weights, which answer is better would be left to rounding.
    models, others = (
        {
            False: write_tiny_model(folder / f"dense{seed}", "qwen3", tied=True, seed=seed),
            True: write_tiny_model(folder / f"experts{seed}", "qwen3_moe", tied=False, seed=seed, num_hidden_layers=4),
        }
        for seed in (0, 1)
    )

    def config_of(case, of_experts, layout=()):
        command, changes, _ = CASES[case]
        fixed = [f"preference.reference_path={others[of_experts]}"] if command == "dpo" else []
        return offline_config(command, models[of_experts], *fixed, *changes, *layout)

    pairs = [(case, layout) for case, (_, _, layouts) in CASES.items() for layout in layouts]
    together = {(case, layout): (config_of(case, layout in OF_EXPERTS, LAYOUTS[layout]),) for case, layout in pairs}
    ranks = run_cases(run_case, 2, together, timeout_s=280)
    alone = {(case, layout in OF_EXPERTS) for case, layout in pairs}
    return {(case, of_experts): run_case(config_of(case, of_experts)) for case, of_experts in alone}, ranks


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for case, (_, _, layouts) in CASES.items() for layout in layouts])
def test_a_layout_computes_what_one_process_computes(case, layout, results):
    alone, ranks = results
    right = alone[case, layout in OF_EXPERTS]
    assert right["before"]["loss"] != pytest.approx(right["after"]["loss"], abs=1e-4), "nothing was learned: nothing is compared"
    for got in (rank[case, layout] for rank in ranks):
        for before, after in zip(right["metrics"], got["metrics"], strict=True):
            numbers = {name for name in before if name.startswith(("loss/", "rewards/", "logps/"))}
            assert numbers
            for name in numbers:
                assert after[name] == pytest.approx(before[name], abs=2e-5, rel=1e-5), name
            assert after["update/grad_norm"] == pytest.approx(before["update/grad_norm"], rel=2e-4)
        for moment in ("before", "after"):
            assert got[moment] == pytest.approx(right[moment], abs=1e-4, rel=1e-4)
        for name, weight in right["weights"].items():
            difference = (got["weights"][name] - weight).abs()
            assert difference.max() < 0.05 * LR, name
            assert difference.mean() < 1e-3 * LR, name
