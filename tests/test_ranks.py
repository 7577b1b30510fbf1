"""Several ranks: three and two processes on CPUs train what one process trains, parts and whole runs.

Ranks are forked from a server that has imported everything once, and what they did is read from their files;
one test starts torchrun itself.
Gradients of `EXACT` are multiples of 2^-12, whose sums are exact in any order: there every bit must agree.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import data
import grpo_scratch as g
import memory

SHAPES = [(300, 40), (97, 64), (5000,), (70, 70), (50,), (33,), (10,)]
STEPS, SAVED_AFTER, LR = 10, 6, 1e-3
HYPER = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
EXACT, ROUGH, OFFLOADED, FLOAT32 = "exact", "rough", "offloaded", "float32"


def start_weights(kind):
    torch.manual_seed(1)
    weights = [torch.randn(shape) * 0.02 for shape in SHAPES]
    return weights if kind == FLOAT32 else [w.bfloat16() for w in weights]


def lessons_of(kind, step):
    """Gradients by parameter of each of a step's lessons, and the lessons' sizes. The last parameter is never
    used, the one before it by the first lesson only; at step 3 one lesson is all there is."""
    torch.manual_seed(100 + step)
    lessons = []
    for i in range(1 if step == 3 else 7):
        used = len(SHAPES) - (1 if i == 0 else 2)
        grads = [torch.randn(shape) if kind == ROUGH else torch.randint(-999, 1000, shape) * 2.0**-12
                 for shape in SHAPES[:used]]
        lessons.append(grads + [None] * (len(SHAPES) - used))
    return lessons, torch.randint(1, 90, (len(lessons),)).tolist()


def accumulate(params, lessons):
    for grads in lessons:
        for p, grad in zip(params, grads):
            if grad is not None:
                p.grad = grad.clone() if p.grad is None else p.grad + grad


def parameters(weights):
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    memory.sum_gradients_in_fp32(params)
    return params


def train(optimizer, params, kind, steps, clip=1.0):
    """One rank's part of these steps, as the loop does it; returns the gradients' norms."""
    norms = []
    for step in steps:
        accumulate(params, memory.share(*lessons_of(kind, step)))
        norms.append(optimizer.sum_gradients(clip).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms


def library(kind, steps):
    """(float32 weights, gradients' norms) of the library's optimizer in one process, on float32 masters."""
    params = [torch.nn.Parameter(w.float()) for w in start_weights(kind)]
    optimizer, norms = bitsandbytes.optim.AdamW8bit(params, **HYPER), []
    for step in steps:
        accumulate(params, lessons_of(kind, step)[0])
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [p.data for p in params], norms


def nbytes(state):
    parts = ("remainder", "state1", "state2", "absmax1", "absmax2")
    return sum(state[part].nbytes for part in parts if part in state)


def held(optimizer, params):
    """What a rank has; the whole state at rank 0."""
    return {"weights": [p.data for p in params], "optimizer": optimizer.state_dict(),
            "bytes": [nbytes(optimizer.state.get(p, {})) for p in params]}


def masters(weights, saved):
    """The float32 weights; `saved` is a state dict, which has their lower halves where there are any."""
    lower = {i: state["remainder"] for i, state in saved["state"].items() if "remainder" in state}
    return [memory.join_fp32(w, lower[i]) if i in lower else w.float() for i, w in enumerate(weights)]


def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and bool((x.view(-1) == y.view(-1)).all())


# --- what the ranks do ------------------------------------------------------------------------------------


class Awkward(Exception):
    """Can be pickled, but not made again from its pickle."""

    def __init__(self, what, why):
        super().__init__(f"{what} because {why}")


def gather_with(error):
    """What a rank sees of a gather in which rank 1 raises this error."""

    def attempt():
        if memory.my_rank()[0] == 1:
            raise error
        return []

    try:
        return memory.gather(attempt)
    except (ValueError, OSError, RuntimeError, Awkward) as seen:
        return type(seen).__name__, str(seen)


def work(folder: Path) -> None:
    """What a rank does and writes down; two ranks also go on from where three have saved."""
    rank, ranks = memory.my_rank()
    done = {}
    for kind in (EXACT, ROUGH, OFFLOADED, FLOAT32):
        params = parameters(start_weights(kind))
        optimizer = memory.AdamW8bit(params, **HYPER, offload=kind == OFFLOADED)
        norms = train(optimizer, params, kind, range(SAVED_AFTER))
        saved = {"weights": [p.data.clone() for p in params], "optimizer": optimizer.state_dict()}
        if rank == 0:
            torch.save(saved, folder / f"{ranks}-saved-{kind}.pt")
        norms += train(optimizer, params, kind, range(SAVED_AFTER, STEPS))
        done[kind] = {"norms": norms, **held(optimizer, params)}
        if ranks == 2:
            saved = torch.load(folder / f"3-saved-{kind}.pt", weights_only=True)
            params = parameters(saved["weights"])
            optimizer = memory.AdamW8bit(params, lr=1.0, offload=kind == OFFLOADED)
            optimizer.load_state_dict(saved["optimizer"])
            train(optimizer, params, kind, range(SAVED_AFTER, STEPS))
            done[kind]["resumed"] = held(optimizer, params)

    done["gathered"] = memory.gather(lambda: [(rank, i) for i in range(rank)])
    done["errors"] = [gather_with(error) for error in (
        memory.DoesNotFit("no room on rank 1"), Awkward("it rains", "of clouds"), OSError(28, "disk full"))]
    done["went on"] = memory.gather(lambda: [rank])
    accumulate(params, lessons_of(EXACT, 0)[0])
    try:
        optimizer.step()
    except RuntimeError as error:
        done["unsummed"] = str(error)
    torch.save(done, folder / f"{ranks}-{rank}.pt")


# --- the tests ---------------------------------------------------------------------------------------------


server = multiprocessing.get_context("forkserver")


def as_rank(what, rank, ranks, folder):
    """What a forked process does: join the others, do it, and write down what it says."""
    sys.stdout = sys.stderr = (folder / f"said-by-{rank}-of-{ranks}").open("w")
    torch.set_num_threads(1)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)  # as torchrun would
    dist.init_process_group("gloo", f"file://{folder}/join-{ranks}", rank=rank, world_size=ranks)
    what(folder)
    dist.destroy_process_group()


def together(what, ranks, folder):
    """Have so many ranks do what(folder); returns their exit codes and, in one piece, what they said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server needs it, once
        server.set_forkserver_preload([__name__, "matplotlib.figure"])
        processes = [server.Process(target=as_rank, args=(what, r, ranks, folder)) for r in range(ranks)]
        for process in processes:
            process.start()
    deadline = time.monotonic() + 200
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()  # unless it has ended
        process.join()
    said = "".join(path.read_text() for path in sorted(folder.glob(f"said-by-*-of-{ranks}")))
    return [process.exitcode for process in processes], said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where three ranks and then two wrote what they did."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (3, 2):
        codes, said = together(work_and_runs, ranks, folder)
        assert codes == [0] * ranks, said[-3000:]
    return folder


@pytest.fixture(scope="module")
def of_ranks(folder):
    """What each of two and each of three ranks wrote."""
    return [[torch.load(folder / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]
            for ranks in (2, 3)]


@pytest.mark.parametrize("kind", [EXACT, ROUGH, OFFLOADED, FLOAT32])
def test_all_ranks_have_the_same_weights(of_ranks, kind):
    for done in of_ranks:
        for other in done[1:]:
            assert all(same(w, v) for w, v in zip(done[0][kind]["weights"], other[kind]["weights"]))
            assert other[kind]["norms"] == done[0][kind]["norms"]


@pytest.mark.parametrize("kind", [EXACT, OFFLOADED, FLOAT32])
def test_ranks_train_what_one_process_trains_bit_for_bit(of_ranks, kind):
    expected, norms = library(kind, range(STEPS))
    for done in of_ranks:
        first = done[0][kind]
        assert first["norms"] == norms
        assert all(map(same, masters(first["weights"], first["optimizer"]), expected))


def test_gradients_that_round_differ_by_the_rounding_of_their_sums_only(of_ranks):
    expected, norms = library(ROUGH, range(STEPS))
    for done in of_ranks:
        first = done[0][ROUGH]
        assert first["norms"] == pytest.approx(norms, rel=1e-6)
        off = torch.cat([(x - y).abs().view(-1)
                         for x, y in zip(masters(first["weights"], first["optimizer"]), expected)])
        # A last bit may move a moment into the next of its 256 steps; even so no step is turned around.
        assert off.max() < 0.1 * LR
        assert (off < 1e-3 * LR).float().mean() > 0.999


def test_rank_0_has_the_state_of_one_process(of_ranks):
    params = parameters(start_weights(EXACT))
    optimizer = memory.AdamW8bit(params, **HYPER)
    train(optimizer, params, EXACT, range(STEPS))
    expected = optimizer.state_dict()
    for done in of_ranks:
        found = done[0][EXACT]["optimizer"]
        assert found["param_groups"] == expected["param_groups"]
        assert list(found["state"]) == list(expected["state"])
        for i, state in expected["state"].items():
            assert list(found["state"][i]) == list(state)
            for key, x in state.items():
                y = found["state"][i][key]
                assert same(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("kind", [EXACT, OFFLOADED, FLOAT32])
def test_what_three_ranks_saved_one_and_two_go_on_with(folder, of_ranks, kind):
    expected, _ = library(kind, range(STEPS))
    saved = torch.load(folder / f"3-saved-{kind}.pt", weights_only=True)
    params = parameters(saved["weights"])
    optimizer = memory.AdamW8bit(params, lr=1.0)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, params, kind, range(SAVED_AFTER, STEPS))
    assert all(map(same, masters([p.data for p in params], optimizer.state_dict()), expected))

    two = [done[kind]["resumed"] for done in of_ranks[0]]
    assert all(map(same, masters(two[0]["weights"], two[0]["optimizer"]), expected))
    assert all(map(same, two[0]["weights"], two[1]["weights"]))


@pytest.mark.parametrize("kind", [EXACT, OFFLOADED, FLOAT32])
def test_a_rank_holds_its_share_of_the_state_and_no_more(of_ranks, kind):
    resumed = [{kind: rank[kind]["resumed"]} for rank in of_ranks[0]]
    for done in (*of_ranks, resumed):
        by_parameter = list(zip(*(rank[kind]["bytes"] for rank in done)))
        assert all(sum(x > 0 for x in held) == 1 for held in by_parameter)  # one owner each
        total, largest = sum(map(sum, by_parameter)), max(map(max, by_parameter))
        assert all(sum(rank[kind]["bytes"]) <= total / len(done) + largest for rank in done)


def test_lists_come_together_in_the_order_of_the_ranks(of_ranks):
    two, three = of_ranks
    assert [done["gathered"] for done in two] == [[(1, 0)]] * 2
    assert [done["gathered"] for done in three] == [[(1, 0), (2, 0), (2, 1)]] * 3


def test_an_error_on_one_rank_is_raised_on_all_of_them_and_they_can_go_on(of_ranks):
    for done in of_ranks:
        for i, rank in enumerate(done):
            assert rank["errors"] == [
                ("DoesNotFit", "no room on rank 1"),
                ("Awkward", "it rains because of clouds") if i == 1
                else ("RuntimeError", "Awkward: it rains because of clouds"),
                ("OSError", "[Errno 28] disk full"),
            ]
            assert rank["went on"] == list(range(len(done)))


def test_a_step_on_gradients_that_were_not_summed_is_refused(of_ranks):
    assert all("sum_gradients" in rank["unsummed"] for done in of_ranks for rank in done)


def each_rank(ranks, what):
    """what() as each of so many ranks would see it."""
    with pytest.MonkeyPatch.context() as patch:
        made = []
        for rank in range(ranks):
            patch.setattr(memory, "my_rank", lambda rank=rank: (rank, ranks))
            made.append(what())
        return made


@settings(deadline=None)
@given(st.lists(st.integers(1, 2000), max_size=60), st.integers(1, 9))
def test_shares_are_all_lessons_once_in_order_and_of_equal_size_to_within_one(sizes, ranks):
    items = list(enumerate(sizes))
    shares = each_rank(ranks, lambda: memory.share(items, sizes))
    assert list(chain(*shares)) == items
    for mine in shares:
        assert abs(sum(size for _, size in mine) - sum(sizes) / ranks) <= max(sizes, default=0)


@given(st.integers(0, 60), st.integers(1, 9))
def test_shares_of_equal_items_differ_by_one_at_most(count, ranks):
    parts = each_rank(ranks, lambda: memory.share(range(count), [1] * count))
    assert list(chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 9))
def test_owners_hold_equal_parts_to_within_the_largest_parameter(sizes, ranks):
    owner = memory.owners(sizes, ranks)
    held = [sum(n for n, o in zip(sizes, owner) if o == rank) for rank in range(ranks)]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= max(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("offload", [False, True])
def test_the_plan_counts_the_state_of_the_rank_that_holds_most(ranks, offload):
    config = Qwen2Config(vocab_size=500, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config).bfloat16()

    def bytes_held():
        optimizer = memory.AdamW8bit(model.parameters(), lr=0.0, offload=offload)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if optimizer.owner[p] == optimizer.rank else None
        bitsandbytes.optim.AdamW8bit.step(optimizer)  # without the exchange among ranks
        return sum(map(nbytes, optimizer.state.values()))

    planned = memory.plan(
        config, prompt_tokens=20, max_new_tokens=20, prompts=4, group_size=4, dtype=torch.bfloat16,
        memory_budget_bytes=10**12, offload_optimizer=offload, ranks=ranks,
    )
    state = planned.host_bytes if offload else planned.optimizer
    assert state == max(each_rank(ranks, bytes_held))


def test_alone_nothing_is_shared_and_the_norm_is_torchs_own():
    assert memory.gather(lambda: [1, 2]) == memory.share([1, 2], [5, 9]) == [1, 2]
    params, plain = parameters(start_weights(ROUGH)), parameters(start_weights(ROUGH))
    for ps in (params, plain):
        accumulate(ps, lessons_of(ROUGH, 0)[0])
    norm = memory.AdamW8bit(params, **HYPER).sum_gradients(0.3)
    assert same(norm, torch.nn.utils.clip_grad_norm_(plain, 0.3))
    assert all(same(p.grad, q.grad) for p, q in zip(params, plain) if q.grad is not None)


# ------------------------------------------------------------------------------------------------------------
# Whole runs

SCRIPT = Path(g.__file__)
SMALL = {"model": "embedded", "task": "mini-countdown", "prompt_format": None, "device": "cpu",
         "memory_budget_gib": 1.0, "cold_start_steps": 0, "prompts_per_step": 5, "group_size": 4,
         "max_new_tokens": 10, "eval_examples": 5, "eval_every": 0, "save_every": 1, "keep_checkpoints": 0,
         "skip_truncated": False, "learning_rate": 5e-4}
ALGORITHMS = ("tiny", "improved", "lm-book")


def length_reward(folder):
    """A reward with spread in every group, in a file as a user would bring it."""
    path = folder / "length_reward.py"
    path.write_text("def length(completion, example):\n    return len(completion) % 7 / 6\n")
    return [f"{path}:length"]


def run_of(folder, algorithm, ranks, **changes):
    settings = {**SMALL, "reward": length_reward(folder), "output_dir": str(folder), "steps": 1,
                "name": f"{algorithm}-{ranks}", **changes}
    return g.make_config(algorithm, **settings)


def work_and_runs(folder):
    """`work`; a step of each algorithm, ten of one, and one more from a checkpoint of three ranks."""
    ranks = memory.my_rank()[1]
    slices, memory.OPTIMIZER_SLICE = memory.OPTIMIZER_SLICE, 2048  # several a parameter, the last not full
    work(folder)
    memory.OPTIMIZER_SLICE = slices  # whole runs would take ten times as long in such small ones
    for algorithm in ALGORITHMS:
        with pytest.MonkeyPatch.context() as patch:
            changes = {}
            if algorithm == "improved":  # saved by time, which has come on the last rank only
                changes = {"save_every": 0, "save_minutes": 1e4}
                fast = SimpleNamespace(strftime=time.strftime, monotonic=lambda: 1e9 * time.monotonic())
                patch.setattr(g, "time", fast if memory.my_rank()[0] == ranks - 1 else time)
            g.train(run_of(folder, algorithm, ranks, **changes))
    if ranks == 3:
        run = g.open_run(run_of(folder, "tiny", "ten"))
        g.start(run)
        for _ in range(10):
            g.grpo_step(run)
        weights = [p.data for p in run.policy.model.parameters()]
        torch.save(weights, folder / f"ten-{dist.get_rank()}.pt")
    else:
        dist.barrier()
        g.train(resumed(folder, "tiny-3"))


def resumed(folder, name):
    return g.parse_command_line(["--resume", str(folder / name / "checkpoint-1"), "--steps", "2",
                                 "--reward", *length_reward(folder)])


def metrics_of(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def weights_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def alike(a, b):
    """All figures of two steps' metrics, but for timings, to float32's rounding."""
    told = ("reward", "accuracy", "completion_length", "entropy", "loss", "kl", "grad_norm", "groups_drawn")
    return all(a[name] == (b[name] and pytest.approx(b[name], rel=1e-4, abs=1e-6)) for name in told)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_step_of_two_and_three_ranks_is_that_of_one(folder, algorithm):
    g.train(run_of(folder, algorithm, 1))
    one = folder / f"{algorithm}-1"
    for ranks in (2, 3):
        several = folder / f"{algorithm}-{ranks}"
        samples = [[line for line in (run / "samples.jsonl").read_text().splitlines() if '"step": 1,' in line]
                   for run in (one, several)]
        assert samples[0] == samples[1] and len(samples[0]) == 8
        assert alike(metrics_of(folder, one.name)[0], metrics_of(folder, several.name)[0])
        assert data.best_evaluation(one) == data.best_evaluation(several)
        before, after = weights_in(one / "checkpoint-1"), weights_in(several / "checkpoint-1")
        apart = torch.cat([(before[k] - after[k]).abs().flatten() for k in before])
        # Adam's first step makes a whole step of gradients near zero, whatever their sign.
        assert apart.max() <= 2.1 * SMALL["learning_rate"] * (3 if algorithm == "lm-book" else 1)
        assert (apart < 0.02 * SMALL["learning_rate"]).float().mean() > 0.99


def test_after_ten_steps_all_ranks_have_the_same_weights(folder):
    first, *others = (torch.load(folder / f"ten-{rank}.pt") for rank in range(3))
    assert all(same(a, b) for other in others for a, b in zip(first, other))


def test_what_three_ranks_saved_goes_on_with_one_as_with_two(folder):
    with_two = metrics_of(folder, "tiny-3")
    assert [m["step"] for m in with_two] == [1, 2]  # the workers have gone on already
    g.train(resumed(folder, "tiny-3"))
    assert alike(with_two[1], metrics_of(folder, "tiny-3")[1])


def test_all_ranks_save_when_the_time_has_come_on_one(folder):
    for ranks in (2, 3):
        assert [c.name for c in data.checkpoints(folder / f"improved-{ranks}")] == ["checkpoint-1"]


def test_other_ranks_do_not_look_at_best_while_the_first_one_replaces_it(monkeypatch, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / data.EVALUATION).write_text('{"accuracy": 0.')
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    data.save_best(None, tmp_path, {"accuracy": 0.5, "step": 3})  # it would fail at half a line
    assert [p.name for p in (tmp_path / "best").iterdir()] == [data.EVALUATION]


def endless(folder, *flags):
    """The command line of a run that goes on until something ends it."""
    return ["--recipe", "tiny", "--device", "cpu", "--memory-budget-gib", "1", "--cold-start-steps", "0",
            "--steps", "9999", "--prompts-per-step", "4", "--group-size", "4", "--eval-examples", "4",
            "--output-dir", str(folder), "--name", "run", *flags]


def run_with_a_late_error(folder):
    sys.argv[1:] = endless(folder, "--reward", f"{folder}/own.py:late", "--save-every", "0")
    g.main()


def test_a_reward_that_raises_on_one_rank_ends_all_with_its_message_once_and_the_steps_saved(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os\ncalls = []\ndef late(completion, example):\n    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) > 22:\n        raise KeyError('of rank 1')\n"
        "    return len(completion) % 7 / 6\n")
    codes, said = together(run_with_a_late_error, 2, tmp_path)
    assert codes == [2, 2]
    assert said.count("error: reward 'own.late' raised KeyError('of rank 1')") == 1
    saved = data.checkpoints(tmp_path / "run")  # 2 of 4 held-out answers, then 8 a step
    assert [data.step_of(path) for path in saved] == ["2"]


def run_whose_reference_goes_away(folder):
    real, asked = memory.ReferencePolicy.__call__, []

    def on_rank_1_only_twice(self, sequences):
        asked.append(1)
        if memory.my_rank()[0] == 1 and len(asked) > 2:
            raise memory.NoReference("the reference server is away")
        return real(self, sequences)

    memory.ReferencePolicy.__call__ = on_rank_1_only_twice
    sys.argv[1:] = endless(folder, "--beta", "0.1", "--save-every", "0")
    g.main()


def test_a_reference_that_goes_away_from_one_rank_ends_all_with_the_steps_saved(tmp_path):
    codes, said = together(run_whose_reference_goes_away, 2, tmp_path)
    assert codes == [2, 2]
    assert said.count("error: the reference server is away") == 1
    assert [data.step_of(path) for path in data.checkpoints(tmp_path / "run")] == ["2"]


def test_torchrun_starts_goes_on_after_a_rank_was_killed_and_a_stop_saves(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--max-restarts=1", SCRIPT, *endless(tmp_path, "--save-every", "1", "--resume", "latest")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90",
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # else restarted ranks look for those that are gone
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    told = []

    def until(words):
        for line in process.stdout:
            told.append(line)
            if line.startswith(words):
                return line
        raise AssertionError("".join(told)[-3000:])

    too_late = threading.Timer(200, process.terminate)
    too_late.start()
    try:
        until("step 2/")
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
        resumed_after = int(until("resumed after step ").split()[3])
        until(f"step {resumed_after + 1}/")
    finally:
        process.terminate()  # SIGTERM
        too_late.cancel()
        process.communicate(timeout=100)
    assert process.returncode != 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped_by"] == signal.SIGTERM and summary["steps"] > resumed_after >= 1
    assert data.step_of(data.checkpoints(tmp_path / "run")[-1]) == str(summary["steps"])
    assert [m["step"] for m in metrics_of(tmp_path, "run")] == list(range(1, summary["steps"] + 1))


def test_more_ranks_than_prompts_and_ranks_that_differ_are_refused(monkeypatch, tmp_path):
    config = run_of(tmp_path, "tiny", 0, prompts_per_step=2)
    monkeypatch.setattr(memory, "my_rank", lambda: (0, 3))
    monkeypatch.setattr(memory, "gather", lambda attempt: attempt() * 3)
    with pytest.raises(data.InputError, match="--prompts-per-step 2: 3 ranks need at least as many"):
        g.open_run(config)
    monkeypatch.setattr(memory, "gather", lambda attempt: [*attempt(), {"seed": 1}])
    with pytest.raises(data.InputError, match="different settings"):
        g.open_run(config)
