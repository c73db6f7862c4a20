"""Report of a seed sweep: learning curves and a table, from evaluations, summaries and event files.

    python benchmark/report.py --runs logs/benchmark/standard_50k --out benchmark/results/standard_50k

benchmark/ppo_residual_so101.sh makes the runs, and calls this script.
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.checkpoints import load_script
from so101.cli import OF_A_RUN, flat_settings, parse, run_script, training_command
from so101.files import write_json
from so101.stats import MANY, bootstrap_interval, interquartile_mean, rate_interval
from so101.trust import Trust
from so101_env import SO101Error

ROOT = Path(__file__).resolve().parent.parent
HOLD = 10_000  # environment steps for which a success rate must be kept to count as reached
DISTANCES_MM = (40, 80, 100, 120)  # bins of the initial distance from the sheet to the tape
TRAINING_SUCCESS = "rollout/success_rate_100"
CURVES = {"success_rate": "success", "mean_return": "return"}  # values of evaluations that are plotted


@dataclasses.dataclass
class Args:
    runs: str
    """directory of the sweep, with one seed_<n> directory per seed"""
    out: str
    """directory to write results.md, results.json and learning_curves.png into"""
    name: str | None = None
    """name of the sweep, for titles (default: the last part of --runs)"""
    against: tuple[str, ...] = ()
    """directories of other sweeps to plot on the same axes"""
    allow: tuple[str, ...] = ()
    """your own training script, which is loaded for its defaults, as in --allow my_ppo.py"""


def read_seed(directory: Path) -> dict[str, Any]:
    """Configuration, results and curves of one seed. Raises SO101Error, naming the file, if a part is missing."""
    runs = sorted(path.parent for path in directory.glob("*/config.json"))
    if len(runs) != 1:
        raise SO101Error(
            f"--runs: {directory} must contain one run, it has {len(runs)}; delete it and train the seed again"
        )
    files = {
        "config": runs[0] / "config.json",
        "summary": runs[0] / "training_summary.json",
        "final": directory / "final_model.json",
        "best": directory / "best_model.json",
    }
    for path in files.values():
        if not path.is_file():
            raise SO101Error(
                f"--runs: {path} is missing; run benchmark/ppo_residual_so101.sh again to finish the sweep"
            )
    seed = {name: json.loads(path.read_text()) for name, path in files.items()}
    events = EventAccumulator(str(runs[0] / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    if TRAINING_SUCCESS not in events.Tags()["scalars"]:
        raise SO101Error(f"--runs: no episode ended in {runs[0]}; train longer")
    seed[TRAINING_SUCCESS] = np.array([(event.step, event.value) for event in events.Scalars(TRAINING_SUCCESS)])
    path = runs[0] / "eval_results" / "evaluations.jsonl"
    if not path.is_file():
        raise SO101Error(f"--runs: {runs[0]} was trained without evaluations; drop --eval-every 0")
    evaluations = [json.loads(line) for line in path.read_text().splitlines()]
    for key in CURVES:
        seed[key] = np.array([(each["step"], each[key]) for each in evaluations])
    return seed


def steps_to(curve: np.ndarray, level: float) -> int | None:
    """First step from which a curve (T, 2) of steps and values keeps a level for HOLD steps, or to its end.

    HOLD is needed because successful episodes end first, so the first success rates are too high. None if there is no
    such step.
    """
    for i, step in enumerate(curve[:, 0]):
        if (curve[i:, 1][curve[i:, 0] <= step + HOLD] >= level).all():
            return int(step)
    return None


def success_by_distance(seeds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Success rate and number of episodes, over all final models, by initial distance of the sheet."""
    episodes = [episode for seed in seeds for episode in seed["final"]["episode_list"]]
    result = {}
    for low, high in zip(DISTANCES_MM, DISTANCES_MM[1:]):
        inside = [episode["success"] for episode in episodes if low <= 1000 * episode["initial_distance_m"] < high]
        if inside:
            result[f"{low} to {high} mm"] = [float(np.mean(inside)), len(inside)]
    return result


def settings(seed: dict[str, Any]) -> dict[str, Any]:
    """The arguments that all seeds of a sweep have in common."""
    return {
        key: value for key, value in flat_settings(seed["config"]["args"]).items() if key not in {"seed", *OF_A_RUN}
    }


def read_sweep(directory: str) -> list[dict[str, Any]]:
    """All seeds of a sweep. Raises SO101Error if there are none, or if their arguments differ."""
    directories = sorted(Path(directory).glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_")))
    if not directories:
        raise SO101Error(f"--runs {directory}: has no seed_<n> directory; benchmark/ppo_residual_so101.sh makes them")
    seeds = [read_seed(each) for each in directories]
    for each, seed in zip(directories, seeds):
        for key, value in settings(seed).items():
            if value != (first := settings(seeds[0])[key]):
                raise SO101Error(
                    f"--runs: {each} was trained with {key} {value}, {directories[0]} with {first}; delete one"
                )
    return seeds


def plot(sweeps: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot success and return over steps, and the performance profile of the final models.

    Seeds are thin lines, their interquartile mean is thick; from MANY seeds on, its bootstrap 95 % band is shaded.
    """
    figure, axes = plt.subplots(1, len(CURVES) + 1, figsize=(14, 4), layout="constrained")
    colors = "tab:blue", "tab:orange", "tab:green", "tab:purple"
    for axis, (tag, label) in zip(axes, CURVES.items()):
        for color, (name, seeds) in zip(colors, sweeps.items()):
            steps = seeds[0][tag][:, 0]
            values = np.array([np.interp(steps, *seed[tag].T) for seed in seeds])
            axis.plot(steps, values.T, color=color, linewidth=0.6, alpha=0.4)
            if len(seeds) >= MANY:
                axis.fill_between(steps, *bootstrap_interval(values), color=color, alpha=0.25, linewidth=0)
            axis.plot(steps, interquartile_mean(values, axis=0), color=color, linewidth=2, label=name)
        axis.set(xlabel="environment steps", ylabel=f"{label}, evaluations of the mean action")
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    for color, (name, seeds) in zip(colors, sweeps.items()):
        rates = np.sort([seed["final"]["success_rate"] for seed in seeds])
        axes[-1].step([0, *rates, 1], [1, *np.linspace(1, 0, len(rates) + 1)[:-1], 0], color=color, label=name)
    lowest = min(seed["final"]["success_rate"] for seeds in sweeps.values() for seed in seeds)
    axes[-1].set(xlim=(max(0, lowest - 0.1), 1), ylim=(0, 1.02), xlabel="success of the final model")
    axes[-1].set_ylabel("share of seeds with at least this success")
    axes[-1].grid(alpha=0.3)
    counts = " and ".join(str(count) for count in sorted({len(seeds) for seeds in sweeps.values()}))
    if len(sweeps) > 1:
        axes[0].legend(fontsize=8)
    figure.suptitle(
        f"{' against '.join(sweeps)}: {counts} seeds, their interquartile mean, and performance profile", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summarize(seeds: list[dict[str, Any]], name: str, trust: Trust) -> dict[str, Any]:
    """The content of results.json: the sweep as a whole, and a row for each seed."""
    rows = []
    for seed in seeds:
        row = {"seed": seed["config"]["args"]["seed"]}
        for model in ("final", "best"):
            row |= {f"{model}_success": seed[model]["success_rate"], f"{model}_return": seed[model]["mean_return"]}
        row["final_outcomes"] = "".join(str(int(each["success"])) for each in seed["final"]["episode_list"])
        row["final_length"] = seed["final"]["mean_length"]
        if seed["summary"]["base_time_s"]:
            row["base_time_s"] = seed["summary"]["base_time_s"]
        for percent in (50, 85):
            row[f"steps_to_{percent}"] = steps_to(seed[TRAINING_SUCCESS], percent / 100)
        row |= {"wall_time_s": seed["summary"]["wall_time_s"], "cpu_time_s": seed["summary"]["cpu_time_s"]}
        rows.append(row)
    versions = {seed["config"]["version"] for seed in seeds}
    final = np.array([row["final_success"] for row in rows])
    outcomes = np.array([[int(digit) for digit in row["final_outcomes"]] for row in rows])
    config = seeds[0]["config"]
    command = training_command(load_script(config["script"], "config.json", trust), settings(seeds[0]))
    base = next((seed["final"]["base"] for seed in seeds if seed["final"]["base"]), None)
    commits = sorted({f"{s['config']['git']['commit']}{'+' * bool(s['config']['git']['dirty'])}" for s in seeds})
    return {
        "name": name,
        "command": command,
        "version": ", ".join(sorted(versions)),
        "commits": commits,
        "episodes": seeds[0]["final"]["episodes"],
        "final_success_mean": float(final.mean()),
        "final_success_mean_ci95": rate_interval(final, outcomes.shape[1], outcomes),
        "final_success_min": float(final.min()),
        "final_success_iqm": float(interquartile_mean(final)),
        "final_success_iqm_ci95": [*map(float, bootstrap_interval(final))] if len(final) >= MANY else None,
        "best_success_mean": float(np.mean([row["best_success"] for row in rows])),
        "final_success_by_distance": success_by_distance(seeds),
        "base_success": base["success_rate"] if base else None,
        "base_length": base["mean_length"] if base else None,
        "seeds": rows,
    }


def sentence(results: dict[str, Any]) -> str:
    """The result of the sweep in one line."""

    low, high = results["final_success_mean_ci95"]
    text = f"Final success: mean {results['final_success_mean']:.3f} [{low:.3f}, {high:.3f}] (95 %, over seeds and "
    text += f"episodes), worst seed {results['final_success_min']:.2f}, interquartile mean "
    text += f"{results['final_success_iqm']:.3f}"
    if bounds := results["final_success_iqm_ci95"]:
        text += f" [{bounds[0]:.3f}, {bounds[1]:.3f}] (bootstrap 95 %, over seeds)"
    if results["base_success"] is not None:
        text += f". Base policy alone: {results['base_success']:.2f}, {results['base_length']:.0f} steps per episode"
    return f"{text}."


def markdown(results: dict[str, Any]) -> str:
    """The content of results.md."""
    rows = results["seeds"]
    columns = {
        "seed": "seed", "final_success": "final model: success", "final_return": "return", "final_length": "length",
        "best_success": "best model: success", "best_return": "return", "steps_to_50": "steps to 50 %",
        "steps_to_85": "steps to 85 %",
        "wall_time_s": "wall s", "base_time_s": "base policy s", "cpu_time_s": "CPU s",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if key in rows[0]}

    def cell(key: str, value: Any) -> str:
        if value is None:
            return "-"
        if key.startswith("steps"):
            return f"{value:,.0f}"
        if key == "seed":
            return str(value)
        return f"{value:.2f}" if "success" in key or "return" in key else f"{value:.0f}"

    means = {key: [row[key] for row in rows if row[key] is not None] for key in columns}
    averages = [cell(key, float(np.mean(means[key]))) if len(means[key]) == len(rows) else "-" for key in columns]
    seeds, commits = (
        " ".join(str(row["seed"]) for row in rows),
        ", ".join(commit[:12] + "+" * commit.endswith("+") for commit in results["commits"]),
    )
    distances = results["final_success_by_distance"]
    lines = [
        f"# {results['name']}",
        "",
        f"`{results['command']}`, seeds {seeds}, version {results['version']}, commit {commits}",
        f"(a + marks local changes). {results['episodes']} held-out episodes per model, mean action. Steps to 50 and",
        "85 %: when this share of the last 100 training episodes, with exploration noise, succeeded, and still did for",
        f"the next {HOLD:,} steps.",
        "",
        "| " + " | ".join(columns.values()) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(key, row[key]) for key in columns) + " |" for row in rows),
        "| " + " | ".join(["**mean**", *averages[1:]]) + " |",
        "",
        sentence(results),
        "",
        "| initial distance | " + " | ".join(distances) + " |",
        "|" + "---|" * (1 + len(distances)),
        "| final success | " + " | ".join(f"{success:.2f}" for success, _ in distances.values()) + " |",
        "| episodes | " + " | ".join(f"{count:,}" for _, count in distances.values()) + " |",
        "",
        "![learning curves](learning_curves.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Read the seeds of a sweep and write the report; returns the exit code."""
    args = parse(Args, __doc__)
    seeds = read_sweep(args.runs)
    name, out = args.name or Path(args.runs).name, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    results = summarize(seeds, name, Trust(args.allow))
    write_json(out / "results.json", results)
    (out / "results.md").write_text(markdown(results))
    plot({name: seeds} | {Path(each).name: read_sweep(each) for each in args.against}, out / "learning_curves.png")
    print(f"{sentence(results)} Report: {out}/results.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
