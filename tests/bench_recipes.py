"""Every recipe's algorithm on the embedded policy and task: accuracy, steps to 0.6, one picture.

    .venv/bin/python tests/bench_recipes.py --picture assets/recipes.png     # about 15 minutes on two cores

A seed's runs all start from the same cold start and use the learning rate that suits the embedded policy,
because a recipe's own belongs to its model; so do group sizes, lengths and rewards. What differs is the
algorithm: advantages, aggregation, clipping, KL and its reference, temperatures, updates per batch, truncated
answers, the high-entropy mask, the gradient's norm.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo_scratch as g

ALGORITHM = (
    "temperature", "loss_temperature", "advantage_std", "advantage_eps", "skip_truncated", "refill_rounds",
    "updates_per_batch", "ratio", "surrogate", "clip_low", "clip_high", "beta", "reference_every",
    "aggregation", "top_entropy", "max_grad_norm",
)


def algorithms() -> dict[str, dict]:
    """Recipe name -> the settings that make its algorithm, with one more row from the paper."""
    rows = {}
    for recipe in g.RECIPES:
        config = g.make_config(recipe)
        rows[recipe] = {name: getattr(config, name) for name in ALGORITHM}
        if config.overlong_buffer:  # the recipe's is a quarter of its length
            rows[recipe]["overlong_buffer"] = g.make_config("tiny").max_new_tokens // 4
    rows["grpo paper"] = {"updates_per_batch": 2, "aggregation": "sequence", "beta": 0.04}
    return rows


def run(folder: Path, name: str, **settings) -> dict:
    """One silent run of the embedded task; its summary."""
    config = g.make_config("tiny", **{**settings, "output_dir": str(folder), "name": name, "device": "cpu"})
    with contextlib.redirect_stdout(io.StringIO()):
        return g.train(config)


def draw(curves: dict[str, tuple], path: Path, what: str = "held-out accuracy, greedy") -> None:
    """A picture of a line for each name: (steps, values)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
    for i, (name, (steps, values)) in enumerate(curves.items()):
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        axis.plot(steps, values, label=name, linewidth=2, **style)
    axis.set(xlabel="step", ylabel=what, ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--output-dir", type=Path, help="keep the runs here")
    asked = parser.parse_args()
    curves = {}
    print(f"{'algorithm':<14}{'before':>8}{'after':>8}{'worst':>8}{'steps to 0.6':>14}{'s a step':>10}",
          flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = asked.output_dir or Path(name)
        for seed in asked.seeds:
            run(folder, f"start{seed}", seed=seed, steps=0)
        for name, settings in algorithms().items():
            summaries, seconds = [], []
            for seed in asked.seeds:
                summaries.append(run(
                    folder, f"{name}{seed}", **settings, seed=seed, steps=asked.steps, eval_every=10,
                    cold_start_steps=0, model=str(folder / f"start{seed}" / "final")))
                lines = (folder / f"{name}{seed}" / "metrics.jsonl").read_text().splitlines()
                seconds += [json.loads(line)["seconds"] for line in lines]
            runs = [[(e["step"], e["accuracy"]) for e in s["evaluations"]] for s in summaries]
            reached = [next((str(step) for step, accuracy in points if accuracy >= 0.6), "-")
                       for points in runs]
            after = [points[-1][1] for points in runs]
            print(f"{name:<14}{statistics.median(points[0][1] for points in runs):>8.3f}"
                  f"{statistics.median(after):>8.3f}{min(after):>8.3f}{', '.join(reached):>14}"
                  f"{statistics.median(seconds):>10.2f}", flush=True)
            curves[name] = [step for step, _ in runs[0]], [
                statistics.median(accuracy for _, accuracy in column) for column in zip(*runs)]
    if asked.picture:
        draw(curves, asked.picture, "held-out accuracy, median of seeds")


if __name__ == "__main__":
    main()
