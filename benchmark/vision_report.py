"""Table of students and their teachers, from the runs of benchmark/vision.sh.

python benchmark/vision_report.py --runs logs/benchmark/vision/students --out benchmark/results/vision

A kind of student that --out has already and --runs has not stays in the table.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.cli import parse, run_script
from so101.files import write_atomic, write_json
from so101_env import SO101Error

DISTANCES_MM = (40, 80, 100, 120)  # bins of the initial distance from the sheet to the tape


@dataclasses.dataclass
class Args:
    runs: str
    """directory with a directory for each kind of student, which has a directory seed_<n> for each seed"""
    out: str
    """directory to write results.md and results.json into"""


def read_student(run: Path) -> dict[str, object]:
    """Results of one student and its teacher."""
    result, summary, config = (
        json.loads((run / f"{name}.json").read_text()) for name in ("student", "training_summary", "config")
    )
    episodes = result["episode_list"]
    distance = 1000 * np.array([episode["initial_distance_m"] for episode in episodes])
    success = np.array([episode["success"] for episode in episodes])
    error = 1000 * np.array([episode["estimate_error_m"] for episode in episodes])
    parts = [(distance >= low) & (distance < high) for low, high in zip(DISTANCES_MM[:-1], DISTANCES_MM[1:])]
    return {
        "seed": config["args"]["seed"],
        "student": result["success_rate"],
        "teacher": result["base_success_rate"],
        "length": result["mean_length"],
        "teacher_length": result["base"]["mean_length"],
        "estimate_error_mm": float(np.median(error)),
        "estimate_error_successes_mm": float(np.median(error[success])) if success.any() else None,
        "estimate_error_failures_mm": float(np.median(error[~success])) if not success.all() else None,
        "by_distance": [float(success[part].mean()) if part.any() else None for part in parts],
        "wall_time_s": summary["wall_time_s"],
        "steps": summary["total_timesteps"],
        "commit": (config["git"]["commit"] or "unknown")[:7] + "+" * bool(config["git"]["dirty"]),
    }


def main() -> int:
    """Write the report; returns the exit code."""
    args = parse(Args, __doc__)
    kinds = {
        kind.name: [read_student(run) for run in sorted(kind.glob("seed_*")) if (run / "student.json").is_file()]
        for kind in sorted(Path(args.runs).iterdir())
    }
    kinds = {name: seeds for name, seeds in kinds.items() if seeds}
    if not kinds:
        raise SO101Error(f"--runs {args.runs}: has no evaluated student; run benchmark/vision.sh")
    out = Path(args.out)
    if (out / "results.json").is_file():
        kinds = dict(sorted((json.loads((out / "results.json").read_text()) | kinds).items()))

    def mean(seeds: list[dict], key: str) -> float:
        return float(np.mean([seed[key] for seed in seeds if seed[key] is not None] or [np.nan]))

    bins = ", ".join(f"{low} to {high} mm" for low, high in zip(DISTANCES_MM[:-1], DISTANCES_MM[1:]))
    lines = [
        "# Students\n",
        "Success on held-out episodes. Pose error: distance between the true and the estimated position of the sheet, "
        "as the median over episodes of an episode's mean; in brackets for failed episodes only. By distance: success "
        f"by the sheet's initial distance, {bins}.\n",
        "| student | seeds | teacher | student | each seed | episode length, teacher and student | pose error, mm | by "
        "distance | steps, wall time | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in kinds.items():
        by_distance = [
            np.mean([seed["by_distance"][i] for seed in seeds if seed["by_distance"][i] is not None] or [np.nan])
            for i in range(len(DISTANCES_MM) - 1)
        ]
        cells = [
            name,
            len(seeds),
            f"{mean(seeds, 'teacher'):.2f}",
            f"**{mean(seeds, 'student'):.3f}**",
            " ".join(f"{seed['student']:.2f}" for seed in seeds),
            f"{mean(seeds, 'teacher_length'):.0f}, {mean(seeds, 'length'):.0f}",
            f"{mean(seeds, 'estimate_error_mm'):.1f} ({mean(seeds, 'estimate_error_failures_mm'):.1f})",
            ", ".join(f"{value:.2f}" for value in by_distance),
            f"{seeds[0]['steps']}, {mean(seeds, 'wall_time_s') / 60:.1f} min",
            " ".join(sorted({seed["commit"] for seed in seeds})),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", kinds)
    write_atomic(out / "results.md", lambda temporary: temporary.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
