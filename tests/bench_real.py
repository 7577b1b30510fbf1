"""GRPO on a pretrained model: a blind cold start, then each algorithm at each rate, on two-number Countdown.

    .venv/bin/python tests/bench_real.py --model FOLDER --rates 1e-6 3e-6 --picture assets/real.png
    .venv/bin/python tests/bench_real.py --model FOLDER --task mine.jsonl --reward mine.py:reward \\
        --cold-start-steps 0 --max-new-tokens 80

A run takes hours on two cores. The runs stay in --output-dir: a run that was stopped goes on, and so does one
that is done when --steps is more than it has. With --read none is trained. Held out are pairs of numbers, so
that what is learned is which operator hits a target. `--masters off` rounds every weight to bfloat16 after
each step, as training without float32 masters does.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_recipes import algorithms, draw

import grpo_scratch as g
import memory


def round_weights() -> None:
    """From here on a step leaves no more of a weight than bfloat16 holds."""
    exact_step = memory.AdamW8bit.step

    def step(self, closure=None):
        loss = exact_step(self, closure)
        for p in self.owner:
            p.data.copy_(p.data.bfloat16())
        return loss

    memory.AdamW8bit.step = step


def run(folder: Path, read: bool, **settings) -> tuple[dict, list[dict]]:
    """One run, or what is left of it to do, in `folder`: its summary and its metrics."""
    done = folder / "summary.json"
    told = json.loads(done.read_text()) if done.exists() else {"stopped_by": "a kill"}
    if not read and (told["stopped_by"] is not None or told["steps"] < settings["steps"]):
        summary = g.train(g.make_config("tiny", output_dir=str(folder.parent), name=folder.name, **settings,
                                        resume="latest" if folder.exists() else None))
        if summary["stopped_by"] is not None:
            sys.exit("the same command goes on with it")
    steps = folder / "metrics.jsonl"  # the cold start has none
    lines = steps.read_text().splitlines() if steps.exists() else []
    return json.loads(done.read_text()), [json.loads(line) for line in lines]


def first_and_last(records: list[dict], name: str) -> str:
    """Two numbers for the table; "-" where a record has none."""
    first, last = (f"{x[name]:.3f}" if x.get(name) is not None else "-" for x in (records[0], records[-1]))
    return f"{first:>7} ->{last:>5}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained causal LM")
    parser.add_argument("--recipes", nargs="+", default=["tiny"])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--cold-start-steps", type=int, default=12,
                        help="of 16 demonstrations; another number wants another --output-dir")
    parser.add_argument("--task", default="mini-countdown", help="as grpo_scratch.py's")
    parser.add_argument("--reward", nargs="+", help="as grpo_scratch.py's")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--lr-schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument("--eval-samples", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8, help="in a step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--masters", choices=("on", "off"), default="on")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--beside", nargs="+", default=[], metavar="NAME=A,B,...",
                        help="more curves for the picture: a value for every tenth step")
    parser.add_argument("--read", action="store_true", help="only tell of the runs that are there")
    asked = parser.parse_args()
    if asked.masters == "off":
        round_weights()
    common = {"device": "cpu", "dtype": asked.dtype, "task": asked.task,
              "max_new_tokens": asked.max_new_tokens, "eval_examples": 120, "keep_checkpoints": 1,
              "save_every": 10, "eval_samples": asked.eval_samples}
    if asked.reward:
        common["reward"] = asked.reward
    curves, rows = {}, []
    for seed in asked.seeds:
        start, model = asked.output_dir / f"start-{seed}", asked.model
        if asked.cold_start_steps:
            model = start / "final"
        if asked.cold_start_steps and not asked.read:
            run(start, asked.read, **common, seed=seed, model=str(asked.model), steps=0,
                cold_start_steps=asked.cold_start_steps, cold_start_lr=2e-5, cold_start_batch=16)
        for recipe in asked.recipes:
            for rate in asked.rates:
                name = f"{recipe}-{rate:g}" + ("-bf16" if asked.masters == "off" else "")
                name += f"-{asked.answers}-answers" if asked.answers != 8 else ""
                name += f"-warmup-{asked.warmup_steps}" if asked.warmup_steps else ""
                name += f"-{asked.lr_schedule}" if asked.lr_schedule != "constant" else ""
                if asked.read and not (asked.output_dir / f"{name}-{seed}" / "summary.json").exists():
                    continue
                summary, metrics = run(
                    asked.output_dir / f"{name}-{seed}", asked.read, **{**algorithms()[recipe], **common},
                    seed=seed, model=str(model), steps=asked.steps, cold_start_steps=0,
                    eval_every=10, learning_rate=rate, warmup_steps=asked.warmup_steps,
                    lr_schedule=asked.lr_schedule,
                    prompts_per_step=asked.prompts, group_size=asked.answers, micro_batch_tokens=1024)
                rows.append((name, seed, summary, metrics))
                points = [(e["step"], e["accuracy"]) for e in summary["evaluations"]]
                sampled = [e["sampled_accuracy"] for e in summary["evaluations"]]
                print(name, seed, "greedy", *(f"{x:.3f}" for _, x in points),
                      "sampled", *("-" if x is None else f"{x:.3f}" for x in sampled), flush=True)
                if len(points) > 1:
                    curves[f"{name}, seed {seed}"] = tuple(zip(*points))
    wide = max([22, *(len(row[0]) for row in rows)])
    print(f"{'algorithm, rate':<{wide}}{'seed':>5}{'greedy':>15}{'best':>8}{'to 0.9':>8}{'sampled':>15}"
          f"{'entropy':>15}{'sample s':>10}{'update s':>10}{'peak GB':>9}")
    for name, seed, summary, metrics in rows:
        evaluations = summary["evaluations"]
        tokens = [asked.answers * m["groups_drawn"] * m["completion_length"] for m in metrics]
        sampling = [n / m["sampling_tokens_per_second"] for n, m in zip(tokens, metrics)]
        updating = [m["seconds"] - m.get("scoring_seconds", 0) - s for m, s in zip(metrics, sampling)]
        reached = next((str(e["step"]) for e in evaluations if e["accuracy"] >= 0.9), "-")
        print(f"{name:<{wide}}{seed:>5}{first_and_last(evaluations, 'accuracy')}"
              f"{max(e['accuracy'] for e in evaluations):>8.3f}{reached:>8}"
              f"{first_and_last(evaluations, 'sampled_accuracy')}{first_and_last(metrics, 'entropy')}"
              f"{statistics.median(sampling):>10.1f}{statistics.median(updating):>10.1f}"
              f"{summary['peak_memory_bytes'] / 1e9:>9.1f}")
    for name, _, values in (curve.partition("=") for curve in asked.beside):
        points = list(map(float, values.split(",")))
        curves[name] = range(0, 10 * len(points), 10), points
    if asked.picture:
        draw(curves, asked.picture)


if __name__ == "__main__":
    main()
