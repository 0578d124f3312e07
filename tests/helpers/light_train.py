"""`python -m helpers.light_train overrides...` is `python -m skyrl_mega.train` with light engines in place of vLLM."""

import sys

from skyrl_mega.launch.cli import main

if __name__ == "__main__":
    from helpers import light_engine
    from skyrl_mega.orchestration import rollout_assembly

    rollout_assembly.make_coordinator = light_engine.make_coordinator
    raise SystemExit(main(["train", *sys.argv[1:]]))
