"""The seed sweep and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHON_PATH, ROOT, SMALL

sys.path.insert(0, str(ROOT / "benchmark"))
import report

SHORT = SMALL.replace("--total-timesteps 3000", "--total-timesteps 1200").replace(
    "--eval-every 1500", "--eval-every 600"
)


def sweep(tmp_path: Path, *flags: str, seeds: str = "1 2") -> subprocess.CompletedProcess:
    variables = {"NAME": "trial", "SEEDS": seeds, "EPISODES": "3", "JOBS": "2"}
    variables |= {"RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "benchmark" / "ppo_residual_so101.sh"), *SHORT.split(), *flags]
    environment = {**os.environ, **variables, "PATH": PYTHON_PATH}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_sweep_trains_reports_and_does_not_repeat_itself(tmp_path):
    flags = ("--train-episode-steps", "40")
    done = sweep(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 1 done" in done.stdout and "2 of 2" in done.stdout
    models = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/final_model.pt")}
    assert len(models) == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["seed"] for row in results["seeds"]] == [1, 2] and results["episodes"] == 3
    for row in results["seeds"]:
        final = json.loads((tmp_path / "runs" / f"seed_{row['seed']}" / "final_model.json").read_text())
        assert row["final_success"] == final["success_rate"] and row["final_return"] == final["mean_return"]
        assert 0 < row["cpu_time_s"] < 100 and 0 < row["wall_time_s"] < 100
    assert "--train-episode-steps 40" in results["command"] and "seed" not in results["command"]
    finals = [json.loads(path.read_text())["episode_list"] for path in tmp_path.glob("runs/*/final_model.json")]
    far = [e["success"] for episodes in finals for e in episodes if e["initial_distance_m"] >= 0.1]
    assert results["final_success_by_distance"]["100 to 120 mm"] == [np.mean(far), len(far)]
    table = (tmp_path / "out" / "results.md").read_text()
    assert results["commits"][0][:12] in table and f"{results['seeds'][1]['final_return']:.2f}" in table
    assert (tmp_path / "out" / "learning_curves.png").stat().st_size > 10_000
    # one seed more: only that one is trained
    assert sweep(tmp_path, *flags, seeds="1 2 3").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["seeds"]) == 3
    # other flags under the same name are another experiment
    done = sweep(tmp_path, *flags, "--gamma", "0.9", seeds="1 2 3 4")
    assert done.returncode == 2 and "gamma" in done.stderr and "Traceback" not in done.stderr


def test_sweep_names_the_seeds_that_failed(tmp_path):
    done = sweep(tmp_path, "--gamma", "3", seeds="4 7")
    assert done.returncode == 1 and "failed seeds: 4 7" in done.stderr
    assert "--gamma" in done.stdout and not (tmp_path / "out").exists()


def test_interquartile_mean_and_its_interval():
    """Against the definition: the middle half by sorting, and resampled seeds one by one."""
    values = np.random.default_rng(1).normal(0, 1, (8, 3))
    middle = np.sort(values, axis=0)[2:6].mean(0)
    np.testing.assert_allclose(report.interquartile_mean(values, axis=0), middle)
    rng = np.random.default_rng(2)
    resampled = [values[rng.integers(0, 8, 8)] for _ in range(4000)]
    middles = [np.sort(each, axis=0)[2:6].mean(0) for each in resampled]
    for statistic, samples in ((report.interquartile_mean, middles), (np.mean, [each.mean(0) for each in resampled])):
        low, high = report.interval(values, statistic)
        expected = np.percentile(samples, [2.5, 97.5], axis=0)
        np.testing.assert_allclose([low, high], expected, atol=0.1)  # two bootstraps, 2,000 and 4,000: 0.03 apart


@pytest.mark.parametrize("level, step", [(0.8, None), (0.6, 30_000), (0.2, 5_000), (0.65, 45_000)])
def test_steps_to_a_level_that_holds(level, step):
    curve = [[5_000, 0.7], [12_000, 0.3], [30_000, 0.6], [36_000, 0.6], [45_000, 0.7]]
    assert report.steps_to(np.array(curve), level) == step
