"""Rows of two-digit additions for every way of training on fixed data.

    python scripts/data/make_addition_rows.py DIRECTORY [--problems 2000] [--seed 0]

Writes demonstrations.jsonl {"prompt", "response"}, preferences.jsonl {"prompt", "chosen", "rejected"} (right against wrong sums),
labels.jsonl {"prompt", "response", "label"} and scores.jsonl {"prompt", "response", "score"}: minus the number of wrong digits.
Wrong sums are off by a few, by ten, or have two digits exchanged: mistakes that look like sums.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any


def wrong_sum(right: int, rng: random.Random) -> int:
    """Another number of the kind that a careless adder writes."""
    digits = str(right)
    swapped = int(digits[:-2] + digits[-1] + digits[-2])
    others = [right + step for step in (-10, -2, -1, 1, 2, 10)] + [swapped]
    return rng.choice([number for number in others if number != right and number > 9])


def wrong_digits(number: int, right: int) -> int:
    """How many digits differ, from the last one on."""
    one, other = str(number)[::-1], str(right)[::-1]
    return abs(len(one) - len(other)) + sum(a != b for a, b in zip(one, other, strict=False))


def make_rows(problems: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, by its name without ending."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {"demonstrations": [], "preferences": [], "labels": [], "scores": []}
    for _ in range(problems):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        prompt, right = f"{a}+{b}=", a + b
        wrong = wrong_sum(right, rng)
        rows["demonstrations"].append({"prompt": prompt, "response": str(right)})
        rows["preferences"].append({"prompt": prompt, "chosen": str(right), "rejected": str(wrong)})
        answer = rng.choice([right, wrong])
        rows["labels"].append({"prompt": prompt, "response": str(answer), "label": answer == right})
        answer = rng.choice([right, wrong, rng.randint(20, 198)])
        rows["scores"].append({"prompt": prompt, "response": str(answer), "score": -wrong_digits(answer, right)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--problems", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(arguments.problems, arguments.seed).items():
        path = arguments.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
