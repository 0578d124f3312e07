"""`python -m skyrl_mega.train overrides...` is `skyrl-mega train`: what torchrun starts on every rank.

    torchrun --nproc-per-node 2 -m skyrl_mega.train recipe=quickstart parallel=dp2

The `__main__` guard is essential: checkpoint writers and engines spawn processes, which import this module again.
"""

import sys

from skyrl_mega.launch.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
