"""Report of benchmark/practice.sh: success before and after practice, and how success grew over arm time.

python benchmark/practice_report.py --runs logs/benchmark/practice --out benchmark/results/practice
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
from so101.learner import RECENT
from so101.stats import paired_difference, rate_interval
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ

TITLES = {
    "nothing": "nothing wrong", "lift": "shoulder_lift -3 degrees", "gain": "servo gain x0.7",
    "backlash": "backlash 3 degrees", "finger": "finger friction 0.3", "table": "finger friction 0.4, table 0.4",
}  # fmt: skip
LAST_S, REACHED = 300.0, 0.9  # the last five minutes; the success that counts as reached


@dataclasses.dataclass
class Args:
    runs: str
    """directory of the runs, with ROW/seed_N/, ROW/seed_N.json, ROW/seed_N_before.json and ROW/seed_N_prior.json"""
    out: str
    """directory to write rows.json, results.md and curves.png into"""


def outcomes_of(path: Path) -> list[bool]:
    """The successes in a file of benchmark/practised_arm.py."""
    return [episode["success"] for episode in json.loads(path.read_text())["episode_list"]]


def read_seed(result: Path) -> dict[str, Any]:
    """One practice: success after it, and what happened meanwhile."""
    config = json.loads((result.with_suffix("") / "config.json").read_text())
    lines = (result.with_suffix("") / "episodes.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines]
    time_s = np.array([each["arm_time_s"] for each in episodes])
    success = np.array([each["success"] for each in episodes], float)
    recent = np.array([success[max(0, i + 1 - RECENT) : i + 1].mean() for i in range(len(success))])
    prior = result.with_name(f"{result.stem}_prior.json")
    enough = (np.arange(len(recent)) >= RECENT - 1) & (recent >= REACHED)
    return {
        "seed": int(result.stem.removeprefix("seed_")),
        "version": config["version"], "demonstrated": config["args"].get("demos") is not None,
        "outcomes": outcomes_of(result), "before": outcomes_of(result.with_name(f"{result.stem}_before.json")),
        "prior": outcomes_of(prior) if prior.exists() else None,
        "time_s": time_s.tolist(), "recent": recent.tolist(),
        "episodes": len(episodes), "hands": int(sum(each["hands"] for each in episodes)),
        "last": float(success[time_s > time_s[-1] - LAST_S].mean()),
        "reached_min": float(time_s[enough][0] / 60) if enough.any() else None,
        "reset_s": float(np.mean([each["reset_ticks"] for each in episodes]) / CONTROL_HZ),
    }  # fmt: skip


def read_row(directory: Path) -> dict[str, Any] | None:
    """A row: before, and after each practice. None: no practice has finished."""
    results = [path for path in directory.glob("seed_*.json") if path.stem.count("_") == 1]
    if not results:
        return None
    seeds = sorted((read_seed(each) for each in results), key=lambda seed: seed["seed"])
    if len({len(seed[name]) for seed in seeds for name in ("outcomes", "before", "prior") if seed[name]}) > 1:
        raise SO101Error(f"--runs: the evaluations in {directory} have different numbers of episodes; run them again")
    outcomes = np.array([seed["outcomes"] for seed in seeds])
    rates, priors = outcomes.mean(1), [seed["prior"] for seed in seeds]
    start = np.mean([seed["prior"] or seed["before"] for seed in seeds], axis=1)  # with what practice began
    gained, gained_ci95 = float((rates - start).mean()), None
    if len(seeds) > 1:
        gained, gained_ci95, _ = paired_difference(start, rates)
    return {
        "gained": gained, "gained_ci95": gained_ci95,
        "prior": None if None in priors else float(np.mean(priors)),
        "before": float(np.mean([seed["before"] for seed in seeds])), "after": float(rates.mean()),
        "worst": float(rates.min()), "after_ci95": rate_interval(rates, outcomes.shape[1], outcomes), "seeds": seeds,
        "hands_per_100": 100 * sum(seed["hands"] for seed in seeds) / sum(seed["episodes"] for seed in seeds),
    }  # fmt: skip


def is_demonstrated(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether practice began with demonstrations instead of a policy."""
    return all(seed["demonstrated"] for row in rows.values() for seed in row["seeds"])


def table(rows: list[dict[str, str]]) -> list[str]:
    """The lines of a table in Markdown: rows of cells by column."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return [head, "|" + "---|" * len(rows[0]), *body]


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The tables: rows, and every seed."""
    demonstrated = is_demonstrated(rows)

    def begin(before: float, prior: float | None, digits: int) -> dict[str, str]:
        if demonstrated:
            return {"demonstrator": f"{before:.{digits}f}"}
        return {"policy": f"{before:.{digits}f}", "with the prior": "-" if prior is None else f"{prior:.{digits}f}"}

    means, singles = [], []
    for name, row in rows.items():
        seeds, (low, high) = row["seeds"], row["after_ci95"]
        reached = [seed["reached_min"] for seed in seeds]
        minutes = (
            f"{np.median(reached):.0f}" if None not in reached else f"not in {reached.count(None)} of {len(seeds)}"
        )
        gained = f"{row['gained']:+.2f}"
        if row["gained_ci95"]:
            gained += " [{:+.2f}, {:+.2f}]".format(*row["gained_ci95"])
        means.append({
            "wrong with the arm": TITLES[name], **begin(row["before"], row["prior"], 2),
            "after practice": f"{row['after']:.2f}", "95 %": f"[{low:.2f}, {high:.2f}]",
            "worst": f"{row['worst']:.2f}", "seeds": f"{len(seeds)}",
            **({} if demonstrated else {"gained by practice, 95 % over the seeds": gained}),
            "in the last 5 minutes, exploring": f"{np.mean([seed['last'] for seed in seeds]):.2f}",
            "minutes until 0.9": minutes, "hands per 100 episodes": f"{row['hands_per_100']:.1f}",
            "s per reset": f"{np.mean([seed['reset_s'] for seed in seeds]):.1f}",
        })  # fmt: skip
        for seed in seeds:
            prior = np.mean(seed["prior"]) if seed["prior"] else None
            singles.append({
                "wrong with the arm": TITLES[name], "seed": f"{seed['seed']}",
                **begin(np.mean(seed["before"]), prior, 3), "after practice": f"{np.mean(seed['outcomes']):.3f}",
                "in the last 5 minutes, exploring": f"{seed['last']:.2f}",
                "minutes until 0.9": "-" if seed["reached_min"] is None else f"{seed['reached_min']:.0f}",
                "episodes": f"{seed['episodes']}", "hands": f"{seed['hands']}", "s per reset": f"{seed['reset_s']:.1f}",
            })  # fmt: skip
    versions = sorted({seed["version"] for row in rows.values() for seed in row["seeds"]})
    start = " from demonstrations alone" if demonstrated else ""
    title = f"# Practice{start}, version {' and '.join(versions)}"
    return "\n".join([title, "", *table(means), "", *table(singles), ""])


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Success of the last RECENT episodes, exploration included, over arm time; a line per practice."""
    figure, axes = plt.subplots(
        1, len(rows), figsize=(3.7 * len(rows), 3.6), layout="constrained", sharey=True, squeeze=False
    )  # fmt: skip
    for axis, (name, row) in zip(axes[0], rows.items()):
        axis.set_title(TITLES[name], fontsize=9)
        axis.grid(alpha=0.3)
        axis.axhline(row["before"], color="tab:gray", linestyle="--", linewidth=1)
        for seed in row["seeds"]:
            first = RECENT - 1
            axis.plot(np.array(seed["time_s"][first:]) / 60, seed["recent"][first:], color="tab:orange", linewidth=1)
        axis.set_xlabel("arm time, minutes")
    axes[0, 0].set(ylabel=f"success of the last {RECENT} episodes", ylim=(0, 1))
    dashed = "the demonstrator" if is_demonstrated(rows) else "the policy before"
    figure.suptitle(f"practice on a simulated arm with one thing wrong; dashed: {dashed}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Read the runs and write the report; returns the exit code."""
    args = parse(Args, __doc__)
    out = Path(args.out)
    rows = {name: row for name in TITLES if (row := read_row(Path(args.runs) / name))}
    if not rows:
        raise SO101Error(f"--runs {args.runs}: has no practice that has finished; run benchmark/practice.sh")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "rows.json", rows)
    (out / "results.md").write_text(markdown(rows))
    plot(rows, out / "curves.png")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
