"""Faults tried on real runs of the tiny recipe: kill -9 at random moments, signals, a full disk.

    .venv/bin/python tests/bench_faults.py --kills 50      # about ten minutes on two cores

One run saves at every second step and is killed again and again, each time at a random moment, and resumed
with `--resume latest`. Survived means: it resumes, and has lost no more than the steps since the last save.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "grpo_scratch.py"
SAVE_EVERY = 2
NEW_RUN = ["--recipe", "tiny", "--device", "cpu", "--cold-start-steps", "0", "--steps", "100000",
           "--eval-examples", "4", "--prompts-per-step", "4", "--save-every", str(SAVE_EVERY),
           "--eval-every", "0"]


def start(arguments: list[str], small_disk: bool = False, ordinary_user: bool = False) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *arguments]
    if small_disk:  # no file may be over 1 MiB (2048 blocks): metrics fit, weights don't
        command = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *command]
    if ordinary_user and os.geteuid() == 0:  # root may write everywhere, unless it gives that up
        command = ["setpriv", "--bounding-set", "-dac_override", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_step(process: subprocess.Popen) -> int | None:
    """Read the output up to the first step's line; that step, or None when the process ended before."""
    for line in process.stdout:
        if line.startswith("step ") and "/" in line.split()[1]:
            return int(line.split()[1].split("/")[0])
    return None


def kills(count: int, folder: Path) -> tuple[int, str]:
    """How many of `count` kills were survived: every other one while a run starts and resumes, the rest at
    random moments of training and saving."""
    rng, survived, steps_done, problem = random.Random(0), 0, 0, ""
    process = start([*NEW_RUN, "--output-dir", str(folder), "--name", "killed"])
    for i in range(count):
        if i % 2:
            time.sleep(rng.uniform(0, 7))
        else:
            first = until_step(process)
            if first is None:
                problem = f"did not start again: {process.communicate()[0]}"
                break
            if steps_done and first < steps_done - SAVE_EVERY + 1:
                problem = f"went on at step {first} after {steps_done} were done"
                break
            while not list((folder / "killed").glob("checkpoint-*")):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = [line for line in (folder / "killed" / "metrics.jsonl").read_text().splitlines()
                 if line.endswith("}")]
        steps_done = json.loads(whole[-1])["step"]
        survived += 1
        process = start(["--resume", "latest", "--name", "killed", "--output-dir", str(folder)])
    last = until_step(process) is not None
    process.kill()
    process.communicate()
    return survived - (not last), problem or f"{steps_done} steps done in the end"


def signalled(number: int, code: int, folder: Path) -> tuple[int, str]:
    process = start([*NEW_RUN, "--output-dir", str(folder), "--name", f"signal{number}"])
    until_step(process)
    process.send_signal(number)
    process.communicate()
    saved = list((folder / f"signal{number}").glob("checkpoint-*"))
    return (
        int(process.returncode == code and bool(saved)),
        f"exit {process.returncode}, {saved[0].name if saved else 'nothing'}",
    )


def full_disk(folder: Path) -> tuple[int, str]:
    process = start(
        [*NEW_RUN, "--steps", "5", "--output-dir", str(folder), "--name", "full"], small_disk=True
    )
    out = process.communicate()[0]
    told = "could not be saved" in out and "step 5/5" in out
    return int(told), f"exit {process.returncode}, training went on to its last step"


def no_permission(folder: Path) -> tuple[int, str]:
    """A folder that can't be written to from the start, and a run's own folder closed after a step."""
    (folder / "closed").mkdir(mode=0o500)
    process = start([*NEW_RUN, "--output-dir", str(folder / "closed")], ordinary_user=True)
    out = process.communicate()[0]
    refused = process.returncode == 2 and "can't be written to" in out.splitlines()[-1]
    process = start([*NEW_RUN, "--steps", "6", "--output-dir", str(folder), "--name", "shut"],
                    ordinary_user=True)
    until_step(process)
    (folder / "shut").chmod(0o500)
    out = process.communicate()[0]  # final/ can't be written either, and that is said
    went_on = "could not be saved" in out and "step 6/6" in out
    return int(refused) + int(went_on), out.strip().splitlines()[-1][:80]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    count = parser.parse_args().kills
    print(f"{'fault':<34}{'tried':>6}{'survived':>10}  what was seen", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for fault, tried, attempt in (
            ("Ctrl-C (SIGINT)", 1, lambda: signalled(signal.SIGINT, 130, folder)),
            ("SIGTERM", 1, lambda: signalled(signal.SIGTERM, 143, folder)),
            ("disk full (file size limit)", 1, lambda: full_disk(folder)),
            ("no permission to write", 2, lambda: no_permission(folder)),
            ("kill -9 at a random moment", count, lambda: kills(count, folder)),
        ):
            survived, seen = attempt()
            print(f"{fault:<34}{tried:>6}{survived:>10}  {seen}", flush=True)


if __name__ == "__main__":
    main()
