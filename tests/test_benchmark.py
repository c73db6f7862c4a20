"""The seed sweep and its report; the other measurements run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHON_PATH, ROOT, SMALL, environment, run_script, train

sys.path.insert(0, str(ROOT / "benchmark"))
import report

SHORT = SMALL.replace("--total-timesteps 3000", "--total-timesteps 1200").replace(
    "--eval-every 1500", "--eval-every 600"
)


def test_interquartile_mean_and_its_interval():
    """Against the definition: the middle half after sorting, and seeds resampled one by one."""
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


def sweep(
    tmp_path: Path, *flags: str, seeds: str = "1 2", short: str = SHORT, **more: str
) -> subprocess.CompletedProcess:
    variables = {"NAME": "trial", "SEEDS": seeds, "EPISODES": "3", "JOBS": "2"}
    variables |= {"RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "out"), "PATH": PYTHON_PATH, **more}
    command = ["bash", str(ROOT / "benchmark" / "ppo_residual_so101.sh"), *short.split(), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), timeout=300)


def test_a_sweep_names_the_seeds_that_failed(tmp_path):
    done = sweep(tmp_path, "--gamma", "3", seeds="4 7")
    assert done.returncode == 1 and "failed seeds: 4 7" in done.stderr
    assert "--gamma" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_trains_reports_and_repeats_nothing(tmp_path):
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
    # with one more seed, only that one is trained
    assert sweep(tmp_path, *flags, seeds="1 2 3").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["seeds"]) == 3
    # other flags under the same name are another experiment
    done = sweep(tmp_path, *flags, "--gamma", "0.9", seeds="1 2 3 4")
    assert done.returncode == 2 and "gamma" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sweep_of_a_script_in_so101(tmp_path):
    short = SHORT.replace("--total-timesteps 1200", "--total-timesteps 512") + " --actor-image-size 16"
    flags = ("--train-episode-steps", "40", "--eval-every", "256")
    done = sweep(tmp_path, *flags, seeds="1", short=short, SCRIPT="so101/ppo_rgb.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`python -m so101.ppo_rgb --total-timesteps 512" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.slow
def test_students_are_reported(tmp_path):
    distil = "--total-timesteps 512 --num-envs 4 --updates 2 --minibatch-size 8 --image-size 32 --eval-every 0"
    students = tmp_path / "students" / "standard"
    run = train(students, *distil.split(), "--run-name", "seed_1", script="so101.distill")
    result = run / "student.json"
    flags = ("--model", str(run / "final_model.pt"), "--episodes", "3", "--json", str(result))
    assert run_script("eval_so101.py", *flags).returncode == 0
    done = run_script("benchmark/vision_report.py", "--runs", str(tmp_path / "students"),
                      "--out", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["standard"]
    given = json.loads(result.read_text())
    assert (row["seed"], row["steps"]) == (1, 512)
    assert (row["student"], row["teacher"]) == (given["success_rate"], given["base_success_rate"])
    errors = [episode["estimate_error_m"] for episode in given["episode_list"]]
    assert row["estimate_error_mm"] == pytest.approx(1000 * np.median(errors))


@pytest.mark.slow
def test_errors_of_opencv_are_measured(tmp_path):
    pytest.importorskip("cv2")
    result = tmp_path / "pose.json"
    done = run_script("benchmark/pose.py", "--episodes", "3", "--json", str(result))
    assert done.returncode == 0, done.stderr
    first = next(iter(json.loads(result.read_text()).values()))
    assert first["no_answer"] <= 1 and 0.1 < first["mean_mm"] < 5


@pytest.mark.slow
def test_speeds_are_measured():
    flags = "--steps 500 --repeats 1 --num-envs 2 --no-scaling --no-pixels --no-processes --no-sb3"
    done = run_script("benchmark/throughput.py", *flags.split())
    assert done.returncode == 0, done.stderr
    speeds = [
        float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith(("raw", "batched", "Gym"))
    ]
    assert len(speeds) == 5 and min(speeds) > 10


@pytest.mark.slow
def test_stable_baselines3_is_measured(tmp_path):
    pytest.importorskip("stable_baselines3")
    flags = f"--total-timesteps 256 --seeds 1 --num-envs 2 --episodes 2 --only ppo_ours --out {tmp_path}"
    done = run_script("benchmark/sb3_baseline.py", *flags.split())
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["setting"] == "ppo_ours" and row["steps"] >= 256 and 0 <= row["success"] <= 1
