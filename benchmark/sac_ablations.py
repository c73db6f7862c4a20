"""What each change costs SAC, of the runs of benchmark/sac_ablations.sh: a table, paired by seed.

    python benchmark/sac_ablations.py --runs logs/benchmark/sac_ablations --out benchmark/results/sac_ablations

Every row is compared with the row that it changes on the seeds that both have: the mean difference with Student's
interval, and the p value of the paired t test, corrected for the number of rows (Holm 1979).
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.cli import parse, run_script
from so101.files import write_json
from so101.stats import holm, paired_difference, rate_interval
from so101_env import SO101Error

UNCHANGED = {"": "default", "pusher_": "pusher"}  # prefix of a row, and what it changes: the longest prefix counts


@dataclasses.dataclass
class Args:
    runs: str
    """directory of the sweep, with ROW/seed_N/final_model.json"""
    out: str
    """directory to write rows.json and results.md into"""


def read_row(directory: Path) -> dict[str, Any]:
    """Success of every finished seed of a row, its interval over seeds and episodes, and the mean CPU time in s."""
    paths = sorted(directory.glob("seed_*/final_model.json"))
    results = [json.loads(path.read_text()) for path in paths]
    outcomes = np.array([[episode["success"] for episode in each["episode_list"]] for each in results])
    summaries = [json.loads((path.parent / "run" / "training_summary.json").read_text()) for path in paths]
    rates = outcomes.mean(1)
    return {
        "seeds": {path.parent.name.removeprefix("seed_"): float(rate) for path, rate in zip(paths, rates)},
        "success": float(rates.mean()), "ci95": rate_interval(rates, outcomes.shape[1], outcomes),
        "cpu_s": float(np.mean([each["cpu_time_s"] for each in summaries])),
        "commits": sorted({each["provenance"]["git"]["commit"] for each in results}),
    }  # fmt: skip


def compare(row: dict[str, Any], unchanged: dict[str, Any]) -> dict[str, Any]:
    """Mean difference of a row to what it changes, its 95 % interval and p value, paired by seed."""
    seeds = sorted(row["seeds"].keys() & unchanged["seeds"].keys())
    if len(seeds) < 2:
        return {}
    theirs, ours = (np.array([each["seeds"][seed] for seed in seeds]) for each in (unchanged, row))
    return dict(zip(("difference", "difference_ci95", "p"), paired_difference(theirs, ours)))


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| row | seeds | success | 95 % | worst | difference | 95 % | p (Holm) | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["ci95"]
        paired = " | | "
        if "p" in row:
            down, up = row["difference_ci95"]
            paired = f"{row['difference']:+.3f} | [{down:+.2f}, {up:+.2f}] | {row['p_holm']:.2g}"
        lines.append(
            f"| {name} | {len(row['seeds'])} | {row['success']:.3f} | [{low:.2f}, {high:.2f}] | "
            f"{min(row['seeds'].values()):.2f} | {paired} | {row['cpu_s']:.0f} |"
        )
    commits = sorted({commit[:12] for row in rows.values() for commit in row["commits"]})
    return "\n".join(["# SAC, one change at a time", "", *lines, "", f"Commit {', '.join(commits)}.", ""])


def main() -> int:
    """Read the runs and write the report; returns the exit code."""
    args = parse(Args, __doc__)
    out = Path(args.out)
    done = sorted({path.parent.parent for path in Path(args.runs).glob("*/seed_*/final_model.json")})
    if not done:
        raise SO101Error(f"--runs {args.runs}: has no finished run; run benchmark/sac_ablations.sh")
    rows = {directory.name: read_row(directory) for directory in done}
    order = sorted(rows, key=lambda name: (name.startswith("pusher"), name not in UNCHANGED.values(), name))
    rows = {name: rows[name] for name in order}
    for name, row in rows.items():
        prefix = max((each for each in UNCHANGED if name.startswith(each)), key=len)
        if name != (unchanged := UNCHANGED[prefix]) and name not in UNCHANGED.values() and unchanged in rows:
            row |= compare(row, rows[unchanged])
    compared = [row for row in rows.values() if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        row["p_holm"] = p
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "rows.json", rows)
    (out / "results.md").write_text(markdown(rows))
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
