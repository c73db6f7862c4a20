"""Whole trainings: the defaults learn the task, a student and a camera policy learn to see."""

import json

import pytest
from conftest import run_script, train


@pytest.mark.slow
def test_seed_1_learns_the_task_in_50000_steps(tmp_path):
    run_dir = train(tmp_path, "--seed", "1", "--total-timesteps", "50000", "--eval-every", "0")
    result = tmp_path / "result.json"
    model = str(run_dir / "final_model.pt")
    done = run_script("eval_so101.py", "--model", model, "--episodes", "100", "--json", str(result))
    assert done.returncode == 0, done.stderr
    # a wrong reward, update or observation stays below this floor; the README has the results of ten seeds
    assert json.loads(result.read_text())["success_rate"] >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("script, steps, floor", [("so101.distill", 14336, 0.7), ("so101.ppo_rgb", 28672, 0.3)])
def test_policies_learn_to_see(tmp_path, script, steps, floor):
    """In a fraction of their usual steps: wrong labels, pictures or gradients stay below the floor."""
    flags = ["--total-timesteps", str(steps), "--eval-every", "0", "--eval-episodes", "50", "--log-dir", str(tmp_path)]
    done = run_script(script, *flags)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    flags = ["--model", str(run / "final_model.pt"), "--no-base", "--episodes", "50"]
    result = tmp_path / "result.json"
    done = run_script("eval_so101.py", *flags, "--json", str(result))
    assert done.returncode == 0, done.stderr
    assert json.loads(result.read_text())["success_rate"] >= floor
