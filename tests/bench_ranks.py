"""What several ranks cost: seconds a step, bytes that a rank sends, the share of the step that it waits.

    .venv/bin/python tests/bench_ranks.py             # steps of recipe tiny on one rank and on two; minutes
    .venv/bin/python tests/bench_ranks.py --layers 4  # the exchange alone, of a larger random model in bf16
    .venv/bin/python tests/bench_ranks.py --whole     # the whole recipe on one rank and on two; ten minutes
    .venv/bin/python tests/bench_ranks.py --paper     # 8 and 32 GPUs, from these bytes and links' speeds

Bytes are counted where torch.distributed is called, as what any algorithm must send: a gathered list goes to
each other rank, a gradient leaves every rank but its owner, a new weight leaves its owner (a chain or a tree
passes both on, so each rank sends about as much). Per parameter they are the same for any model. A rank waits
while it gathers: for slower ranks, and for their lists.
"""

import argparse
import contextlib
import io
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo_scratch as g
import memory

WHAT = {"all_gather_object": "episodes", "reduce": "gradients", "broadcast": "weights", "all_reduce": "norms"}


def count() -> tuple[Counter, list[float]]:
    """From now on: bytes sent by this rank, by what they are, and the seconds of each time that it waited."""
    rank, ranks = memory.my_rank()
    sent, waits = Counter(), []
    sizes = {
        "all_gather_object": lambda everyone, made: len(pickle.dumps(made)) * (ranks - 1),
        "reduce": lambda x, owner: x.nbytes if owner != rank else 0,
        "broadcast": lambda x, owner: x.nbytes if owner == rank else 0,
        "all_reduce": lambda x, *_: 2 * x.nbytes * (ranks - 1) // ranks,  # a ring's
    }

    def counting(name, call):
        def counted_call(*args):
            sent[WHAT[name]] += sizes[name](*args)
            started = time.monotonic()
            result = call(*args)
            if name == "all_gather_object":
                waits.append(time.monotonic() - started)
            return result
        return counted_call

    for name in WHAT:
        setattr(dist, name, counting(name, getattr(dist, name)))
    return sent, waits


def report(what: str, sent: Counter, optimizer, seconds: list[float], waited: list[float]) -> None:
    """A line for each rank, written by the first one."""
    params = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    mine = [statistics.median(seconds), statistics.median(w / s for w, s in zip(waited, seconds)), state,
            *(sent[kind] / len(seconds) for kind in WHAT.values())]
    rank, ranks = memory.my_rank()
    rows = memory.gather(lambda: [mine])
    if rank == 0:
        print(f"\n{what}, {sum(params) / 1e6:.1f} M parameters, {ranks} ranks; medians of {len(seconds)}\n"
              f"rank  seconds  waiting  state MB | MB sent: {'  '.join(WHAT.values())}")
        for i, (took, waiting, state, *of_kinds) in enumerate(rows):
            print(f"{i:>4}{took:>9.2f}{waiting:>9.0%}{state / 1e6:>10.2f} |        "
                  + "".join(f"{x / 1e6:>{len(kind) + 2}.3f}" for x, kind in zip(of_kinds, WHAT.values())))
        per = [sum(row[i] for row in rows) / ranks / sum(params) for i in (4, 5)]
        print(f"mean of ranks, bytes a parameter: gradients {per[0]:.2f}, weights {per[1]:.2f}", flush=True)


def tiny_steps(steps: int) -> None:
    """Real steps of recipe tiny, after a cold start that is long enough for groups with spread."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = g.open_run(g.make_config("tiny", device="cpu", memory_budget_gib=1.0, cold_start_steps=100))
        g.cold_start(run)
        g.grpo_step(run)  # makes the optimizer's state
        (sent, waits), records, waited = count(), [], []
        for _ in range(steps):
            records.append(g.grpo_step(run)[0])
            waited.append(sum(waits))
            waits.clear()
    assert not any(record["skipped"] for record in records), "a step that changed no weight"
    seconds = [record["seconds"] for record in records]
    report("recipe tiny, float32", sent, run.optimizer, seconds, waited)


def exchange(layers: int, steps: int) -> None:
    """The exchange alone: random episodes and gradients of a bf16 model, 3.9 M parameters a layer."""
    memory.join_ranks("cpu")
    rng = random.Random(memory.my_rank()[0])
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=16_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )).bfloat16()
    params = list(model.parameters())
    memory.sum_gradients_in_fp32(params)
    optimizer = memory.AdamW8bit(params, lr=1e-6)
    (sent, waits), seconds, waited = count(), [], []
    for _ in range(steps):
        lengths = [rng.randrange(200, 1024) for _ in memory.share(range(256), [1] * 256)]
        numbers = lambda n: [rng.random() for _ in range(n)]
        made = [([7] * n, numbers(n), numbers(n)) for n in lengths]  # as an Episode's ids and statistics
        for p in params:
            p.grad = torch.full_like(p, 0.01, dtype=torch.float32)
        started = time.monotonic()
        memory.gather(lambda made=made: made)
        optimizer.sum_gradients(1.0)
        optimizer.step()
        seconds.append(time.monotonic() - started)
        waited.append(sum(waits))
        waits.clear()
        optimizer.zero_grad(set_to_none=True)
    report("exchange alone, bfloat16", sent, optimizer, seconds, waited)


def whole() -> None:
    """Recipe tiny, seed 0, as it stands; held-out accuracy before and after."""
    with contextlib.redirect_stdout(io.StringIO()):
        summary = g.train(g.make_config("tiny", device="cpu"))
    rank, ranks = memory.my_rank()
    if rank == 0:
        print(f"{ranks} ranks: {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f} in "
              f"{summary['seconds']:.0f} s; best {summary['best']}", flush=True)


# ---- On paper ----------------------------------------------------------------------------------------------

QWEN = {  # hidden, intermediate, layers, heads, key heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
# One way, GB/s: of each GPU of a machine, and of a machine on the network, which its 8 GPUs share.
LINKS = {"NVSwitch": 450, "PCIe 4 x16": 25, "100 Gb/s": 11, "400 Gb/s": 45}
# Of each parameter, a float32 gradient goes to the owner and a bf16 weight comes back. Two ranks measure 2.00
# and 1.00 bytes, as half of them stay at home; of many, next to none do, and a link passes on all of them.
BYTES = 4 + 2
PEAK, UTILISATION = 989e12, 0.3  # FLOP/s of an H100 in dense bf16, and the share of it that training reaches
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 100, 700  # of each GPU: a step of simple-grpo


def paper() -> None:
    """Of simple-grpo with --prompts-per-step 4 a GPU, all answers as long as they may be, on 80 GB."""
    for name, (wide, inner, layers, heads, key_heads, vocab, tied) in QWEN.items():
        config = Qwen2Config(
            vocab_size=vocab, hidden_size=wide, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied)
        for ranks in (1, 8, 32):
            plan = memory.plan(
                config, prompt_tokens=PROMPT_TOKENS, max_new_tokens=NEW_TOKENS, prompts=PROMPTS,
                group_size=GROUP, dtype=torch.bfloat16, memory_budget_bytes=80 * 10**9, reference=True,
                ranks=ranks)
            held, limits = plan.weights + plan.optimizer, plan.limits
            print(f"{name:>5} on {ranks:>2}, GB a GPU: weights, optimizer {held / 1e9:.1f}, with gradients "
                  f"{(held + 4 * plan.parameters) / 1e9:.1f}, update {plan.update_peak_bytes / 1e9:.1f} "
                  f"({limits.micro_batch_tokens} tokens, {limits.recomputed_layers} layers again), rollout "
                  f"{plan.rollout_peak_bytes / 1e9:.1f}; host {plan.host_bytes / 1e9:.1f}")
        compute = 6 * plan.parameters * PROMPTS * GROUP * (PROMPT_TOKENS + NEW_TOKENS) / (PEAK * UTILISATION)
        moved = {link: BYTES * plan.parameters / (speed * 1e9) for link, speed in LINKS.items()}
        print(f"{name:>5}: compute {compute:.2f} s; exchange "
              + ", ".join(f"{link} {seconds:.3f} s" for link, seconds in moved.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--paper", action="store_true")
    asked = parser.parse_args()
    if asked.paper:
        paper()
    elif "RANK" not in os.environ:
        for ranks in asked.ranks:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            with tempfile.TemporaryDirectory() as folder:  # for the runs' folder
                subprocess.run([sys.executable, *torchrun, Path(__file__).absolute(), *sys.argv[1:]],
                               cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    elif asked.whole:
        whole()
    elif asked.layers:
        exchange(asked.layers, asked.steps)
    else:
        tiny_steps(asked.steps)
