"""One GRPO step (sampling and update) of this project and of TRL's GRPOTrainer, side by side. Run by hand.

    python -m venv trl-env && trl-env/bin/pip install trl        # once: an environment of its own
    python tests/bench_step.py --python trl-env/bin/python       # under a minute on two cores
    python tests/bench_step.py --python trl-env/bin/python --model random-0.5b --rows 8 --budget-gib 11

Both load the same saved model (default: the embedded policy; random-0.5b: Qwen2.5-0.5B's shape and prompts
of 150 tokens), sample 32 prompts x 8 answers of at most 28 tokens at temperature 1, decode them, give them
random rewards, so that groups have spread and no side leaves an answer out, and make one AdamW step on the
DAPO loss without KL. TRL logs and saves nothing; on a CPU it runs in float32 without checkpointing, as this
project does where the budget allows, with CUDA by its defaults. Memory is the process's largest resident
size, or with CUDA the most that tensors took. Each side runs in a process of its own; figures are medians of
the steps after two of warm-up.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path

# As grpo_scratch sets it for idle threads. It counts from before torch is loaded, for both sides.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parents[1]))

GROUP, RATE, WARM_UP = 8, 1e-5, 2
PARTS = ["sampling", "forward", "backward", "optimizer"]  # the rest: rewards, gradient norm, bookkeeping


class Stopwatch:
    """Seconds of each finished step, in all and in the parts whose functions it wraps."""

    def __init__(self, cuda: bool):
        self.cuda, self.steps, self.parts = cuda, [], defaultdict(float)

    def now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.now()

    def watch(self, owner, name: str, part: str) -> None:
        """Replace owner.name by the same with its time counted for `part`."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            started = self.now()
            result = function(*args, **kwargs)
            self.parts[part] += self.now() - started
            return result

        setattr(owner, name, timed)

    def step_ends(self, tokens: int) -> None:
        self.steps.append({"seconds": self.now() - self.started, "tokens": tokens, **self.parts})
        self.parts.clear()
        self.start()


REWARD = "import random\n\ndef score(completion, example):\n    return random.random()\n"


def run_ours(folder: str, examples: list[dict], asked) -> Stopwatch:
    """The steps as `train` makes them."""
    import grpo_scratch as grpo  # isort: skip (before torch)
    import torch

    import memory

    watch = Stopwatch(torch.cuda.is_available())
    watch.watch(memory, "sample", "sampling")
    watch.watch(memory, "sequence_logprobs", "forward")
    watch.watch(torch.Tensor, "backward", "backward")
    rows, reward = Path(folder) / "prompts.jsonl", Path(folder) / "bench_reward.py"
    rows.write_text("".join(json.dumps({"prompt": example["prompt"]}) + "\n" for example in examples))
    reward.write_text(REWARD)
    run = grpo.open_run(grpo.make_config(
        "tiny", model=folder, task=str(rows), reward=[f"{reward}:score"], cold_start_steps=0, eval_examples=1,
        prompts_per_step=asked.prompts, group_size=GROUP, max_new_tokens=asked.new_tokens, learning_rate=RATE,
        lr_schedule="constant", memory_budget_gib=asked.budget_gib, output_dir=folder,
        micro_batch_tokens=None if asked.model else grpo.RECIPES["tiny"]["micro_batch_tokens"],
    ))
    run.optimizer.make_state()
    watch.watch(run.optimizer, "step", "optimizer")
    watch.start()
    for _ in range(len(examples) // asked.prompts):
        _, episodes = grpo.grpo_step(run)
        watch.step_ends(sum(len(episode.completion.ids) for episode in episodes))
    return watch


def run_trl(folder: str, examples: list[dict], asked) -> Stopwatch:
    """The same with TRL's trainer."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    rng = random.Random(0)
    watch = Stopwatch(cuda)
    tokens = []

    def reward(completion_ids, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [rng.random() for _ in completion_ids]

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            watch.watch(trainer.optimizer, "step", "optimizer")
            watch.start()

        def on_step_end(self, *args, **kwargs):
            watch.step_ends(tokens[-1])

    rows = asked.rows or asked.prompts * GROUP
    config = GRPOConfig(
        output_dir=str(Path(folder) / "trl"),
        max_steps=len(examples) // asked.prompts,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=asked.prompts * GROUP // rows,
        num_generations=GROUP,
        max_completion_length=asked.new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="dapo",
        beta=0.0,
        num_iterations=1,
        max_grad_norm=1.0,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=cuda,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        callbacks=[Steps()],
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list([{"prompt": example["prompt"]} for example in examples]),
    )
    watch.watch(trainer, "_generate_single_turn", "sampling")
    watch.watch(trainer, "compute_loss", "forward")
    watch.watch(trainer.accelerator, "backward", "backward")
    trainer.train()
    return watch


def run_side(asked) -> None:
    """One side, in this process; prints its figures as the last line."""
    import torch

    examples = json.loads((Path(asked.folder) / "examples.json").read_text())
    watch = {"ours": run_ours, "trl": run_trl}[asked.side](asked.folder, examples, asked)
    peak = (
        torch.cuda.max_memory_allocated()
        if watch.cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    machine = torch.cuda.get_device_name() if watch.cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        json.dumps(
            {"machine": f"{machine}, torch {torch.__version__}", "peak": peak, "steps": watch.steps[WARM_UP:]}
        )
    )


def save_inputs(folder: str, asked) -> None:
    """What both sides read: a model, its tokenizer and the prompts of all steps."""
    import torch

    import data

    wanted = (WARM_UP + asked.steps) * asked.prompts
    if asked.model == "random-0.5b":
        from bench_memory import qwen
        from transformers import AutoModelForCausalLM

        model, tokenizer = AutoModelForCausalLM.from_config(qwen("0.5b")), data.tiny_tokenizer()
        examples = [{"prompt": f"{i:>150}"} for i in range(wanted)]  # a token for each character
    else:
        task = "countdown" if asked.model else "mini-countdown"
        name = asked.model or "embedded"
        config, tokenizer = data.load_config(name)
        model = data.load_policy(name, config, tokenizer, dtype=torch.float32, device="cpu").model
        examples, _ = data.load_task(task, train_examples=wanted, eval_examples=1, seed=0)
        examples = [examples[i % len(examples)] for i in range(wanted)]
        if tokenizer.chat_template is None:  # of a base model; TRL takes its prompts as text
            examples = [{"prompt": "\n".join(m["content"] for m in x["prompt"])} for x in examples]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "examples.json").write_text(json.dumps(examples))


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="of the environment that has TRL")
    parser.add_argument("--model", help="random-0.5b, hub id or folder; default: the embedded tiny policy")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step, each with 8 answers")
    parser.add_argument("--budget-gib", type=float, help="memory that this project plans for")
    parser.add_argument("--new-tokens", type=int, default=28, help="length limit of an answer")
    parser.add_argument("--rows", type=int, help="answers in a forward pass of TRL's update; default: all")
    parser.add_argument("--steps", type=int, default=7, help="measured steps, after two of warm-up")
    parser.add_argument(
        "--side", choices=("both", "ours", "trl"), default="both", help="run only this one, here"
    )
    parser.add_argument("--folder", help="where the inputs of --side are")
    asked = parser.parse_args()
    if asked.folder:
        return run_side(asked)

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_inputs(folder, asked)
        for side, python in (("ours", sys.executable), ("trl", asked.python)):
            if asked.side in ("both", side):
                command = [python, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[side] = json.loads(done.stdout.splitlines()[-1])

    median = lambda side, part: statistics.median(step.get(part, 0.0) for step in results[side]["steps"])
    for side, result in results.items():
        print(f"{side}: {processor()}; {result['machine']}; {len(result['steps'])} steps")
    columns = {side: {"seconds a step": median(side, "seconds")} for side in results}
    for side, column in columns.items():
        column |= {f"  {part}": median(side, part) for part in PARTS}
        column["  the rest"] = column["seconds a step"] - sum(column[f"  {part}"] for part in PARTS)
        column["peak memory, GB"] = results[side]["peak"] / 1e9
        column["new tokens a step"] = median(side, "tokens")
    print(
        f"{'':<20}"
        + "".join(f"{side:>10}" for side in columns)
        + (f"{'trl / ours':>12}" if len(columns) == 2 else "")
    )
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        digits = 0 if name.startswith("new") else 3
        ratio = f"{values[1] / values[0]:>12.2f}" if len(values) == 2 else ""
        print(f"{name:<20}" + "".join(f"{value:>10.{digits}f}" for value in values) + ratio)


if __name__ == "__main__":
    main()
