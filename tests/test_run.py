"""Whole runs: what is printed, what is on disk, what is refused."""

import dataclasses
import datetime
import fcntl
import gc
import io
import json
import multiprocessing
import os
import platform
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_policy

import data
import grpo_scratch as g
import memory

SCRIPT = Path(g.__file__)
METRICS = {
    "step", "reward", "accuracy", "completion_length", "truncated_fraction", "groups_without_spread",
    "entropy", "loss", "kl", "clip_fraction", "grad_norm", "bad_updates", "groups_drawn", "groups_kept",
    "sampler_gap", "importance", "importance_capped", "learning_rate", "skipped", "scoring_seconds",
    "sampling_tokens_per_second", "update_tokens_per_second", "seconds", "peak_memory_bytes",
}
TIMED = {"seconds", "scoring_seconds", "sampling_tokens_per_second", "update_tokens_per_second",
         "peak_memory_bytes"}


def quick(tmp_path, name="run", recipe="tiny", **overrides):
    """A recipe made small enough to run in a second or two."""
    settings = {
        "steps": 2, "cold_start_steps": 0, "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 10,
        "eval_examples": 4, "output_dir": str(tmp_path), "name": name, "device": "cpu", "save_every": 0,
        **overrides,
    }
    return g.make_config(recipe, **settings)


def endless_run(tmp_path, *flags, stderr=subprocess.PIPE):
    """A run in a process of its own, to be stopped from outside."""
    command = [sys.executable, SCRIPT, "--recipe", "tiny", "--device", "cpu", "--cold-start-steps", "0",
               "--steps", "9999", "--eval-examples", "4", "--output-dir", str(tmp_path), "--name", "run",
               *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def own_task(tmp_path):
    """A jsonl task and a reward file as a user would bring them: answers should be long and hold many a's."""
    (tmp_path / "task.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Write {i} a's:", "n": i}) + "\n" for i in range(12))
    )
    (tmp_path / "my_rewards.py").write_text(
        "def many(completion, example):\n"
        "    return completion.count('a') + 0.01 * len(completion) + 0 * example['n']\n"
        "def broken(completion, example):\n    return 1 / 0\n"
        "def nothing(completion, example):\n    return float('nan')\n"
        "def same(completion, example):\n    return 0.5\n"
        "def words(completion, example):\n    return 'much'\n"
    )
    return {"task": str(tmp_path / "task.jsonl"), "reward": [f"{tmp_path}/my_rewards.py:many"]}


def test_two_steps_on_a_local_model_with_an_own_task_and_reward(tmp_path, qwen2_folder, own_task):
    command = [sys.executable, SCRIPT, "--recipe", "improved", "--device", "cpu", "--model",
               str(qwen2_folder), "--steps", "2", "--task", own_task["task"], "--reward", *own_task["reward"],
               "--prompts-per-step", "3", "--group-size", "4", "--max-new-tokens", "8",
               "--skip-truncated", "false", "--eval-examples", "3", "--eval-every", "1",
               "--eval-samples", "2", "--save-every", "1", "--output-dir", str(tmp_path), "--name", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mine"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoint-1", "checkpoint-2",
        "final", "best", "summary.json"}

    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert all(set(m) == METRICS | {"reward/my_rewards.many"} for m in metrics)
    assert all(m["kl"] is not None and m["grad_norm"] > 0 for m in metrics)  # improved has a reference
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "recipe", "accuracy_before", "accuracy_after", "steps", "seconds", "peak_memory_bytes"
    } <= set(summary)
    assert summary["recipe"] == "improved" and 0 <= summary["pass_at_k_after"] <= 1
    assert json.loads((folder / "config.json").read_text())["group_size"] == 4
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == 2 * 2 * 4 and set(samples[0]) >= {"step", "completion", "reward", "parts"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    for name in ("final", "checkpoint-1"):  # complete folders, trained away from where they began
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.decode(tokenizer("numbers 3 4").input_ids) == "numbers 3 4"
        assert any(
            (a != b).any()
            for a, b in zip(weights_of(folder / name).values(), weights_of(qwen2_folder).values())
        )
    state = torch.load(folder / "checkpoint-2" / "trainer_state" / "state.pt", weights_only=True)
    assert state["step"] == 2 and state["optimizer"]["state"] and state["reference"]

    # No terminal here: one plain line a step, no bars.
    assert "step 1/2 reward" in done.stdout and "step 2/2 reward" in done.stdout
    assert "\r" not in done.stdout + done.stderr and "%|" not in done.stdout + done.stderr
    for told in ("recipe improved on cpu", "M parameters", "3 held out", "before", "after",
                 "curves.png", "samples.jsonl", "final/", "peak"):
        assert told in done.stdout


def test_a_seed_repeats_a_cpu_run_bit_for_bit(tmp_path):
    for name in ("a", "b"):
        g.train(quick(tmp_path, name, cold_start_steps=3, beta=0.1, updates_per_batch=2))
    a, b = (weights_of(tmp_path / name / "final") for name in "ab")
    assert all((a[k] == b[k]).all() for k in a)
    a, b = (
        [{k: v for k, v in m.items() if k not in TIMED} for m in lines(tmp_path / name / "metrics.jsonl")]
        for name in "ab"
    )
    assert a == b
    assert (tmp_path / "a" / "samples.jsonl").read_text() == (tmp_path / "b" / "samples.jsonl").read_text()


@pytest.mark.parametrize("recipe", [name for name in g.RECIPES if name != "tiny"])
def test_every_recipes_algorithm_runs_on_the_embedded_model(tmp_path, recipe):
    buffer = 4 if recipe == "dapo" else 0  # its own is longer than these answers
    config = quick(tmp_path, recipe=recipe, model="embedded", task="mini-countdown", prompt_format=None,
                   skip_truncated=False, overlong_buffer=buffer,
                   reward=["countdown_format", "countdown_equation"])
    g.train(config)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(m["skipped"] is None or "nothing to learn" in m["skipped"] for m in metrics)
    assert all((m["kl"] is not None) == (config.beta > 0) for m in metrics if m["skipped"] is None)


def test_a_step_with_nothing_to_learn_says_so_and_changes_no_weight(tmp_path, own_task, qwen2_folder, capsys):
    same = [own_task["reward"][0].replace(":many", ":same")]
    g.train(quick(tmp_path, "even", model=str(qwen2_folder), task=own_task["task"], reward=same,
                  skip_truncated=False))
    g.train(
        quick(tmp_path, "cut", model=str(qwen2_folder), **own_task, skip_truncated=True, max_new_tokens=1)
    )
    told = {
        "even": "nothing to learn: no group with spread", "cut": "nothing to learn: every answer truncated"
    }
    for name, words in told.items():
        assert lines(tmp_path / name / "metrics.jsonl")[0]["skipped"] == words
        before, after = weights_of(qwen2_folder), weights_of(tmp_path / name / "final")
        assert all((before[k] == after[k]).all() for k in before)
    assert "every answer truncated" in capsys.readouterr().out


def test_eval_only_evaluates_and_writes_nothing(tmp_path, qwen2_folder, capsys):
    result = g.train(quick(tmp_path, model=str(qwen2_folder), eval_only=True, eval_samples=3))
    assert "pass@3" in capsys.readouterr().out
    assert result["accuracy"] == 0.0 and 0 <= result["pass_at_k"] <= 1  # random weights solve nothing
    assert not (tmp_path / "run").exists()
    # What would not do for training does for an evaluation.
    tight = {"model": str(qwen2_folder), "memory_budget_gib": 0.008}
    with pytest.raises(g.memory.DoesNotFit):
        g.train(quick(tmp_path, **tight))
    g.train(quick(tmp_path, eval_only=True, **tight))


def test_pass_at_k_draws_from_its_own_random_numbers(tmp_path):
    for name, samples in (("a", 0), ("b", 3)):
        g.train(quick(tmp_path, name, eval_samples=samples, eval_every=1))
    assert (tmp_path / "a" / "samples.jsonl").read_text() == (tmp_path / "b" / "samples.jsonl").read_text()


def test_a_model_without_a_chat_template_is_warned_about(tmp_path, capsys):
    model, tokenizer = tiny_policy(0)
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    g.train(quick(tmp_path, model=str(tmp_path / "m"), steps=0, max_new_tokens=4))
    assert "has no chat template" in capsys.readouterr().err


def test_cold_start_teaches_the_demonstrations(tmp_path):
    summary = g.train(
        quick(tmp_path, cold_start_steps=60, cold_start_lr=3e-3, steps=0, max_new_tokens=24, eval_examples=20)
    )
    assert summary["accuracy_before"] == summary["accuracy_after"]
    again = g.train(
        quick(tmp_path, "again", model=str(tmp_path / "run" / "final"), steps=1, max_new_tokens=24)
    )
    assert again["steps"] == 1
    assert lines(tmp_path / "again" / "metrics.jsonl")[0]["reward/countdown_format"] > 0.5


BAD = {
    "unknown recipe": (["--recipe", "nano"], "use auto or one of tiny, improved"),
    "unknown task": (["--task", "sudoku"], "use countdown, gsm8k"),
    "unknown reward": (["--reward", "countdown_equatoin"], "'countdown_equatoin' is no reward; type one of"),
    "unknown dtype": (["--dtype", "float16"], "invalid choice"),
    "unknown flag": (["--group-sise", "8"], "unrecognized arguments: --group-sise 8; see"),
    "no number": (["--steps", "many"], "invalid int value: 'many'"),
    "group of one": (["--group-size", "1"], "--group-size 1: must be at least 2"),
    "missing file": (["--task", "gone.jsonl"], "gone.jsonl: no such file"),
    "missing model": (["--model", "./gone"], "./gone: no such file or folder"),
    "hub without network": (["--model", "nobody/nothing"], "the id and the network for the hub"),
    "prompt over the context": (["--max-new-tokens", "5000"], "exceed the model's context of 1024"),
    "too little memory": (["--memory-budget-gib", "0.0001"], "try"),
    "cuda without cuda": (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_exit_2_and_no_files(case, tmp_path, monkeypatch, capsys):
    arguments, told = BAD[case]
    if case == "cuda without cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    base = ["--device", "cpu"] if "--device" not in arguments else []
    recipe = [] if "--recipe" in arguments else ["--recipe", "tiny"]
    monkeypatch.setattr(
        sys, "argv", ["grpo_scratch.py", *recipe, "--output-dir", str(tmp_path / "runs"), *base, *arguments]
    )
    with pytest.raises(SystemExit) as stop:
        g.main()
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert told in error[-1] and error[-1].startswith("error: ") and len(error) == 1, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("function, told", [
    ("broken", "'my_rewards.broken' raised ZeroDivisionError"),
    ("nothing", "'my_rewards.nothing' returned nan"), ("words", "'my_rewards.words' returned 'much'"),
    ("gone", "has no 'gone'; functions: "),
])
def test_a_bad_custom_reward_is_named_and_nothing_is_written(
    function, told, tmp_path, own_task, monkeypatch, capsys
):
    reward = own_task["reward"][0].replace(":many", f":{function}")
    monkeypatch.setattr(sys, "argv", [
        "grpo_scratch.py", "--recipe", "tiny", "--device", "cpu", "--task", own_task["task"], "--reward",
        reward, "--cold-start-steps", "0", "--eval-examples", "2", "--output-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stop:
        g.main()
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("sampler", ["own", "vllm"])
def test_a_window_shorter_than_prompt_and_answer_is_refused_before_any_weight_is_read(
    sampler, tmp_path, qwen2_folder
):
    shutil.copytree(qwen2_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    layers = ["sliding_attention"] * settings["num_hidden_layers"]
    path.write_text(json.dumps({**settings, "use_sliding_window": True, "sliding_window": 12,
                                "layer_types": layers}))
    with pytest.raises(g.InputError, match="window 12"):
        g.open_run(quick(tmp_path, model=str(tmp_path / "model"), sampler=sampler))


@pytest.mark.parametrize("rank, pauses", [(None, []), ("0", []), ("1", [3])])
def test_memory_that_runs_out_for_good_ends_with_one_line_which_the_first_rank_tells_first(
    rank, pauses, monkeypatch, capsys
):
    def out_of_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(g, "train", out_of_memory)
    monkeypatch.setattr(sys, "argv", ["grpo_scratch.py", "--recipe", "tiny"])
    if rank:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as stop:
        g.main()
    assert stop.value.code == 2 and slept == pauses
    assert capsys.readouterr().err == "error: CUDA out of memory. Tried to allocate 2.00 GiB\n"


def test_an_error_that_is_nobodys_mistake_is_not_hidden(monkeypatch):
    def broken(config):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(g, "train", broken)
    monkeypatch.setattr(sys, "argv", ["grpo_scratch.py", "--recipe", "tiny"])
    with pytest.raises(RuntimeError, match="shapes differ"):
        g.main()


def test_a_run_never_overwrites_another(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(g.InputError, match="exists already"):
        g.train(quick(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# What happens when things go wrong


@pytest.mark.parametrize("settings", [
    {"lr_schedule": "linear"},
    {"beta": 0.1, "reference_every": 3, "updates_per_batch": 2, "clip_low": 0.1, "dtype": "bfloat16"},
    {"top_entropy": 0.2, "skip_truncated": False, "temperature": 0.7, "warmup_steps": 4},
])
def test_a_run_that_was_killed_and_resumed_ends_bit_identical(tmp_path, own_task, settings):
    """The killed run is a copy of the uninterrupted one's folder as it was between steps 3 and 4."""
    g.train(quick(tmp_path, "whole", steps=5, save_every=2, learning_rate=1e-3, **own_task, **settings))
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(killed / name)
    (killed / "summary.json").unlink()
    (killed / ".partial").mkdir()  # left behind by a kill in the middle of a save

    config = g.parse_command_line(["--resume", str(killed), "--reward", *own_task["reward"]])
    assert config.steps == 5 and config.beta == settings.get("beta", 0.0)  # taken over from the checkpoint
    g.train(config)
    a, b = ([{k: v for k, v in m.items() if k not in TIMED} for m in lines(tmp_path / run / "metrics.jsonl")]
            for run in ("whole", "killed"))
    assert a == b and len(a) == 5 and all(m["skipped"] is None for m in a)
    a, b = (weights_of(tmp_path / run / "final") for run in ("whole", "killed"))
    assert all((a[k] == b[k]).all() for k in a)
    a, b = (torch.load(tmp_path / run / "checkpoint-4" / "trainer_state" / "state.pt", weights_only=True)
            for run in ("whole", "killed"))
    assert len(a["optimizer"]["state"]) == len(b["optimizer"]["state"]) > 0
    for old, new in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()


def test_resume_refuses_what_contradicts_the_checkpoint_and_lists_what_may_change(tmp_path):
    g.train(quick(tmp_path, steps=1, save_every=1))
    resume = ["--resume", "latest", "--output-dir", str(tmp_path)]
    with pytest.raises(g.InputError, match="--group-size was 4, not 8.* These may change: .*steps"):
        g.parse_command_line([*resume, "--group-size", "8"])
    assert g.parse_command_line([*resume, "--steps", "3"]).steps == 3
    with pytest.raises(g.InputError, match="no whole checkpoint"):
        g.parse_command_line(["--resume", str(tmp_path / "nowhere")])
    (tmp_path / "run").rename(tmp_path / "lr[1e-5]")  # a name, and no pattern
    assert g.parse_command_line([*resume, "--name", "lr[1e-5]"]).resume.endswith("lr[1e-5]/checkpoint-1")
    assert g.parse_command_line([*resume, "--name", "lr*"]).resume == "latest"  # that run is a new one


def test_a_strangers_checkpoint_runs_no_code_unasked(tmp_path, own_task):
    (tmp_path / "my_rewards.py").write_text("def evil(completion, example):\n    return len(completion)\n")
    reward = [f"{tmp_path}/my_rewards.py:evil"]
    g.train(quick(tmp_path, steps=1, save_every=1, task=own_task["task"], reward=reward,
                  trust_remote_code=True))
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(g.InputError, match="the run's reward is code, .*my_rewards.py:evil; if you trust it"):
        g.parse_command_line(resume)
    state = tmp_path / "run" / "checkpoint-1" / "trainer_state" / "state.pt"
    saved = torch.load(state, weights_only=True)
    torch.save({**saved, "config": saved["config"] | {"reward": [f"{tmp_path}/my_rewards.py"]}}, state)
    with pytest.raises(g.InputError, match="the run's reward is code"):  # without a function too
        g.parse_command_line(resume)
    torch.save(saved, state)
    assert g.parse_command_line([*resume, "--ask", "x"]).reward == []  # left out
    config = g.parse_command_line([*resume, "--reward", *reward])
    assert config.trust_remote_code is False  # to be given anew, too
    torch.save({"config": subprocess.Popen}, state)  # a pickle that names code
    with pytest.raises(g.InputError, match="can't be read"):
        g.parse_command_line(resume)


def test_resume_from_within_a_checkpoint_and_with_what_does_not_suit_it(tmp_path, own_task, monkeypatch):
    g.train(quick(tmp_path, steps=1, save_every=1, **own_task))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    monkeypatch.chdir(checkpoint)
    config = g.parse_command_line(["--resume", ".", "--steps", "2", "--reward", *own_task["reward"]])
    assert Path(config.resume) == checkpoint
    with pytest.raises(g.InputError, match="doesn't suit this run .*dtype"):
        g.train(dataclasses.replace(config, dtype="bfloat16"))
    state_of = checkpoint / data.STATE
    state = torch.load(state_of, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "config"}, state_of)
    with pytest.raises(g.InputError, match="is not the state of a run, it has no config; use another"):
        g.parse_command_line(["--resume", "."])
    torch.save(state, state_of)
    assert g.train(config)["steps"] == 2 and (tmp_path / "run" / "final").exists()
    latest = g.parse_command_line(["--resume", "latest", "--output-dir", str(tmp_path), "--reward",
                                   *own_task["reward"], "--memory-budget-gib", "3", "--steps", "3"])
    assert Path(latest.resume).name == "checkpoint-2"
    state_of = tmp_path / "run" / "checkpoint-2" / data.STATE
    state = torch.load(state_of, weights_only=True)
    torch.save({**state, "limits": state["limits"] | {"max_rows": 1}}, state_of)  # memory had run out
    assert g.open_run(latest).limits.max_rows > 1  # for another budget it is planned anew
    latest = dataclasses.replace(latest, memory_budget_gib=None)
    assert g.open_run(latest).limits.max_rows == 1
    assert g.open_run(dataclasses.replace(latest, offload_optimizer=True)).limits.max_rows > 1


def test_a_run_in_a_thread_of_a_program_that_prints_nowhere(tmp_path, monkeypatch):
    """As in a notebook's worker: no signals; and with `>&-`, which gives None, or closed by the program."""
    closed = io.StringIO()
    closed.close()
    for name, stream in (("none", None), ("closed", closed)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            thread = threading.Thread(target=g.train, args=[quick(tmp_path, name, cold_start_steps=1)])
            thread.start()
            thread.join()
        assert json.loads((tmp_path / name / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("flags, last_line", [
    (["--cold-start-steps", "9999"], "cold start:"),
    (["--eval-examples", "600", "--max-new-tokens", "900"], "budget"),
])
def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path, flags, last_line):
    process = endless_run(tmp_path, *flags)
    for line in process.stdout:
        if line.startswith(last_line):
            break
    time.sleep(1)  # into the cold start, or the first evaluation
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "accuracy" not in out and "Traceback" not in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_format_is_kept_or_refused_and_never_dropped(monkeypatch, capsys):
    lm_book = ["--recipe", "lm-book", "--prompt-format", "gsm8k-reasoning"]  # which is its own
    assert g.parse_command_line(lm_book).prompt_format == "gsm8k-reasoning"
    for task, told in (("countdown", "with --task countdown, use one of countdown, mini-countdown"),
                       ("mine.jsonl", "a file's prompts are used as they stand; drop it")):
        with pytest.raises(g.InputError, match=f"--prompt-format gsm8k-reasoning: {told}"):
            g.parse_command_line([*lm_book, "--task", task])
        assert g.parse_command_line([*lm_book[:2], "--task", task]).prompt_format is None
    other = g.parse_command_line(["--recipe", "improved", "--prompt-format", "mini-countdown"])
    assert other.prompt_format == "mini-countdown"


def test_a_reader_that_has_gone_ends_no_run(tmp_path):
    """Ctrl-C ends `tee` as well as the run whose output it reads."""
    process = endless_run(tmp_path, "--prompts-per-step", "3", stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_by"] == signal.SIGINT
    assert data.checkpoints(tmp_path / "run")


def test_the_reference_follows_its_schedule(tmp_path, own_task):
    g.train(quick(tmp_path, steps=4, save_every=1, keep_checkpoints=0, beta=0.1, reference_every=3,
                  learning_rate=1e-3, **own_task))
    reference, policy = [], []
    for step in range(1, 5):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        saved = torch.load(folder / "trainer_state" / "state.pt", weights_only=True)["reference"]
        reference.append(saved["model.embed_tokens.weight"])
        policy.append(weights_of(folder)["model.embed_tokens.weight"])
    assert torch.equal(reference[0], reference[1]) and not torch.equal(reference[1], reference[2])
    assert torch.equal(reference[2], policy[2]) and torch.equal(reference[3], policy[2])
    assert not torch.equal(policy[3], policy[2])


def test_only_the_newest_checkpoints_are_kept(tmp_path, monkeypatch):
    real = data.save_checkpoint

    def save(policy, state, folder, keep):
        if state["step"] == 3:  # as if a kill had come while an old one was being removed
            (folder / ".checkpoint.old" / "half").mkdir(parents=True)
        real(policy, state, folder, keep)

    monkeypatch.setattr(data, "save_checkpoint", save)
    g.train(quick(tmp_path, steps=4, save_every=1, keep_checkpoints=2))
    folders = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert folders == {"checkpoint-3", "checkpoint-4", "best", "final"}


def test_resuming_an_older_checkpoint_sets_the_later_ones_aside(tmp_path):
    g.train(quick(tmp_path, steps=4, save_every=1, keep_checkpoints=0))
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "completion": "half a li')  # as a kill leaves it
    g.train(g.parse_command_line(["--resume", str(tmp_path / "run" / "checkpoint-2"), "--steps", "3"]))
    assert [c.name[-1] for c in data.checkpoints(tmp_path / "run")] == ["1", "2", "3"]
    assert len(list((tmp_path / "run").glob("left-checkpoint-*"))) == 2
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert {m["step"] for m in lines(tmp_path / "run" / "samples.jsonl")} == {1, 2, 3}


def accuracies(monkeypatch, *values):
    """Let the evaluations find these, one after the other."""
    values = iter(values)

    def evaluate(run):
        run.evaluations.append({"step": run.step, "accuracy": next(values), "pass_at_k": None})
        return run.evaluations[-1]

    monkeypatch.setattr(g, "evaluate", evaluate)


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_best_model_is_kept_and_told_at_every_evaluation(tmp_path, own_task, monkeypatch, capsys):
    accuracies(monkeypatch, 0.25, 0.5, 0.75, 0.5, 0.75, 0.0)  # before, then after each step, with a tie
    drawn, real = [], data.draw_curves
    monkeypatch.setattr(data, "draw_curves",
                        lambda metrics, *x: (drawn.append(len(metrics)), real(metrics, *x)))
    config = quick(tmp_path, steps=5, eval_every=1, save_every=1, keep_checkpoints=0, learning_rate=1e-2,
                   **own_task)
    summary = g.train(config)
    run, told = tmp_path / "run", capsys.readouterr().out
    assert "best/ (held-out accuracy 0.750, step 2)" in told
    assert drawn == [1, 2, 3, 4, 5] and not list(run.glob("*partial*"))
    best = {"step": 2, "accuracy": 0.75, "pass_at_k": None}
    assert json.loads((run / "best" / "evaluation.json").read_text()) == summary["best"] == best
    assert same_weights(run / "best", run / "checkpoint-2") and not same_weights(run / "best", run / "final")
    best_folder = str(run / "best")
    data.load_policy(best_folder, *data.load_config(best_folder), dtype=torch.float32, device="cpu")

    # From a later checkpoint it is still the best, with an earlier one it is set aside.
    accuracies(monkeypatch, 0.5)
    g.train(dataclasses.replace(config, resume=str(run / "checkpoint-4")))
    assert json.loads((run / "best" / "evaluation.json").read_text()) == best
    accuracies(monkeypatch, 0.6, 0.7, 0.1, 0.1)
    g.train(dataclasses.replace(config, resume=str(run / "checkpoint-1")))
    [left] = run.glob("left-best-*")
    assert json.loads((left / "evaluation.json").read_text()) == best
    assert "left-best-" in capsys.readouterr().err
    assert same_weights(run / "best", run / "checkpoint-3")


def test_a_best_model_that_cannot_be_saved_costs_nothing_else(tmp_path, monkeypatch, capsys):
    accuracies(monkeypatch, 0.25, 0.5, 0.5)
    real = data.save_folder

    def save_folder(policy, folder, *more, **named):
        return folder.name != "best" and real(policy, folder, *more, **named)

    monkeypatch.setattr(data, "save_folder", save_folder)
    g.train(quick(tmp_path, eval_every=1))
    assert (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "best").exists()
    assert "after GRPO:  held-out accuracy 0.500" in (out := capsys.readouterr().out) and "best/" not in out


@pytest.mark.parametrize("reward", ["countdown_equation", "gsm8k_answer", "gsm8k_last_number"])
def test_a_reward_of_another_task_is_refused_before_any_weights_are_read(tmp_path, own_task, reward):
    with pytest.raises(g.InputError, match=f"task.jsonl: reward '{reward}' raised KeyError"):
        g.train(quick(tmp_path, task=own_task["task"], reward=["reasoning_tags", reward], model="missing"))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_breaks_in_the_middle_leaves_a_checkpoint(tmp_path, own_task):
    (tmp_path / "my_rewards.py").write_text(
        "calls = []\ndef late(completion, example):\n    calls.append(1)\n"
        "    return 1 / (41 - len(calls))\n")
    with pytest.raises(g.rewards.RewardError, match="ZeroDivisionError"):
        g.train(quick(tmp_path, steps=9, task=own_task["task"], reward=[f"{tmp_path}/my_rewards.py:late"]))
    # One before the run, 4 + 12 + 12, and 11 of 12
    assert [c.name for c in data.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert data.load_state(tmp_path / "run" / "checkpoint-2")["drawn"] == 6  # the third step's are to come


@pytest.mark.parametrize("part", ["first update", "second update", "optimizer"])
def test_memory_that_runs_out_between_two_steps_is_never_saved(tmp_path, own_task, monkeypatch, part):
    """What a step has half changed is lost; the checkpoint before it is whole. Before the first optimizer
    step of a batch nothing is changed, and the steps so far are saved with the random state they ended in."""
    calls, real = [], g.gradients

    def gradients(*args, **kwargs):
        calls.append(1)
        if len(calls) > {"first update": 4, "second update": 5, "optimizer": 99}[part]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    def step(self, closure=None):
        if part == "optimizer" and self.state and len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_step(self, closure)

    real_step = g.memory.AdamW8bit.step
    monkeypatch.setattr(g, "gradients", gradients)
    monkeypatch.setattr(g.memory.AdamW8bit, "step", step)
    settings = {"updates_per_batch": 2, "learning_rate": 1e-3, "lr_schedule": "constant", **own_task}
    config = quick(tmp_path, steps=9, **settings)
    with pytest.raises(g.memory.DoesNotFit, match="out of memory in the (update|optimizer)") as raised:
        g.train(config)
    saved = [path.name for path in data.checkpoints(tmp_path / "run")]
    if part == "first update":  # of step 3
        assert saved == ["checkpoint-2"] and not isinstance(raised.value, g.StepLost)
        monkeypatch.setattr(g, "gradients", real)  # undo() would give back the path of modules, too
        g.train(g.parse_command_line(["--resume", str(tmp_path / "run"), "--steps", "4", "--reward",
                                      *own_task["reward"]]))
        g.train(quick(tmp_path, "whole", steps=4, **settings))
        samples = [[x for x in lines(tmp_path / name / "samples.jsonl") if x["step"] <= 3]
                   for name in ("run", "whole")]  # step 4 follows an update in smaller micro-batches
        assert samples[0] == samples[1]
    else:
        assert saved == [] and isinstance(raised.value, g.StepLost)


def test_refills_replace_groups_that_teach_nothing_and_resume_bit_for_bit(tmp_path):
    """Only prompts about even numbers have answers that differ in reward: most groups are all alike."""
    rows = [{"prompt": f"Write {i} a's:", "n": i} for i in range(14)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text("def even(completion, example):\n"
                                   "    return len(completion) / 9 if example['n'] % 3 == 0 else 0.5\n")
    settings = {"task": str(tmp_path / "t.jsonl"), "reward": [f"{tmp_path}/r.py:even"], "prompts_per_step": 3,
                "refill_rounds": 3, "learning_rate": 1e-3, "steps": 4, "save_every": 2}
    g.train(quick(tmp_path, "whole", **settings))
    metrics = lines(tmp_path / "whole" / "metrics.jsonl")
    assert all(3 <= m["groups_drawn"] <= 12 and m["groups_kept"] <= 3 for m in metrics)
    assert any(m["groups_drawn"] > 3 for m in metrics) and sum(m["groups_drawn"] for m in metrics) > 10
    plain = quick(tmp_path, "plain", **settings | {"refill_rounds": 0})
    g.train(plain)
    kept = sum(m["groups_kept"] for m in lines(tmp_path / "plain" / "metrics.jsonl"))
    assert sum(m["groups_kept"] for m in metrics) > kept
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "killed" / name)
    state = data.load_state(tmp_path / "killed" / "checkpoint-2")
    assert state["drawn"] == sum(m["groups_drawn"] for m in metrics[:2])
    g.train(g.parse_command_line(["--resume", str(tmp_path / "killed"), "--reward", *settings["reward"]]))
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (
        tmp_path / "killed" / "samples.jsonl").read_text()
    a, b = (weights_of(tmp_path / run / "final") for run in ("whole", "killed"))
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(tmp_path, number, code):
    process = endless_run(tmp_path, "--prompts-per-step", "3")
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped_by"] == number and summary["steps"] >= 2
    assert data.find_checkpoint("latest", str(tmp_path)).name == f"checkpoint-{summary['steps']}"
    assert "--resume" in out
    again = g.train(g.parse_command_line(
        ["--resume", "latest", "--output-dir", str(tmp_path), "--steps", str(summary["steps"] + 1)]))
    assert again["steps"] == summary["steps"] + 1 and (tmp_path / "run" / "final").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_a_reward_forks_can_be_ended_and_leave_ctrl_c_to_the_run():
    context = multiprocessing.get_context("fork")
    with g.stop_requests(SimpleNamespace(config=SimpleNamespace(reference_url=None))) as signals:
        sleeper = context.Process(target=time.sleep, args=(60,))
        sleeper.start()
        time.sleep(0.5)
        os.kill(sleeper.pid, signal.SIGINT)
        sleeper.join(0.5)
        assert sleeper.is_alive()
        sleeper.terminate()  # as a reward does that runs answers' code for a limited time
        sleeper.join(30)
        assert not sleeper.is_alive() and signals == []


KEPT_POOL = """
import multiprocessing, time
pool = None

def judge(text):
    time.sleep(0.1)
    return float(len(text))

def kept(completions, **kwargs):
    global pool
    pool = pool or multiprocessing.get_context("fork").Pool(2)
    return pool.map(judge, completions, chunksize=1)

def interrupted(completions, **kwargs):
    global pool
    pool = (pool or 0) + 1
    if pool == 4:
        raise KeyboardInterrupt  # as it comes back from a process that Ctrl-C has reached
    return [0.0] * len(completions)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ctrl_c_saves_a_run_whose_reward_keeps_processes(tmp_path):
    (tmp_path / "pooled.py").write_text(KEPT_POOL)
    process = endless_run(tmp_path, "--prompts-per-step", "2", "--reward", f"{tmp_path}/pooled.py:kept",
                          "--save-every", "0")
    for line in process.stdout:
        if line.startswith("step 1/"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the reward's processes, too
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and err.count("stopping") == 1, err
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert steps >= 1 and (tmp_path / "run" / f"checkpoint-{steps}").exists()


def test_an_interrupt_that_comes_out_of_a_reward_saves_the_steps_before(tmp_path, capsys):
    (tmp_path / "broken.py").write_text(KEPT_POOL)
    with pytest.raises(KeyboardInterrupt):  # scored before: at the door, the first evaluation, step 1
        g.train(quick(tmp_path, steps=3, reward=[f"{tmp_path}/broken.py:interrupted"]))
    assert "saved after step 1; go on with --resume" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-1").exists()


def test_a_second_signal_stops_at_once_and_leaves_what_was_whole(tmp_path):
    process = endless_run(tmp_path, "--save-every", "1")
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode in (130, 143)  # 130 when the step ended between the two
    whole = data.checkpoints(tmp_path / "run")
    assert whole and all(data.load_state(c)["step"] == int(data.step_of(c)) for c in whole)


def test_a_stop_while_the_reference_server_is_away_saves_and_has_the_signals_exit_code(tmp_path, monkeypatch):
    class Away(memory.ReferencePolicy):
        def __call__(self, sequences):
            if len(asked := self.__dict__.setdefault("asked", [])) == 2:
                os.kill(os.getpid(), signal.SIGTERM)  # which ends the waiting
                raise memory.NoReference("the reference server is away")
            asked.append(1)
            return super().__call__(sequences)

    monkeypatch.setattr(memory, "ReferencePolicy", Away)
    with pytest.raises(SystemExit) as stop:
        g.train(quick(tmp_path, steps=9, beta=0.1))
    assert stop.value.code == 143
    assert [data.step_of(c) for c in data.checkpoints(tmp_path / "run")] == ["2"]


def test_on_a_terminal_there_are_bars_and_no_plain_lines(tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))  # 30 lines of 120 characters
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--recipe", "tiny", "--device", "cpu", "--cold-start-steps", "2",
         "--steps", "2", "--prompts-per-step", "3", "--eval-examples", "4", "--output-dir", str(tmp_path)],
        stdout=end, stderr=end, close_fds=True)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        shown += part
        if not part:
            break
    assert process.wait(timeout=60) == 0
    assert b"GRPO" in shown and b"reward=" in shown and b"2/2" in shown and b"step 1/2" not in shown
    assert re.search(rb"1/2 \[\d\d:\d\d<\d\d:\d\d, [^\r]*accuracy=", shown)  # time gone < time left


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    """A limit on the size of files stands for the disk: the model's weights do not fit, its metrics do."""
    command = [sys.executable, SCRIPT, "--recipe", "tiny", "--device", "cpu", "--cold-start-steps", "0",
               "--steps", "2", "--prompts-per-step", "3", "--eval-examples", "4", "--save-every", "1",
               "--output-dir", str(tmp_path), "--name", "run"]
    limited = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *map(str, command)]  # blocks of 512 bytes
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert "checkpoint-1 could not be saved" in done.stderr and "step 2/2" in done.stdout
    assert done.returncode == 2 and "final can't be written; make room" in done.stderr.splitlines()[-1]
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert data.checkpoints(tmp_path / "run") == []


def a_disk_of(size, folder, monkeypatch):
    """Let the disk seem to hold `size` bytes, of which what lies in `folder` is used."""
    def usage(path):
        used = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        return shutil._ntuple_diskusage(size, used, size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_run_saves_by_steps_and_by_the_clock_unless_told_not_to(tmp_path, monkeypatch):
    config = g.make_config("tiny", device="cpu")
    assert (config.save_every, config.save_minutes) == (50, 30.0)
    clock = iter(range(0, 10**9, 60))  # each look at the clock is a minute later
    monkeypatch.setattr(g.time, "monotonic", lambda: next(clock))
    g.train(quick(tmp_path, "never", steps=4, save_minutes=0))
    assert data.checkpoints(tmp_path / "never") == []
    g.train(quick(tmp_path, "clock", steps=4, save_minutes=12.0, keep_checkpoints=0))
    by_clock = [int(data.step_of(c)) for c in data.checkpoints(tmp_path / "clock")]
    assert 1 <= len(by_clock) < 4
    g.train(quick(tmp_path, "both", steps=4, save_minutes=12.0, save_every=1, keep_checkpoints=0))
    assert len(data.checkpoints(tmp_path / "both")) == 4


def test_a_clock_that_stands_still_during_a_step_ends_no_run(tmp_path, own_task, monkeypatch):
    """As Windows' does for 16 ms; a step that learns nothing takes less."""
    monkeypatch.setattr(g.time, "monotonic", lambda: 5.0)
    same = [own_task["reward"][0].replace(":many", ":same")]
    assert g.train(quick(tmp_path, task=own_task["task"], reward=same))["steps"] == 2


def test_a_disk_too_small_for_a_checkpoint_and_the_final_model_is_refused(tmp_path, monkeypatch):
    """What is foretold is compared with the sizes of the folders that a run has written."""
    settings = {"beta": 0.1, "dtype": "bfloat16", "steps": 1}
    g.train(quick(tmp_path, "measured", save_every=1, **settings))
    final, checkpoint = (
        sum(p.stat().st_size for p in (tmp_path / "measured" / name).rglob("*")
            if p.suffix in (".pt", ".safetensors"))
        for name in ("final", "checkpoint-1"))
    (tmp_path / "disk").mkdir()
    a_disk_of(0.95 * (checkpoint + final), tmp_path / "disk", monkeypatch)
    config = quick(tmp_path / "disk", save_every=1, keep_checkpoints=1, **settings)
    with pytest.raises(g.InputError, match=r"0\.0 GB free.*make room.*--save-every 0 --save-minutes 0"):
        g.train(config)
    assert list((tmp_path / "disk").iterdir()) == []
    a_disk_of(1.1 * (checkpoint + final), tmp_path / "disk", monkeypatch)
    g.open_run(config)
    a_disk_of(1.1 * final, tmp_path / "disk", monkeypatch)
    g.open_run(dataclasses.replace(config, save_every=0, save_minutes=0))


def test_a_disk_that_fills_up_later_leaves_earlier_checkpoints_as_they_were(tmp_path):
    g.train(quick(tmp_path, steps=1, save_every=1))
    before = weights_of(tmp_path / "run" / "checkpoint-1")
    command = [sys.executable, SCRIPT, "--resume", str(tmp_path / "run"), "--steps", "3"]
    limited = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *map(str, command)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert "checkpoint-2 could not be saved" in done.stderr and "step 3/3" in done.stdout
    assert "final can't be written; make room" in done.stderr
    assert f"saved after step 1; go on with --resume {tmp_path / 'run'}" in done.stdout
    assert [c.name for c in data.checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    after = weights_of(tmp_path / "run" / "checkpoint-1")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_columns_that_are_not_json_are_written_as_text(tmp_path):
    data.append_lines(tmp_path / "samples.jsonl", [{"day": datetime.date(2026, 11, 21)}])  # of a parquet file
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"day": "2026-11-21"}


def test_a_line_that_does_not_fit_on_the_disk_leaves_whole_lines(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    data.append_lines(path, [{"step": 1}])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 5, limit[1]))
        data.append_lines(path, [{"step": 2, "much": "x" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert lines(path) == [{"step": 1}]
    assert "can't be written" in capsys.readouterr().err


def test_metrics_can_be_read_at_any_moment(tmp_path):
    """Another process reads while lines are added: what ends in a newline is whole, nothing is missing."""
    path = tmp_path / "metrics.jsonl"
    data.append_lines(path, [{"step": 0}])
    reader = subprocess.Popen([sys.executable, "-c", (
        "import json, sys, pathlib\n"
        "seen = set()\n"
        "while not seen or max(seen) < 400:\n"
        "    text = pathlib.Path(sys.argv[1]).read_text()\n"
        "    steps = [json.loads(line)['step'] for line in text.split('\\n')[:-1]]\n"
        "    assert steps == list(range(len(steps))), steps\n"
        "    seen.add(steps[-1])\n"
        "print(len(seen))\n"
    ), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for step in range(1, 401):
        data.append_lines(path, [{"step": step, "much": "x" * (step * 97 % 3000)}])
        time.sleep(0.002)
    out, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err
    assert int(out) > 5  # it looked several times while lines were being added


def test_memory_does_not_grow_over_300_steps(tmp_path, monkeypatch):
    seen = {}

    def resident_and_tensor_bytes():
        gc.collect()
        tensors = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                   for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), sum(tensors.values())

    def record(run, *args):
        if run.step in (30, 300):
            seen[run.step] = resident_and_tensor_bytes()
        return real(run, *args)

    real = g.step_record
    monkeypatch.setattr(g, "step_record", record)
    g.train(quick(tmp_path, steps=300, beta=0.04, reference_every=20, eval_every=100, prompts_per_step=2,
                  group_size=2, max_new_tokens=6))
    for early, late in zip(seen[30], seen[300]):
        assert late <= 1.05 * early


def test_numbers_that_go_wrong_stop_the_run_with_its_last_good_state(tmp_path, capsys):
    summary = g.train(quick(tmp_path, steps=30, learning_rate=1e30, skip_truncated=False,
                            cold_start_steps=20, cold_start_lr=3e-3, max_new_tokens=24))
    assert summary["stopped_by"] == "bad steps"
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["bad_updates"] for m in metrics[-5:]] == [1] * 5 and len(metrics) < 30
    newest = data.checkpoints(tmp_path / "run")[-1]
    assert all(x.isfinite().all() for x in weights_of(newest).values())
    optimizer = data.load_state(newest)["optimizer"]["state"].values()
    assert all(x.isfinite().all() for state in optimizer for x in state.values()
               if torch.is_tensor(x) and x.is_floating_point())
    assert "not finite" in capsys.readouterr().err


def test_trouble_is_told_once(capsys):
    warned, stuck = set(), {"groups_without_spread": 1.0, "entropy": 0.0, "seconds": 1.0}
    # Of answers that are all cut short it is no news that they are alike.
    for truncated, told in ((1.0, ["answer is cut"]), (0.1, ["no group's"])):
        for n in range(1, 60):
            g.warn_of_trouble([{**stuck, "truncated_fraction": truncated}] * n, warned)
        err = capsys.readouterr().err
        assert all(err.count(words) == 1 for words in told) and err.count("warning") == len(told)


def test_answers_that_are_all_dropped_are_told_after_three_steps(capsys):
    cut = {
        "truncated_fraction": 1.0,
        "groups_without_spread": 1.0,
        "entropy": None,
        "skipped": "nothing to learn: every answer truncated",
        "seconds": 1.0,
    }
    warned = set()
    for n in range(1, 40):
        g.warn_of_trouble([cut] * n, warned)
        err = capsys.readouterr().err
        assert err.count("warning") == (n == 3) and ("--skip-truncated false" in err) == (n == 3)
    learned = [cut, cut, {**cut, "skipped": None, "truncated_fraction": 0.5}, cut, cut]
    g.warn_of_trouble(learned, set())
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------
# Recipes, plan, devices


def test_the_recipes_are_the_designs_rows():
    # Prompts, group, new tokens, temperature, the loss's, std, eps, skip; updates, low, high, beta, every,
    # average, top, learning rate, norm.
    design = {
        "improved": (32, 8, 1024, 0.5, 0.5, "population", 1e-6, True,
                     1, 0.2, 0.3, 0.01, 10, "token", 0.2, 1e-6, 1.0),  # the source's rate: 1e-5
        "nano-aha": (16, 4, 1024, 1.0, 1.0, "population", 1e-4, False,
                     1, 0.2, 0.2, 0.001, 0, "token", 1.0, 1e-6, 1.0),
        "grpo-zero": (32, 8, 1024, 1.0, 1.0, "population", 1e-4, False,
                      1, 0.2, 0.2, 0.0, 0, "token", 1.0, 1e-5, 1.0),
        "simple-grpo": (4, 8, 700, 0.9, 1.0, "sample", 1e-4, False,
                        1, 0.2, 0.2, 0.04, 0, "sequence", 1.0, 1e-6, 0.0),
        "lm-book": (4, 16, 500, 1.0, 1.0, "sample", 1e-4, False,
                    3, 0.1, 0.1, 0.04, 500, "sequence", 1.0, 5e-6, 0.1),
    }
    usual, no_kl = (32, 8, 1024, 1.0, 1.0), (0.0, 0)
    design |= {
        "dapo": (*usual, "population", 1e-6, False, 2, 0.2, 0.28, *no_kl, "token", 1.0, 1e-6, 1.0),
        "dr-grpo": (*usual, "none", 1e-6, False, 1, 0.2, 0.2, *no_kl, "constant", 1.0, 1e-6, 1.0),
        "gspo": (*usual, "population", 1e-6, False, 2, 3e-4, 4e-4, *no_kl, "sequence", 1.0, 1e-6, 1.0),
        "cispo": (*usual, "batch", 1e-6, False, 2, 0.2, 4.0, *no_kl, "token", 1.0, 1e-6, 1.0),
    }
    own = {"dapo": ("token", "clip", 3, 256), "gspo": ("answer", "clip", 0, 0),
           "cispo": ("token", "cispo", 0, 0)}
    for name, row in design.items():
        c = g.make_config(name)
        assert row == (
            c.prompts_per_step, c.group_size, c.max_new_tokens, c.temperature, c.loss_temperature,
            c.advantage_std, c.advantage_eps, c.skip_truncated, c.updates_per_batch, c.clip_low, c.clip_high,
            c.beta, c.reference_every, c.aggregation, c.top_entropy, c.learning_rate, c.max_grad_norm), name
        assert own.get(name, ("token", "clip", 0, 0)) == (
            c.ratio, c.surrogate, c.refill_rounds, c.overlong_buffer), name


@pytest.mark.parametrize("budget, code, told", [
    ("12", 0, "budget"), ("1", 2, "error: at the least the rollout takes"),
])
def test_the_plan_is_printed_for_a_card_that_is_not_there_and_no_weights_are_read(
    tmp_path, budget, code, told, monkeypatch, capsys
):
    """A folder with Qwen2.5-0.5B's config and a tokenizer, and no weights at all."""
    transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=32768,
    ).save_pretrained(tmp_path / "half-b")
    data.tiny_tokenizer().save_pretrained(tmp_path / "half-b")
    monkeypatch.setattr(sys, "argv", [
        "grpo_scratch.py", "--recipe", "improved", "--plan-only", "--device", "cuda", "--memory-budget-gib",
        budget, "--model", str(tmp_path / "half-b"), "--output-dir", str(tmp_path / "runs")])
    if code:
        with pytest.raises(SystemExit) as stop:
            g.main()
        assert stop.value.code == code
    else:
        g.main()
    out, err = capsys.readouterr()
    assert told in out + err and not (tmp_path / "runs").exists()
    if not code:
        assert "494.0 M parameters" in out and "bfloat16" in out and "KV cache" in out


@pytest.mark.parametrize("sampler, variable, release, expected", [
    ("own", None, "6.8.0", ["expandable_segments:True"]), ("vllm", None, "6.8.0", []),
    ("own", "PYTORCH_ALLOC_CONF", "6.8.0", []), ("own", "PYTORCH_CUDA_ALLOC_CONF", "6.8.0", []),
    ("own", None, "5.15.90.1-microsoft-standard-WSL2", []),
])
def test_segments_may_grow_unless_vllm_wsl_or_the_user_has_it_otherwise(
    monkeypatch, sampler, variable, release, expected
):
    monkeypatch.setattr(platform, "release", lambda: release)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    g.open_run(g.make_config("tiny", device="cuda", memory_budget_gib=12, sampler=sampler, plan_only=True))
    assert told == expected


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(g.InputError, match="more processes than there are GPUs, 2"):
        g.open_run(quick(tmp_path, device="cuda"))


# ------------------------------------------------------------------------------------------------------------
# Dashboards


def test_tensorboard_shows_the_numbers_of_metrics_jsonl_and_a_resumed_run_goes_on_there(tmp_path, own_task):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = quick(tmp_path, steps=3, save_every=2, eval_every=2, report_to="tensorboard", keep_checkpoints=0,
                   **own_task)
    g.train(config)
    run = tmp_path / "run"
    g.train(dataclasses.replace(config, steps=4, resume=str(run / "checkpoint-2"), learning_rate=1e-3))
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for name in ("reward", "reward/my_rewards.many", "entropy", "grad_norm", "seconds"):
        shown = [(e.step, e.value) for e in events.Scalars(name)]
        assert shown == [(m["step"], pytest.approx(m[name], rel=1e-6)) for m in metrics]
    assert [e.step for e in events.Scalars("held-out/accuracy")] == [0, 2, 4]


class StandIn:
    """For a service's module: it keeps what it is called with, and fails when told to."""

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def __getattr__(self, name):
        def call(*args, **named):
            self.calls.append((name, args, named))
            if name in self.failing:
                raise ConnectionError("the service is down")
            return self if name == "init" else args

        return call


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_services_get_numbers_and_config_and_the_same_run_again(service, tmp_path, own_task, monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, service, module)
    config = quick(tmp_path, save_every=2, report_to=service, **own_task)
    g.train(config)
    (tmp_path / "run" / "wandb" / "offline-run-20261122_002144-v3vm0r3o").mkdir(parents=True)  # as wandb does
    g.train(dataclasses.replace(config, steps=3, resume=str(tmp_path / "run")))
    opened = [named for name, _, named in module.calls if name == "init"]
    assert len(opened) == 2 and all(x["resume"] == "allow" and x["name"] == "run" for x in opened)
    assert [x.get("id") for x in opened] == [None, "v3vm0r3o" if service == "wandb" else None]
    assert opened[0]["config"]["group_size"] == 4
    logged = {(named["step"], k): x for name, (values,), named in
              [call for call in module.calls if call[0] == "log"] for k, x in values.items()}
    for m in lines(tmp_path / "run" / "metrics.jsonl"):
        assert logged[m["step"], "reward"] == m["reward"]
    assert [step for step, name in logged if name == "held-out/accuracy"] == [0, 2, 3]
    assert [name for name, *_ in module.calls].count("finish") == 2


def test_wandbs_folder_is_there_when_it_starts(tmp_path, own_task, monkeypatch):
    found = []

    class Module(StandIn):
        def init(self, **named):
            found.append(Path(named["dir"]).is_dir())
            return self

    monkeypatch.setitem(sys.modules, "wandb", Module())
    g.train(quick(tmp_path, report_to="wandb", **own_task))
    assert found == [True]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_service_that_is_down_is_warned_of_once_and_stops_nothing(failing, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", StandIn([failing]))
    assert g.train(quick(tmp_path, report_to="wandb"))["steps"] == 2
    told = "--report-to wandb failed (ConnectionError: the service is down)"
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize("service, module", [
    ("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_missing_service_is_refused_at_the_door(service, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(g.InputError, match=f"--report-to {service}.*pip install {service}, or drop it"):
        g.train(quick(tmp_path, report_to=service))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# --ask


def ask(monkeypatch, capsys, *arguments, typed=""):
    """What the command line with these arguments prints, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["grpo_scratch.py", "--device", "cpu", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    capsys.readouterr()
    try:
        g.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return out, err, code


def test_ask_reads_input_that_begins_with_a_mark_or_is_no_utf8(tmp_path):
    command = [sys.executable, SCRIPT, "--recipe", "tiny", "--device", "cpu", "--max-new-tokens", "3",
               "--ask"]
    typed = b'\xef\xbb\xbf{"nums": [2, 1], "target": 3}\nW\xf6rter\nnumbers 2 1 target 3\n'
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as an ordinary locale has it
    done = subprocess.run(command, check=False, input=typed, capture_output=True, env=strict)
    out, err = done.stdout.decode().splitlines(), done.stderr.decode()
    assert done.returncode == 0 and "'\\udcf6', a lone surrogate" in err and "Traceback" not in err, err
    assert len(out) == 3 and out[1].startswith("reward ") and out[0] == out[2]


def test_ask_prints_the_greedy_answer_of_a_runs_model(tmp_path, monkeypatch, capsys):
    """Compared with transformers' generate on the prompt that the run trained on."""
    g.train(quick(tmp_path, steps=0, cold_start_steps=20, cold_start_lr=3e-3, max_new_tokens=24))
    final = tmp_path / "run" / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(final)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)

    def generated(nums, target):
        messages = [{"role": "user", "content": f"numbers {nums[0]} {nums[1]} target {target}"},
                    {"role": "assistant", "content": "<think>"}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True),
                        return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        return tokenizer.decode(out).removesuffix("<|endoftext|>")

    model_flag = ["--model", str(final)]
    assert ask(monkeypatch, capsys, "--ask", "numbers 27 15 target 12", *model_flag) == (
        generated([27, 15], 12) + "\n", "", 0)
    example = {"nums": [9, 4], "target": 13}
    answer = generated([9, 4], 13)
    parts = [g.rewards.countdown_equation(answer, example), g.rewards.countdown_format(answer, example)]
    told = (f"{answer}\nreward {parts[0] + 0.1 * parts[1]:g} (countdown_equation {parts[0]:g}, "
            f"countdown_format {parts[1]:g})\n")
    assert ask(monkeypatch, capsys, "--ask", json.dumps(example), *model_flag) == (told, "", 0)
    out, err, code = ask(monkeypatch, capsys, *model_flag, "--ask", typed=(
        f'numbers 27 15 target 12\n\n{{"nums": [1, 2]}}\n{json.dumps(example)}\n'))
    assert out == generated([27, 15], 12) + "\n" + told and code == 0
    assert err.count("warning") == 1 and "no prompt can be made of it (KeyError: 'target')" in err
    out, err, code = ask(monkeypatch, capsys, "--ask", '{"nums": [1, 2]}', *model_flag)
    assert (out, code) == ("", 2) and "(KeyError: 'target')" in err
    out, err, code = ask(monkeypatch, capsys, "--ask", '{"nums": 5, "target": 3}', *model_flag)
    assert (out, code) == ("", 2) and "no prompt can be made of it (TypeError" in err
    out, err, code = ask(monkeypatch, capsys, *model_flag, "--ask", typed='{"prompt": 5}\n{"prompt": []}\n')
    assert (out, code) == ("", 0) and err.count("prompt must be text or a list of") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}  # nothing is written


def test_ask_uses_the_text_as_it_stands_for_a_task_from_a_file_and_runs_no_code(
    tmp_path, own_task, monkeypatch, capsys
):
    g.train(quick(tmp_path, steps=0, **own_task))
    arguments = ["--ask", '{"prompt": "Write 2 a\'s:", "n": 2}', "--model", str(tmp_path / "run" / "final")]
    config = g.parse_command_line(arguments)
    assert (config.task, config.max_new_tokens, config.reward) == (own_task["task"], 10, [])
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and own_task["reward"][0] in told and "again with --reward" in told
    with pytest.raises(g.InputError, match="the run's reward is code"):  # where it is the very thing
        g.parse_command_line(["--eval-only", *arguments[2:]])
    assert data.asked_example("Write 2 a's:", config.task) == {"prompt": "Write 2 a's:"}
    assert g.parse_command_line([*arguments[2:], "--ask"]).reward == []  # to be asked line by line
    out, err, code = ask(monkeypatch, capsys, *arguments, "--reward", *own_task["reward"])
    assert code == 0 and "(my_rewards.many " in out and "warning" not in err


def test_ask_tells_of_a_reward_that_fails_and_of_a_missing_gpu_in_one_line(own_task, monkeypatch, capsys):
    broken = own_task["reward"][0].replace(":many", ":broken")
    question = ["--model", "embedded", "--task", own_task["task"], "--max-new-tokens", "3",
                "--reward", broken, "--ask", '{"prompt": "Write 2 a\'s:", "n": 2}']
    _, err, code = ask(monkeypatch, capsys, *question)
    assert code == 2 and err.startswith("error: reward 'my_rewards.broken' raised") and err.count("\n") == 1
    if not torch.cuda.is_available():
        told = "error: --device cuda: torch sees no CUDA device; use --device cpu, or check the driver\n"
        assert ask(monkeypatch, capsys, *question, "--device", "cuda") == ("", told, 2)


def test_a_model_is_evaluated_on_the_task_of_its_run_unless_a_recipe_is_given(tmp_path):
    g.train(quick(tmp_path, steps=0, seed=3, eval_examples=7, temperature=0.7))
    final = str(tmp_path / "run" / "final")
    config = g.parse_command_line(["--eval-only", "--model", final])
    assert (config.task, config.seed, config.eval_examples) == ("mini-countdown", 3, 7)
    assert config.temperature == 0.7  # of pass@k
    config = g.parse_command_line(["--eval-only", "--model", final, "--recipe", "lm-book"])
    assert (config.task, config.seed, config.eval_examples) == ("gsm8k", 0, 128)
    # A folder beside another program's config.json is no run's.
    (tmp_path / "run" / "config.json").write_text('{"model_type": "qwen2"}')
    assert g.settings_of_run(final) == {}


@pytest.mark.parametrize("content", ['{"task": "countd', "\xff"])
def test_ask_refuses_a_broken_config_beside_the_model_in_one_line(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    out, err, code = ask(monkeypatch, capsys, "--ask", "hello", "--model", str(tmp_path / "final"))
    assert (out, code) == ("", 2) and err.count("\n") == 1
    assert f"{tmp_path / 'config.json'} is not the settings of a run" in err


@pytest.mark.parametrize("name", data.PROMPTS)
def test_a_question_takes_the_users_turn_of_every_prompt_format(name):
    prompt = data.asked_example("what is it?", name)["prompt"]
    usual = data.PROMPTS[name]({"nums": [1, 2], "target": 3, "question": "what is it?"})
    if isinstance(prompt, str):
        assert prompt == usual
    else:
        assert [m["role"] for m in prompt] == [m["role"] for m in usual]
        for mine, other in zip(prompt, usual):
            assert mine["content"] == ("what is it?" if mine["role"] == "user" else other["content"])


# ------------------------------------------------------------------------------------------------------------
# What a call does instead of a new run


def test_a_run_is_evaluated_planned_and_asked_by_its_checkpoint_and_nothing_is_written(
    tmp_path, own_task, monkeypatch, capsys
):
    config = quick(tmp_path, steps=2, save_every=1, learning_rate=1e-2, eval_every=1, **own_task)
    summary = g.train(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    resume = ["--resume", str(tmp_path / "run"), "--device", "cpu"]
    found = g.train(g.parse_command_line([*resume, "--eval-only", "--reward", *own_task["reward"]]))
    assert found["reward"] == summary["reward_after"] != summary["reward_before"]
    capsys.readouterr()
    assert g.train(g.parse_command_line([*resume, "--plan-only"])) == {"recipe": "tiny"}
    assert "peak" in capsys.readouterr().out
    out, _, code = ask(monkeypatch, capsys, *resume[:2], "--ask", "Write 3 a's:")
    asked = ask(monkeypatch, capsys, "--model", str(tmp_path / "run" / "final"), "--ask", "Write 3 a's:")
    assert code == 0 and out and out == asked[0]  # the last checkpoint has the final weights
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert not {"resume", "ask", "eval_only", "plan_only"} & settings.keys()


def test_a_checkpoint_that_used_a_setting_which_has_left_is_refused_by_its_name(tmp_path):
    g.train(quick(tmp_path, steps=1, save_every=1))
    path = tmp_path / "run" / "checkpoint-1" / data.STATE
    state = torch.load(path, weights_only=True)
    older = {"reward_model": None, "reward_model_weight": 1.0, "max_bad_steps": 5, "recomputed_layers": None,
             "list_recipes": False, "plan_only": False, "ask": None, "eval_only": False, "resume": None}
    limits = {"reward_rows": 16, "planned": {}, "quiet_steps": 3}
    state |= {"config": state["config"] | older, "limits": state["limits"] | limits, "inputs": {"x": "y"}}
    torch.save(state, path)
    resume = ["--resume", str(tmp_path / "run"), "--steps", "2"]
    assert g.train(g.parse_command_line(resume))["steps"] == 2
    torch.save({**state, "config": state["config"] | {"reward_model": "judge"}}, path)
    with pytest.raises(g.InputError, match="it used --reward-model, which is no setting any more"):
        g.parse_command_line(["--resume", str(path.parents[1])])


def test_a_signal_in_the_last_evaluation_is_the_exit_code_of_a_run_that_is_whole(tmp_path, monkeypatch):
    real, calls = g.evaluate, []

    def evaluate(run):
        calls.append(run.step)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run)

    monkeypatch.setattr(g, "evaluate", evaluate)
    monkeypatch.setattr(g, "parse_command_line", lambda: quick(tmp_path))
    with pytest.raises(SystemExit) as stop:
        g.main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stop.value.code == 130 and calls == [0, 2]
    assert summary["accuracy_after"] is not None and (tmp_path / "run" / "final").exists()


def test_a_slow_reward_is_told_and_timed(tmp_path, own_task, capsys):
    (tmp_path / "slow.py").write_text("import time\ndef slow(completions, **kwargs):\n    time.sleep(0.3)\n"
                                      "    return [len(x) % 3 for x in completions]\n")
    g.train(quick(tmp_path, steps=4, task=own_task["task"], reward=[f"{tmp_path}/slow.py:slow"]))
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(0.3 <= m["scoring_seconds"] < m["seconds"] for m in metrics)
    tokens = 12 * metrics[0]["completion_length"]
    assert tokens / metrics[0]["sampling_tokens_per_second"] < metrics[0]["seconds"] - 0.3
    assert capsys.readouterr().err.count("scoring takes more than a fifth") == 1


def test_an_nvidia_driver_without_a_torch_for_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    for version, told in ((None, 1), ("13.0", 0)):
        monkeypatch.setattr(torch.version, "cuda", version)
        g.train(quick(tmp_path, plan_only=True))
        assert capsys.readouterr().err.count("this torch has no CUDA") == told


def test_two_steps_need_nothing_that_windows_lacks(tmp_path):
    """Names that only POSIX has are hidden before anything is imported, and folders can't be opened."""
    program = f'''
import os, sys
import torch, transformers, datasets, bitsandbytes  # libraries have their own ways
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("uname", "sysconf", "getuid", "sched_getaffinity"):
    delattr(os, name)
real_open, real_rename = os.open, os.rename
def no_folders(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_open(path, *args, **kwargs)
def onto_nothing(source, target, **kwargs):
    if os.path.exists(target):
        raise FileExistsError(17, "File exists", target)
    return real_rename(source, target, **kwargs)
os.open, os.rename = no_folders, onto_nothing
sys.path.insert(0, {str(SCRIPT.parent)!r})
import grpo_scratch as g
settings = dict(steps=2, cold_start_steps=0, prompts_per_step=3, group_size=4, max_new_tokens=10,
                eval_examples=4, output_dir={str(tmp_path)!r}, name="run", device="cpu", save_every=1,
                keep_checkpoints=1, eval_every=1)
print(g.train(g.make_config("tiny", **settings))["steps"])
print(g.train(g.make_config("tiny", **settings | dict(steps=3, resume={str(tmp_path / "run")!r})))["steps"])
'''
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line in ("2", "3")] == ["2", "3"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"checkpoint-3", "final", "summary.json"} <= names and not any(":" in name for name in names)


def test_a_resumed_run_keeps_limits_that_memory_has_made_smaller_until_a_flag_sets_them_back(tmp_path):
    """`tiny` itself sets the micro-batches' size, which must not come back by the recipe."""
    g.train(quick(tmp_path, steps=1, save_every=1))
    path = tmp_path / "run" / "checkpoint-1" / data.STATE
    state = torch.load(path, weights_only=True)
    torch.save({**state, "limits": state["limits"] | {"max_rows": 3, "micro_batch_tokens": 77}}, path)
    resume = ["--resume", str(tmp_path / "run"), "--steps", "2"]
    limits = g.open_run(g.parse_command_line(resume)).limits
    assert (limits.max_rows, limits.micro_batch_tokens) == (3, 77)
    limits = g.open_run(g.parse_command_line([*resume, "--max-rows", "5"])).limits
    assert (limits.max_rows, limits.micro_batch_tokens) == (5, 77)


def test_a_folder_that_cannot_be_written_after_all_is_told_in_one_line(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_json", no_space)
    with pytest.raises(g.InputError, match="--output-dir .*can't be written to: .*No space left"):
        g.train(quick(tmp_path))
