"""What is learned: the defaults learn the task, a student its teacher's, an actor from pixels."""

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, steps",
    [("distill_so101.py", 14336), ("ppo_residual_so101_rgb.py", 28672)],
)
def test_policies_learn_to_see(tmp_path, script, steps):
    """In a part of their time: the floor that broken labels, pictures or gradients fall through."""
    flags = ["--total-timesteps", str(steps), "--eval-every", "0", "--eval-episodes", "50", "--log-dir", str(tmp_path)]
    done = run_script(script, *flags)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    model = run / ("student.pt" if script.startswith("distill") else "final_model.pt")
    result = tmp_path / "result.json"
    done = run_script("eval_so101.py", "--model", str(model), "--no-base", "--episodes", "50", "--json", str(result))
    assert done.returncode == 0, done.stderr
    assert json.loads(result.read_text())["success_rate"] >= (0.7 if script.startswith("distill") else 0.3)
