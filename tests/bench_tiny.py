"""The run with no flags on a CPU, for seeds 0, 1 and 2: accuracy before and after, whole-process seconds.

    .venv/bin/python tests/bench_tiny.py
    .venv-vllm/bin/python tests/bench_tiny.py --sampler vllm    # flags are the run's, cold starts the same
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "grpo_scratch.py"


def main() -> None:
    after = []
    print(f"{'seed':>4} {'before':>8} {'after':>8} {'seconds':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1, 2):
            started = time.monotonic()
            command = [sys.executable, SCRIPT, "--recipe", "tiny", "--device", "cpu", "--seed", str(seed),
                       "--output-dir", folder, "--name", str(seed), *sys.argv[1:]]
            subprocess.run(command, check=True, capture_output=True)
            summary = json.loads((Path(folder) / str(seed) / "summary.json").read_text())
            after.append(summary["accuracy_after"])
            print(f"{seed:>4} {summary['accuracy_before']:>8.3f} {after[-1]:>8.3f} "
                  f"{time.monotonic() - started:>8.0f}", flush=True)
    print(f"median after: {statistics.median(after):.3f}, lowest: {min(after):.3f}")


if __name__ == "__main__":
    main()
