"""Mutation test of `cnntrain verify`: injected faults must be reported, correct convolutions pass.

    python scripts/verify_faults.py                    # the short form; about 30 CPU minutes
    python scripts/verify_faults.py --full --part 1/4  # a quarter, in full
    python scripts/verify_faults.py --only Winograd    # names that contain this

A fault is caught if a line that stands for its kind fails. Exit code 1 if one is missed, or if a
correct convolution fails.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from cnntrain.lab.verify import verify


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from all_faults import FAULTS  # type: ignore[import-not-found]
    from correct_convolutions import CORRECT  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="the full form; default: the short one")
    parser.add_argument("--part", default="1/1", help="every n-th, as 1/4 to 4/4")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, step = map(int, options.part.split("/"))
    short, seed = not options.full, options.seed
    start = time.process_time()

    faults = [name for name in FAULTS if options.only in name][first - 1 :: step]
    missed = []
    for name in faults:
        layer, lines = FAULTS[name]
        reports = (verify(layer, short=short, seed=seed, only=part) for part in lines)
        if all(report.passed for report in reports):
            missed.append(name)
            print(f"missed: {name}, by {', '.join(lines)}", flush=True)
    correct = [layer for layer in CORRECT if options.only in layer.__name__][first - 1 :: step]
    failed = 0
    for layer in correct:
        report = verify(layer, short=short, seed=seed)
        failed += not report.passed
        for line in report.lines:
            if not line.passed:
                print(f"fails, though correct: {line.name}, {line.failure}", flush=True)
    caught, passed = len(faults) - len(missed), len(correct) - failed
    print(
        f"{caught} of {len(faults)} faults caught, {passed} of {len(correct)} correct convolutions "
        f"passed ({'full' if options.full else 'short'}, {time.process_time() - start:.0f} CPU s)"
    )
    sys.exit(bool(missed or failed))


if __name__ == "__main__":
    main()
