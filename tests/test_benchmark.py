"""The seed sweep and its report; the other measurements run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHON_PATH, ROOT, SMALL, environment, run_script, train

sys.path.insert(0, str(ROOT / "benchmark"))
import check
import report
import sac_ablations
import sparse_sac

from so101_env import ACT_DIM, SO101Error

SHORT = SMALL.replace("--total-timesteps 3000", "--total-timesteps 1200").replace(
    "--eval-every 1500", "--eval-every 600"
)


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


ROWS = ROOT / "benchmark" / "results"


def check_row(monkeypatch: pytest.MonkeyPatch, results: Path, row: str, *flags: str) -> int:
    """Exit code of benchmark/check.py, run in this process."""
    argv = ["check.py", "--results", str(results), "--runs", str(results / "checked"), "--row", row, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    return check.main()


@pytest.mark.parametrize("row", ["standard_50k", "standard_200k", "precise_jacobian_50k"])
@pytest.mark.parametrize("count", [3, 5, 10])
def test_a_prediction_interval_contains_95_percent(row, count):
    """Published and fresh seeds are drawn from the seeds of a committed row."""
    success, episodes, _, _ = check.read_row(ROWS / row / "results.json")
    seeds, rng = [*success.values()], np.random.default_rng(3)
    low, high = check.prediction_interval(rng.choice(seeds, (20_000, len(seeds))), count, episodes)
    fresh = rng.choice(seeds, (20_000, count)).mean(-1)
    assert 0.91 < np.mean((low <= fresh + 1e-9) & (fresh - 1e-9 <= high)) < 0.97


def test_equal_seeds_do_not_promise_equal_means():
    low, high = check.prediction_interval(np.ones(5), 5, 200)
    assert 0.98 < low < 0.9995 and high == 1


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({}, "--row nope", "no such row; --list describes row"),
        ({}, "--seeds 0", "--seeds 0"),
        ({}, "--first-seed 402", "--first-seed 402: row was published with seed 402"),
        ({}, "--first-seed -1", "--first-seed -1"),
        ({"seeds": []}, "", "not the report of a seed sweep"),
        ({"seeds": [{"seed": 1, "final_success": 1.5, "wall_time_s": 1}]}, "", "not the report of a seed sweep"),
        ({"seeds": [{"seed": 1, "final_success": 0.5, "wall_time_s": 1}]}, "", "has one seed"),
        ({"episodes": None}, "", "not the report of a seed sweep"),
        ({"command": None}, "", "not the report of a seed sweep"),
        ({"version": None}, "", "not the report of a seed sweep"),
        ({"command": "python ppo_residual_so101.py 'open"}, "", "not the report of a seed sweep"),
        ({"command": ""}, "", "stale command: ''"),
        ({"command": "python -m"}, "", "stale command"),
        ({"command": "python -m so101.clone"}, "", "clone.py is not a trainer that a sweep can run"),
        ({"command": "python -m so101.distill"}, "", "distill.py is not a trainer that a sweep can run"),
        ({"command": "python ppo_residual_so101.py --help"}, "", "cannot read '--help'"),
        ({"command": "python ppo_residual_so101_rgb.py"}, "", "'ppo_residual_so101_rgb.py' is not a script"),
        ({"command": "python ../ppo_residual_so101.py"}, "", "is not"),
        ({"command": "python eval_so101.py"}, "", "was written by the script eval_so101.py"),
        ({"command": "touch ppo_residual_so101.py"}, "", "would not write touch"),
        ({"command": "python ppo_residual_so101.py --activation relu"}, "", "cannot read '--activation relu'"),
        ({"command": "python ppo_residual_so101.py --gamma much"}, "", "cannot read '--gamma much'"),
        ({"command": "python ppo_residual_so101.py --gamma 2"}, "", "--gamma"),
        ({"command": "python ppo_residual_so101.py --gamma 0.98"}, "", "would not write --gamma 0.98"),
        ({"command": "python ppo_residual_so101.py --log-dir elsewhere"}, "", "would not write --log-dir elsewhere"),
        ({"command": "python ppo_residual_so101.py --base-policy helper:Base"}, "", "--allow helper:Base"),
        ({"command": "python ppo_residual_so101.py --base-policy server:a:1"}, "", "--allow server:a:1"),
    ],
)
def test_rows_that_cannot_be_checked_end_with_one_line(tmp_path, monkeypatch, change, flags, message):
    row = json.loads((ROWS / "standard_50k" / "results.json").read_text()) | change
    (tmp_path / "row").mkdir()
    (tmp_path / "row" / "results.json").write_text(json.dumps(row))
    monkeypatch.setattr(check, "train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(SO101Error) as error:
        check_row(monkeypatch, tmp_path, "row", *flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_published_rows_can_be_checked_or_are_refused_by_name(tmp_path, monkeypatch, capsys):
    """A base policy that is missing or not allowed is refused."""
    monkeypatch.chdir(tmp_path)  # where no base policies are
    monkeypatch.setattr(sys, "argv", ["check.py", "--list"])
    assert check.main() == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {*lines} == {path.parent.name for path in ROWS.glob("*/results.json")}
    on_act = {"lerobot_act_50k", "lerobot_act_200k"}
    refused = {"vision", *on_act, "standard_bc_50k"}
    assert {row for row, line in lines.items() if "minutes each" not in line} == refused
    assert all("add --allow lerobot:" in lines[row] for row in on_act)
    assert lines["standard_bc_50k"].startswith("needs logs/bc_model.pt; benchmark/README.md has the commands")
    for row in {*lines} & {path.parent.name for path in ROWS.glob("*/results.md")}:
        page = (ROWS / row / "results.md").read_text()
        if row != "vision":
            assert f"version {json.loads((ROWS / row / 'results.json').read_text())['version']}" in page


@pytest.mark.slow
def test_a_sweep_trains_reports_repeats_nothing_and_is_checked(tmp_path, monkeypatch, capfd):
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
    words = shlex.split(results["command"])
    assert sorted(words) == sorted(
        ["python", "ppo_residual_so101.py", *SHORT.replace("--num-steps 64 ", "").split(), *flags]
    )
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
    # fresh seeds of that row agree with it, and not with a row of perfect seeds
    assert check_row(monkeypatch, tmp_path, "out", "--seeds", "2") == 0
    assert "seed 302" in (printed := capfd.readouterr().out) and "mean agrees" in printed
    fresh = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checked/out/*/*/final_model.pt")}
    assert len(fresh) == 2
    results["seeds"] = [results["seeds"][0] | {"seed": seed, "final_success": 1.0} for seed in range(20)]
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    assert check_row(monkeypatch, tmp_path, "out", "--seeds", "2") == 1
    assert "does not agree" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in fresh} == fresh
    # other flags under the same name are another experiment
    results["command"] += " --gamma 0.9"
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    with pytest.raises(SO101Error, match="seed_301: has other flags"):
        check_row(monkeypatch, tmp_path, "out", "--seeds", "2")
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
    report = ("benchmark/vision_report.py", "--runs", str(tmp_path / "students"), "--out", str(tmp_path / "out"))
    done = run_script(*report)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["standard"]
    given = json.loads(result.read_text())
    assert (row["seed"], row["steps"]) == (1, 512)
    assert (row["student"], row["teacher"]) == (given["success_rate"], given["base_success_rate"])
    errors = [episode["estimate_error_m"] for episode in given["episode_list"]]
    assert row["estimate_error_mm"] == pytest.approx(1000 * np.median(errors))
    # another kind, whose runs alone are at hand, takes no other's place
    students.rename(tmp_path / "students" / "precise")
    done = run_script(*report)
    assert done.returncode == 0, done.stderr
    kinds = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [*kinds.items()] == [("precise", [row]), ("standard", [row])]  # in one order, whenever they were made
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| standard | 1 |" in table and "| precise | 1 |" in table


@pytest.mark.slow
def test_errors_of_opencv_are_measured(tmp_path):
    pytest.importorskip("cv2")
    result = tmp_path / "pose.json"
    done = run_script("benchmark/pose.py", "--episodes", "3", "--json", str(result))
    assert done.returncode == 0, done.stderr
    first = next(iter(json.loads(result.read_text()).values()))
    assert first["no_answer"] <= 1 and 0.1 < first["mean_mm"] < 5


@pytest.mark.slow
def test_tables_are_composed_and_judged(tmp_path):
    pytest.importorskip("cv2")
    result, flags = tmp_path / "tables.json", ("--scenes", "2", "--pictures", str(tmp_path))
    done = run_script("benchmark/tables.py", *flags, "--conditions", "normal", "tags, dim", "--json", str(result))
    assert done.returncode == 0, done.stderr
    counts = json.loads(result.read_text())
    assert [*counts] == ["normal", "tags, dim"] and all(each["right"] == 2 for each in counts.values())
    assert (tmp_path / "normal.png").is_file() and (tmp_path / "tags,_dim.png").is_file()
    assert run_script("benchmark/tables.py", "--conditions", "fog").returncode == 2


@pytest.mark.slow
def test_speeds_are_measured():
    flags = "--steps 500 --repeats 1 --num-envs 2 --no-scaling --no-pixels --no-sb3"
    done = run_script("benchmark/throughput.py", *flags.split())
    assert done.returncode == 0, done.stderr
    speeds = [
        float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith(("raw", "batched", "Gym"))
    ]
    assert len(speeds) == 5 and min(speeds) > 10


@pytest.mark.slow
def test_stable_baselines3_is_measured_until_the_target_or_the_limit(tmp_path):
    pytest.importorskip("sb3_contrib")

    def measure(*flags):
        every = f"--episodes 2 --total-timesteps 8192 --out {tmp_path}"
        done = run_script("benchmark/sb3_baseline.py", *every.split(), *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "runs.json").read_text())

    _, runs = measure("--only", "ppo_ours", "--seeds", "1", "2", "--target", "0")
    assert {*runs["ppo_ours"]} == {"1", "2"}
    for (point,) in runs["ppo_ours"].values():  # the first evaluation ends the run
        assert 2000 <= point["steps"] < 2048 and point["wall_s"] > 0 and 0 <= point["success"] <= 1
    out, runs = measure("--only", "ppo_ours", "sac", "--seeds", "1", "--target", "1.1", "--limit-minutes", "0.02")
    assert out.count("seed 1") == 1 and len(runs["ppo_ours"]["1"]) == 1  # nothing is repeated
    assert runs["sac"]["1"][-1]["wall_s"] > 1.2
    assert "| stable-baselines3: SAC, its defaults | 1 |" in (tmp_path / "results.md").read_text()


def test_changes_of_sac_are_paired_by_seed():
    """A gain of 0.1 in every seed is significant however much seeds differ; a seed that one row lacks is left out."""
    rng = np.random.default_rng(0)
    unchanged = {"seeds": {str(seed): rate for seed, rate in enumerate(rng.uniform(0.2, 0.8, 10))}}
    noise = dict(zip(unchanged["seeds"], rng.normal(0, 0.01, 10)))
    row = {"seeds": {seed: rate + 0.1 + noise[seed] for seed, rate in unchanged["seeds"].items()} | {"77": 0.0}}
    result = sac_ablations.compare(row, unchanged)
    low, high = result["difference_ci95"]
    assert result["difference"] == pytest.approx(0.1 + np.mean([*noise.values()])) and result["p"] < 1e-6
    assert 0.08 < low < result["difference"] < high < 0.12
    shuffled = {"seeds": dict(zip(unchanged["seeds"], rng.permutation([*row["seeds"].values()][:10])))}
    assert sac_ablations.compare(shuffled, unchanged)["p"] > 0.05


def test_a_sparse_reward_is_success_and_time_alone():
    envs = sparse_sac.SparseEnv(2)
    envs.reset(seed=1)
    assert envs.step(np.ones((2, ACT_DIM)))[1] == pytest.approx(-0.01)
    state = envs.get_state()
    envs.arms.qpos[1, 6:8] = 0.28, 0.01  # lays the sheet of one of them inside the tape
    envs.arms.qpos[1, 9] = 0.0
    state["arms"]["batch"] = envs.arms.batch.state.copy()
    envs.set_state(state)
    steps = [envs.step(np.zeros((2, ACT_DIM))) for _ in range(5)]
    assert steps[-1][2].tolist() == [False, True] and steps[-1][1] == pytest.approx([-0.01, 9.99])


@pytest.mark.slow
def test_changes_of_sac_are_measured(tmp_path):
    """One seed of two rows, by the script that trains and evaluates them; a finished seed is not trained again."""
    variables = {"SEEDS": "3", "ROWS": "n_step_1 sparse", "PATH": PYTHON_PATH, "STEPS": "600"}
    variables |= {"RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "out"), "EPISODES": "2"}
    words = ["bash", str(ROOT / "benchmark" / "sac_ablations.sh")]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, env=environment(**variables), timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert {name: [*row["seeds"]] for name, row in rows.items()} == {"n_step_1": ["3"], "sparse": ["3"]}
    assert len(list(tmp_path.glob("runs/*/seed_3/run/final_model.pt"))) == 2
