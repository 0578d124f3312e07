"""Training runs one after the other in one process, around one vLLM engine that is started once.

`python -m helpers.shared_engine SPECS RESULTS` runs what SPECS lists and writes what each run recorded. A process of its own:
engine and trainer share its process group, which a test session's other engine would have taken.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_all(specs: dict[str, dict], folder: Path, *, timeout_s: float) -> dict[str, dict]:
    """For each of `specs`, by name: {"error": traceback or "", "rows": its metrics}.

    A spec is {"overrides": [...], "remove": [paths]}: settings that have one model path in common, and what is removed before the
    run. Raises AssertionError with the end of the log if the process died.
    """
    (folder / "specs.json").write_text(json.dumps(specs))
    command = [sys.executable, "-m", "helpers.shared_engine", str(folder / "specs.json"), str(folder / "results.json")]
    with (folder / "log.txt").open("w") as log:
        ended = subprocess.run(command, cwd=TESTS, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
    assert ended.returncode == 0, (folder / "log.txt").read_text()[-6000:]
    return json.loads((folder / "results.json").read_text())


def main(specs_path: str, results_path: str) -> None:
    import torch

    from skyrl_mega.config.load import load_config
    from skyrl_mega.config.validate import validate
    from skyrl_mega.orchestration import assemble, rollout_assembly
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.rollout.in_process_async import InProcessAsyncEngine
    from skyrl_mega.rollout.local_engines import LocalEngine
    from skyrl_mega.rollout.version_gate import VersionGate
    from skyrl_mega.rollout.vllm_engine import VLLMEngine
    from skyrl_mega.telemetry.metrics import read_metrics

    class OpenEngine(InProcessAsyncEngine):
        """Leaves the engine behind it as it is for the next run."""

        def __init__(self, engine, rollout, *, name):
            super().__init__(engine, rollout, name=name)
            # Whatever weights the run before left: the trainer pushes its own before anything is served.
            self._gate = VersionGate(name, -1)

        async def close(self):
            if self._pump is not None:
                self._pump.cancel()
            self._death = "the run that used it has ended"
            self._gate.release()

    specs = json.loads(Path(specs_path).read_text())
    configs = {name: load_config(spec["overrides"]) for name, spec in specs.items()}
    first = next(iter(configs.values()))
    torch.set_num_threads(1)
    topology = init_topology(first.parallel, torch.device("cpu"), seed=0)
    engine = VLLMEngine.start(first.rollout, model_path=first.model.path, seed=0, threads=1, in_process=True, device="cpu")

    def factories(plan):
        async def factory(name):
            return LocalEngine(OpenEngine(engine, plan.config.rollout, name=name), is_inline=True)

        return {"0": factory}

    rollout_assembly.engine_factories = factories
    assemble.join_ranks = lambda config, stack: topology
    results = {}
    for name, config in configs.items():
        for path in specs[name].get("remove", []):
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        error = ""
        try:
            validate(config)
            assemble.run_training(config)
        except Exception:  # noqa: BLE001 (the test that looks at it shows it)
            error = traceback.format_exc()
        rows = []
        with contextlib.suppress(OSError):
            rows = read_metrics(config.trainer.run_dir)
        results[name] = {"error": error, "rows": rows}
    engine.close()
    topology.destroy()
    Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
