"""The defaults learn the task."""

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
    # the floor that a broken reward, update or observation falls through; the README has what ten seeds reach
    assert json.loads(result.read_text())["success_rate"] >= 0.6
