"""make chaos: run thirty trainings, kill or suspend a process of each at a random moment, and print the outcomes."""

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.conftest import small_tables
from tests.system.chaos import VICTIMS, Chaos, chaos_tables, schedules
from tests.tiny_pipeline import save_tiny_pipeline

ROUNDS = 8
WATCHDOG_SECONDS = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="begin with this one, as after a look at a failure")
    parser.add_argument("--only", choices=VICTIMS, help="those that befall this process alone")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--suspended-seconds", type=float, default=40.0)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
        (folder / "token").write_text(secrets.token_hex(32))
        tables = small_tables(save_tiny_pipeline(folder / "model"), folder)
        sampled = schedules(options.schedules, options.seed, ROUNDS, options.suspended_seconds)[options.first :]
        chosen = [each for each in sampled if options.only in (None, each.victim)]
        with Chaos(folder, chaos_tables(tables, ROUNDS, WATCHDOG_SECONDS)) as chaos:
            for schedule in chosen:
                began = time.monotonic()
                outcome = chaos.run(schedule)
                failed += bool(outcome.problems)
                ended = "went on" if outcome.exit_code == 0 else f"exit code {outcome.exit_code}: {outcome.last_line}"
                said = "; ".join(outcome.problems) or ("resumed to the same bits" if outcome.resumed else "same bits")
                print(
                    f"{schedule.number}. {schedule} | {ended} | {said} | {time.monotonic() - began:.0f} s", flush=True
                )
                if outcome.problems:
                    print(json.dumps(asdict(outcome)), file=sys.stderr, flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} ended well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
