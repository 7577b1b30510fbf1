"""Faults tried on real runs of the tiny recipe: kill -9 in named phases, signals, full disk, closed folders.

    OMP_NUM_THREADS=1 .venv/bin/python tests/bench_faults.py --kills 50      # 25 minutes on two busy cores

One run with everything on (refills, evaluations that each find a better model, checkpoints, a reference on a
server) is killed again and again, and resumed with `--resume latest`, on one rank or on two. Survived means:
what the kill left is whole (`check_whole`), and the run has gone on from its newest checkpoint, having lost
no more than the steps since the last save.

Phases are observed from outside: each process of the run is this file, which wraps the phases' functions and
calls main. A line with the time goes into a file when a phase begins, another when it ends; the reference's
server, in the bench's own process, does so for each request. The bench waits until a phase has begun, lets a
random part of its usual length go by, kills, and reads the lines again: observed is a kill before which the
phase had begun and not ended. One that came too late is made again. The moments between two renames, and
before a resumed run's files are replaced, are too short to hit: there the wrapper waits for HOLD seconds.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed.run
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import grpo_scratch as g

SCRIPT, SAVE_EVERY, HOLD = Path(g.__file__), 2, 0.1
SMALL = ["--recipe", "tiny", "--device", "cpu", "--memory-budget-gib", "1", "--prompts-per-step", "4",
         "--group-size", "4"]
NEW_RUN = [*SMALL, "--cold-start-steps", "0", "--steps", "100000", "--eval-examples", "4",
           "--eval-every", "0", "--save-every", str(SAVE_EVERY)]
KILLED_RUN = [*SMALL, "--cold-start-steps", "0", "--refill-rounds", "2", "--beta", "0.01",
              "--eval-examples", "16", "--eval-every", "1", "--save-every", str(SAVE_EVERY),
              "--resume", "latest", "--name", "killed"]

AT_START = ["opening a checkpoint", "going back to it"]
IN_STEPS = ["refill", "update", "evaluation", "checkpoint", "best/", "reference server answers"]
ONE_RANK = [*AT_START, *IN_STEPS, "between the renames of best/", "final/"]
TWO_RANKS = ["two ranks, one is killed", "two ranks, all are killed"]


# ---- In the run's processes: phases are marked -------------------------------------------------------------

numbers = itertools.count()


@contextmanager
def marked(marks: Path, phase: str) -> Iterator[None]:
    """Two lines in a file: when a phase begins and when it ends."""
    number = next(numbers)

    def write(what: str) -> None:
        with marks.open("a") as file:
            file.write(f"{time.monotonic()}\t{os.getpid()}\t{number}\t{what}\t{phase}\n")

    write("begins")
    try:
        yield
    finally:
        write("ends")


def run_marked(marks: Path, arguments: list[str], ranks: int = 0) -> None:
    """grpo_scratch's main with these arguments, marking the first rank's phases and all ranks' processes;
    with two `ranks` torchrun's main, which starts this file for each. With `ranks`, output is logged."""
    if ranks:
        with marks.with_suffix(".log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    if ranks == 2:
        torch.distributed.run.main(["--standalone", "--nproc-per-node=2", __file__, "--marked", str(marks),
                                    *arguments])
        return

    def wrap(owner, name: str, phase_of, hold: float = 0) -> None:
        real = getattr(owner, name)

        def wrapped(*given, **named):
            phase = phase_of(*given, **named)
            with marked(marks, phase) if phase else nullcontext():
                if phase:
                    time.sleep(hold)
                return real(*given, **named)

        setattr(owner, name, wrapped)

    def better_and_better(run, evaluate=g.evaluate) -> dict:
        found = evaluate(run)
        found["accuracy"] = run.evaluations[-1]["accuracy"] = run.step / 1e6
        return found

    def is_between(path: Path, to: Path) -> bool:
        return path.name == ".partial" and to.with_name(f".{to.name}.old").exists() and not to.exists()

    g.evaluate = better_and_better  # so that each writes best/
    if data.first_rank():
        wrap(g, "open_run", lambda *_: "opening a checkpoint")
        wrap(Path, "replace", lambda path, _: "going back to it" if path.suffix == ".partial" else "", HOLD)
        wrap(g, "grpo_step", lambda _: "step")
        wrap(g, "rollout", lambda *_, first_group=0, **__: "refill" if first_group else "")
        wrap(g, "update", lambda *_: "update")
        wrap(g, "evaluate", lambda _: "evaluation")
        wrap(data, "save_folder", lambda _, folder, *__, **___: "checkpoint" if "-" in folder.name
             else f"{folder.name}/")
        wrap(Path, "rename", lambda path, to: f"between the renames of {Path(to).name}/"
             if is_between(path, Path(to)) else "", HOLD)
    sys.argv[1:] = arguments
    with marked(marks, f"rank {os.environ.get('RANK', '0')}"):
        g.main()


def spans(marks: Path) -> list[tuple[str, float, float, int]]:
    """(phase, begun, ended or infinity, process id) of all that is marked, in the order in which it began."""
    found = {}
    for line in marks.read_text().splitlines():
        when, process, number, what, phase = line.split("\t")
        begun = found[process, number][1] if what == "ends" else float(when)
        found[process, number] = (phase, begun, float(when) if what == "ends" else math.inf, int(process))
    return list(found.values())


@contextmanager
def reference_server(folder: Path) -> Iterator:
    """The tests' stand-in for a server, which serves this model by transformers, and marks its requests."""
    import test_memory  # here, as the run's processes need nothing of it

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    class Handler(test_memory.ReferenceHandler):
        vocabulary = model.config.vocab_size

        def do_POST(self):
            with marked(self.server.marks, "reference server answers"), suppress(ConnectionError):
                super().do_POST()

        @torch.no_grad()
        def token_logprobs(self, ids):
            logprobs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            return [(float(row[i]), tokenizer.decode([i])) for row, i in zip(logprobs, ids[1:])]

    with test_memory.serving(Handler, context=1024) as server:
        server.seconds, server.handle_error = HOLD, lambda *_: None  # of clients that were killed
        yield server


# ---- Kills -------------------------------------------------------------------------------------------------


def check_whole(run: Path) -> None:
    """Raises what is wrong with what a kill left: models, tokenizers, states, lines, too many steps lost."""
    assert any(run.glob("*best*")), "no best/"
    for folder in [*run.glob("*checkpoint-*"), *run.glob("*best*"), *run.glob("final")]:
        if folder.name == ".best.old" and (run / "best").exists():
            continue  # about to be deleted
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)
        if "checkpoint-" in folder.name:
            assert f"checkpoint-{data.load_state(folder)['step']}" in folder.name
        elif "best" in folder.name:
            assert json.loads((folder / data.EVALUATION).read_text())["accuracy"] >= 0
    for name in ("samples.jsonl", "metrics.jsonl"):
        lines = (run / name).read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}") or line != lines[-1]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) <= newest_step(run) + SAVE_EVERY, steps


def newest_step(run: Path) -> int:
    return max([int(data.step_of(checkpoint)) for checkpoint in data.checkpoints(run)], default=0)


def ranks_of(marks: Path) -> list[int]:
    """Their process ids."""
    return [process for phase, _, _, process in spans(marks) if phase.startswith("rank ")]


def kill_all(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def resumed(arguments: list[str], marks: Path, ranks: int) -> multiprocessing.Process:
    """A run in a process of its own, which is forked from one that has done the imports."""
    marks.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo_scratch"])
    process = context.Process(target=run_marked, args=(marks, arguments, ranks), daemon=True)
    process.start()
    return process


def kill_in(phase: str, who: str, process: multiprocessing.Process, marks: Path, rng: random.Random) -> bool:
    """Kill a run in a phase, or torchrun's one or all ranks; returns whether the phase was under way."""
    most = 1 if phase in (*AT_START, "final/") else 2 if phase == "checkpoint" else 3
    begun, wanted, ends = [], rng.randint(1, most) if who else 2, time.monotonic() + 150
    while len(begun) < wanted:
        if not process.is_alive() or time.monotonic() > ends:
            raise RuntimeError(f"{phase} never came: {marks.with_suffix('.log').read_text()[-2000:]}")
        time.sleep(0.01)
        begun = [x for x in spans(marks) if x[0] == phase]
    lengths = [ended - begin for _, begin, ended, _ in begun if ended < math.inf]
    time.sleep(rng.uniform(0, min(lengths, default=HOLD / 2)))
    ranks = ranks_of(marks)
    kill_all([rng.choice(ranks)] if who == TWO_RANKS[0] else [process.pid, *ranks])
    killed = time.monotonic()
    process.join(150)  # torchrun ends the other rank
    if process.is_alive():
        raise RuntimeError("torchrun doesn't end")
    return any(x[0] == phase and x[1] < killed < x[2] for x in spans(marks))


def kills(count: int, folder: Path) -> dict[str, list[int]]:
    """Of each phase: kills, those observed in the phase, survived ones; `count` observed ones in all."""
    rng, run, in_turn = random.Random(0), folder / "killed", itertools.cycle(IN_STEPS)
    rows = itertools.cycle([*ONE_RANK, *TWO_RANKS])
    todo = [(row, next(in_turn) if row in TWO_RANKS else row) for row in itertools.islice(rows, count)]
    tally = {row: [0, 0, 0] for row, _ in todo}
    rng.shuffle(todo)
    start([*SMALL, "--cold-start-steps", "60", "--steps", "0", "--output-dir", str(folder), "--name", "cold"]
          ).communicate()
    with reference_server(folder / "cold" / "final") as server:
        arguments = [*KILLED_RUN, "--model", str(folder / "cold" / "final"), "--reference-url", server.url,
                     "--output-dir", str(folder), "--steps"]
        unproved: list[str] = []  # rows of kills after which no step has been done yet
        for number in itertools.count():
            marks, before = folder / f"marks-{number}", newest_step(run)
            server.marks = marks
            # The first process only starts the run, the last one only ends it.
            row, phase = ("", "checkpoint") if number == 0 else todo[-1] if todo else ("", "")
            last = before + SAVE_EVERY if phase in ("final/", "") else 100_000
            process = resumed([*arguments, str(last)], marks, 2 if row in TWO_RANKS else 1)
            try:
                observed = phase and kill_in(phase, row, process, marks, rng)
                process.join(150)
                assert phase or process.exitcode == 0, "the run did not end"
                check_whole(run)
                assert before <= newest_step(run)
                if any(x[0] == "step" and x[2] < math.inf for x in spans(marks)):  # it has gone on
                    told = marks.with_suffix(".log").read_text()
                    assert not before or f"resumed after step {before} " in told, told
                    for proved in unproved:
                        tally[proved][2] += 1
                    unproved.clear()
            except Exception as error:  # noqa: BLE001  whatever it is, the run has not survived
                print(f"kill {number} ({row}, {phase}): {type(error).__name__}: {error}", flush=True)
                phase = ""
            finally:
                if process.is_alive():
                    kill_all([process.pid, *ranks_of(marks)])
            if not phase:
                return tally
            if row:
                print(f"{row}: {phase} {'observed' if observed else 'over'}", file=sys.stderr, flush=True)
                tally[row][0] += 1
                tally[row][1] += observed
                unproved.append(row)
                if observed:
                    todo.pop()


# ---- Other faults ------------------------------------------------------------------------------------------


def start(arguments: list[str], small_disk: bool = False, ordinary_user: bool = False) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *arguments]
    if small_disk:  # no file may be over 1 MiB (2048 blocks): metrics fit, weights don't
        command = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *command]
    if ordinary_user and os.geteuid() == 0:  # root may write everywhere, unless it gives that up
        command = ["setpriv", "--bounding-set", "-dac_override", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_step(process: subprocess.Popen) -> None:
    """Read the output up to the first step's line."""
    for line in process.stdout:
        if line.startswith("step ") and "/" in line.split()[1]:
            return


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
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}  # of the runs
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--marked"]:
        run_marked(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    count = parser.parse_args().kills
    transformers.utils.logging.disable_progress_bar()  # one for each model that is checked
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tally = kills(count, folder)
        print(f"{'kill -9 during':<34}{'kills':>6}{'observed':>10}{'survived':>10}")
        for row, numbers in [*tally.items(), ("in all", map(sum, zip(*tally.values())))]:
            print(f"{row:<34}{{:>6}}{{:>10}}{{:>10}}".format(*numbers), flush=True)
        print(f"\n{'fault':<34}{'tried':>6}{'survived':>10}  what was seen", flush=True)
        for fault, tried, attempt in (
            ("Ctrl-C (SIGINT)", 1, lambda: signalled(signal.SIGINT, 130, folder)),
            ("SIGTERM", 1, lambda: signalled(signal.SIGTERM, 143, folder)),
            ("disk full (file size limit)", 1, lambda: full_disk(folder)),
            ("no permission to write", 2, lambda: no_permission(folder)),
        ):
            survived, seen = attempt()
            print(f"{fault:<34}{tried:>6}{survived:>10}  {seen}", flush=True)


if __name__ == "__main__":
    main()
