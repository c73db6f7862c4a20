"""Success over steps and over computing time, of the sweeps of benchmark/steps_and_time.sh: a table and a picture.

    python benchmark/steps_and_time.py --runs logs/benchmark/steps_and_time --out benchmark/results/steps_and_time

Both trainers keep their settings whatever the budget, except that PPO's learning rate falls to zero at its end. So a
checkpoint of SAC is the final model of a shorter run; one of PPO is not.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.cli import parse, run_script
from so101.files import write_json
from so101.stats import rate_interval
from so101_env import SO101Error

TITLES = {
    "standard": "standard, from scratch: SAC", "standard_ppo": "standard, from scratch: PPO, 50,000 steps",
    "precise": "precise, from scratch: SAC", "precise_jacobian": "precise, on the pusher: SAC",
    "act": "standard, on a camera ACT: SAC",
}  # fmt: skip
PICTURE = ("standard", "standard_ppo")


@dataclasses.dataclass
class Args:
    runs: str
    """directory of the sweeps, with ROW/seed_N/run/"""
    out: str
    """directory to write rows.json, results.md and curves.png into; its rows stay if --runs does not have them"""


def read_seed(directory: Path) -> dict[int, dict[str, Any]]:
    """Success, CPU time in s, episodes and outcomes of every evaluated model of a seed, by its training steps."""
    summary = json.loads((directory / "run" / "training_summary.json").read_text())
    results = {}
    for path in [*(directory / "run" / "checkpoints").glob("*.json"), directory / "run" / "final_model.json"]:
        found = json.loads(path.read_text())
        step = found["training_steps"]
        results[step] = {
            "success": found["success_rate"], "cpu_s": summary["cpu_time_s"] * step / summary["total_timesteps"],
            "outcomes": [episode["success"] for episode in found["episode_list"]],
            "commit": found["provenance"]["git"]["commit"],
        }  # fmt: skip
    return results


def read_row(directory: Path) -> dict[str, Any]:
    """All finished seeds of a row: mean success, its interval, worst seed and CPU time, for every number of steps.

    A number of steps has the seeds that were trained for as many.
    """
    done = sorted(path.parent for path in directory.glob("seed_*/done"))
    if not done:
        raise SO101Error(f"--runs: {directory} has no finished seed; run benchmark/steps_and_time.sh")
    seeds = {path.name.removeprefix("seed_"): read_seed(path) for path in done}
    points = []
    for step in sorted(set().union(*seeds.values())):
        at = [each[step] for each in seeds.values() if step in each]
        rates, outcomes = np.array([each["success"] for each in at]), np.array([each["outcomes"] for each in at])
        interval = rate_interval(rates, outcomes.shape[1], outcomes) if len(rates) > 1 else [float("nan")] * 2
        points.append({
            "steps": step, "success": float(rates.mean()), "ci95": interval, "worst": float(rates.min()),
            "cpu_s": float(np.mean([each["cpu_s"] for each in at])), "seeds": rates.tolist(),
        })  # fmt: skip
    commits = sorted({each["commit"] for seed in seeds.values() for each in seed.values()})
    return {"seeds": [*seeds], "episodes": outcomes.shape[1], "commits": commits, "points": points}


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Success over steps, and over CPU time: mean over the seeds, its 95 % interval, and the worst seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for color, name in zip(("tab:orange", "tab:blue"), PICTURE):
        points = [{"steps": 0, "cpu_s": 0.0, "success": 0.0, "ci95": [0.0, 0.0], "worst": 0.0}, *rows[name]["points"]]
        mean, low, high, worst = (
            np.array([value(each) for each in points])
            for value in (
                lambda p: p["success"], lambda p: p["ci95"][0], lambda p: p["ci95"][1], lambda p: p["worst"],
            )
        )  # fmt: skip
        counts = {len(each["seeds"]) for each in rows[name]["points"]}
        label = f"{TITLES[name]} ({' to '.join(map(str, sorted({min(counts), max(counts)})))} seeds)"
        for axis, key, first in zip(axes, ("steps", "cpu_s"), (0, 1)):  # a logarithmic axis has no 0
            x = [each[key] for each in points][first:]
            axis.plot(x, mean[first:], color=color, marker="o", markersize=3, label=label)
            axis.plot(x, worst[first:], color=color, linewidth=0.8, linestyle="--")
            axis.fill_between(x, low[first:], high[first:], color=color, alpha=0.25, linewidth=0)
    axes[0].set(xlabel="environment steps", ylabel="success, 200 held-out episodes", ylim=(0, 1))
    axes[0].xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
    axes[1].set(xlabel="CPU time of training, one thread, s", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.suptitle("mean over the seeds with its 95 % interval; dashed: the worst seed", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = ["| run | steps | seeds | success | 95 % | worst seed | CPU s |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        for point in row["points"]:
            low, high = point["ci95"]
            lines.append(
                f"| {TITLES[name]} | {point['steps']:,} | {len(point['seeds'])} | {point['success']:.3f} | "
                f"[{low:.3f}, {high:.3f}] | {point['worst']:.2f} | {point['cpu_s']:.0f} |"
            )
    commits = sorted({commit[:12] for row in rows.values() for commit in row["commits"]})
    return "\n".join(["# Steps and time", "", *lines, "", f"Commit {', '.join(commits)}.", ""])


def main() -> int:
    """Read the sweeps and write the report; returns the exit code."""
    args = parse(Args, __doc__)
    out, kept = Path(args.out), {}
    if not (found := {name for name in TITLES if (Path(args.runs) / name).is_dir()}):
        raise SO101Error(f"--runs {args.runs}: has no sweep; run benchmark/steps_and_time.sh")
    if (out / "rows.json").is_file():
        kept = json.loads((out / "rows.json").read_text())
    rows = {name: read_row(Path(args.runs) / name) if name in found else kept.get(name) for name in TITLES}
    rows = {name: row for name, row in rows.items() if row}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "rows.json", rows)
    (out / "results.md").write_text(markdown(rows))
    if all(name in rows for name in PICTURE):
        plot(rows, out / "curves.png")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
