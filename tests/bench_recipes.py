"""Every recipe's algorithm on the embedded policy and task: accuracy, steps to 0.6, one picture.

    .venv/bin/python tests/bench_recipes.py --steps 150 --seeds 0 1 2 --picture assets/recipes.png

All start from the same cold start and use the learning rate that suits the embedded policy, because a
recipe's own belongs to its model; so do group sizes, lengths and rewards. What differs is the algorithm:
advantages, aggregation, clipping, KL and its reference, temperatures, updates per batch, truncated answers,
the high-entropy mask, the gradient's norm.
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
    "temperature", "loss_temperature", "advantage_std", "advantage_eps", "skip_truncated",
    "updates_per_batch", "clip_low", "clip_high", "beta", "reference_every", "aggregation", "top_entropy",
    "max_grad_norm",
)


def algorithms() -> dict[str, dict]:
    """Recipe name -> the settings that make its algorithm, with two more rows from the papers."""
    rows = {}
    for recipe in g.RECIPES:
        config = g.make_config(recipe)
        rows[recipe] = {name: getattr(config, name) for name in ALGORITHM}
    rows["dr-grpo"] = {"advantage_std": "none", "aggregation": "constant"}
    rows["grpo paper"] = {"updates_per_batch": 2, "aggregation": "sequence", "beta": 0.04}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    curves = {}
    print(f"{'algorithm':<14}{'before':>8}{'after':>8}{'worst':>8}{'steps to 0.6':>14}{'s a step':>10}",
          flush=True)
    for name, settings in algorithms().items():
        before, after, reached, seconds, curve = [], [], [], [], []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                config = g.make_config(
                    "tiny", **{**settings, "seed": seed, "steps": arguments.steps, "output_dir": folder,
                               "name": "run", "eval_every": 10, "device": "cpu"})
                with contextlib.redirect_stdout(io.StringIO()):
                    summary = g.train(config)
                lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            seconds += [json.loads(line)["seconds"] for line in lines]
            before.append(summary["accuracy_before"])
            after.append(summary["accuracy_after"])
            reached.append(next((e["step"] for e in summary["evaluations"] if e["accuracy"] >= 0.6), None))
            curve.append([e["accuracy"] for e in summary["evaluations"]])
            steps = [e["step"] for e in summary["evaluations"]]
        curves[name] = steps, [statistics.median(values) for values in zip(*curve)]
        when = ", ".join("-" if r is None else str(r) for r in reached)
        print(f"{name:<14}{statistics.median(before):>8.3f}{statistics.median(after):>8.3f}{min(after):>8.3f}"
              f"{when:>14}{statistics.median(seconds):>10.2f}", flush=True)
    if arguments.picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
        for i, (name, (steps, values)) in enumerate(curves.items()):
            axis.plot(steps, values, label=name, linewidth=2, color=f"C{i}")
        axis.set(xlabel="step", ylabel="held-out accuracy, median of seeds")
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
