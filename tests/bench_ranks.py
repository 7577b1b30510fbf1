"""What several ranks cost: seconds a step, bytes that a rank sends, the share of the step that it waits.

    .venv/bin/python tests/bench_ranks.py --ranks 2 --layers 4      # a minute; two processes on one machine

A step here is the exchange alone, with random episodes and gradients: gather, share, sum_gradients, step. Its
bytes are counted where torch.distributed is called, as what any algorithm must send: a gathered list goes to
each other rank, a gradient leaves every rank but its owner, a new weight leaves its owner (a chain or a tree
passes both on, so each rank sends about as much), and are per parameter the same for any model.
"""

import argparse
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory


@contextmanager
def counted():
    """Within it, bytes sent by this rank and seconds spent are counted, both by the name of the call."""
    rank, ranks = memory.my_rank()
    sent, seconds = Counter(), Counter()
    sizes = {
        "all_gather_object": lambda everyone, made: len(pickle.dumps(made)) * (ranks - 1),
        "all_reduce": lambda x, *_: 2 * x.nbytes * (ranks - 1) // ranks,  # a ring's
        "reduce": lambda x, owner: x.nbytes if owner != rank else 0,
        "broadcast": lambda x, owner: x.nbytes if owner == rank else 0,
        "send": lambda x, to: x.nbytes,
    }

    def counting(name, call):
        def counted_call(*args):
            started = time.monotonic()
            result = call(*args)
            seconds[name] += time.monotonic() - started
            sent[name] += sizes[name](*args)
            return result
        return counted_call

    calls = {name: getattr(dist, name) for name in sizes}
    for name, call in calls.items():
        setattr(dist, name, counting(name, call))
    try:
        yield sent, seconds
    finally:
        for name, call in calls.items():
            setattr(dist, name, call)


def work(layers: int, steps: int) -> None:
    dist.init_process_group("gloo")
    rank, ranks = memory.my_rank()
    torch.manual_seed(0)
    rng = random.Random(rank)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=16_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )).bfloat16()
    params = list(model.parameters())
    memory.sum_gradients_in_fp32(params)
    optimizer = memory.AdamW8bit(params, lr=1e-6)

    def episodes():  # about what an Episode holds: ids, log-probabilities, entropies
        lengths = [rng.randrange(200, 1024) for _ in range(256)[memory.my_slice(256)]]
        return [([7] * n, [rng.random() for _ in range(n)], [rng.random() for _ in range(n)])
                for n in lengths]

    def step() -> float:
        """One step's exchange; returns the seconds of what each rank does alone."""
        made = episodes()
        together = memory.gather(lambda: made)
        memory.share(together, [len(ids) for ids, *_ in together])
        started = time.monotonic()
        for p in params:
            p.grad = torch.full_like(p, 0.01, dtype=torch.float32)
        alone = time.monotonic() - started
        optimizer.sum_gradients(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return alone

    step()  # makes the state
    with counted() as (sent, seconds):
        dist.barrier()
        started = time.monotonic()
        alone = sum(step() for _ in range(steps))
        took = time.monotonic() - started - alone
        state = sum(x.nbytes for s in optimizer.state.values() for x in s.values()
                    if isinstance(x, torch.Tensor))
        saved = time.monotonic()
        optimizer.state_dict()
        saved = time.monotonic() - saved
    moving = sum(seconds[name] for name in ("reduce", "broadcast", "all_reduce"))
    mine = [rank, state, took / steps, seconds["all_gather_object"] / took, moving / took, saved,
            *(sent[name] / steps for name in ("all_gather_object", "reduce", "broadcast", "all_reduce")),
            sent["send"]]
    rows = memory.gather(lambda: [mine])
    if rank == 0:
        count = sum(p.numel() for p in params)
        print(f"{count / 1e6:.0f} M parameters, {len(params)} tensors, {ranks} ranks; a step:")
        print("rank  state MB  seconds  gather  sums, weights  save s | MB sent: episodes  gradients  weights  norms | save")
        for rank, state, took, waited, moving, saved, *sent in rows:
            episodes, gradients, weights, norms, save = (x / 1e6 for x in sent)
            print(f"{rank:>4}{state / 1e6:>10.1f}{took:>9.2f}{waited:>8.0%}{moving:>15.0%}{saved:>8.2f} |"
                  f"{episodes:>19.1f}{gradients:>11.1f}{weights:>9.1f}{norms:>7.3f} |{save:>5.0f}")
        per = [sum(row[i] for row in rows) / ranks / count for i in (7, 8)]
        print(f"mean of the ranks, bytes a parameter: gradients {per[0]:.2f}, weights {per[1]:.2f}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="of 3.9 M parameters, beside 8.2 M of embedding")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun's
        work(args.layers, args.steps)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={args.ranks}", __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
