"""What people change first, each as a patch of a copy of the project: how little it takes, and that all of it works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PYTHON_PATH, ROOT

# a run of a second that still has every part
TINY = (
    "--total-timesteps 384 --num-envs 4 --num-steps 32 --minibatch-size 64 --checkpoint-every 128 --eval-every 256 "
    "--eval-episodes 2 --final-eval-episodes 0 --train-episode-steps 40"
)
Patch = list[tuple[str, str]]  # text that occurs once in the file, and its replacement

LINES = "layer_init(nn.Linear(width, width)), nn.LayerNorm(width), nn.ReLU(inplace=True),\n"
LAYER: Patch = [(LINES, "layer_init(nn.Linear(width, width)), nn.ReLU(inplace=True), " + LINES)]
STATE_DEPENDENT_STD: Patch = [
    (
        "self.actor_mean = mlp(ACT_DIM, ",
        "self.actor_std = mlp(ACT_DIM, out_std=0.01)\n        self.actor_mean = mlp(ACT_DIM, ",
    ),
    (
        ".mean(1), self.actor_logstd\n",
        ".mean(1), self.actor_logstd + self.actor_std(x[:, 0])\n",
    ),
]
FROZEN_AND_TWO_OPTIMISERS: Patch = [
    (
        "        self.critic = mlp(1, out_std=1.0)\n",
        "        self.critic = mlp(1, out_std=1.0)\n        self.critic[0].requires_grad_(False)\n",
    ),
    (
        "torch.optim.Adam(agent.parameters(), lr=args.ppo.learning_rate, eps=1e-5, fused=True)",
        'torch.optim.Adam([{"params": agent.critic.parameters(), "weight_decay": 0.1}, {"params": [*agent.actor_mean.'
        "parameters(), agent.actor_logstd]}], lr=args.ppo.learning_rate, eps=1e-5)",
    ),
]
LENGTH = '                        "length": float(final["episode_summary"]["length"][i]),\n'
LOGGED_NUMBER: Patch = [(LENGTH, LENGTH + '                        "distance": float(final["distance_m"][i]),\n')]
STEP = "            optimizer.step()\n"
EARLY_STOPPING: Patch = [
    (
        STEP,
        STEP + "        kl = torch.stack([each['approx_kl'] for each in history[-num_minibatches:]]).mean()\n"
        "        if kl > 1e-4:\n"
        "            break\n",
    )
]
# in the script alone: a reward term with its own flag
REWARD = """

@dataclasses.dataclass(frozen=True)
class MyTask(Task):
    height_weight: float = 0.5
    \"\"\"reward lost per m of height of the tip\"\"\"


class MyEnv(SO101ResidualVectorEnv):
    def reward_terms(self, scene, residual, success, failure):
        terms = super().reward_terms(scene, residual, success, failure)
        return terms | {"height": -self.task.height_weight * scene.tip_m[:, 2]}
"""
OWN_REWARD: Patch = [
    ("LOG_2PI = float(np.log(2 * np.pi))\n", "LOG_2PI = float(np.log(2 * np.pi))\n" + REWARD),
    (
        "    task: Task = dataclasses.field(default_factory=Task)\n",
        "    task: MyTask = dataclasses.field(default_factory=MyTask)\n",
    ),
    ("    return SO101ResidualVectorEnv(\n        num_envs,", "    return MyEnv(\n        num_envs,"),
]
# the same in the files themselves: a field, and a term
OWN_REWARD_IN_PLACE: Patch = [
    (
        "    randomize: bool = True\n",
        '    height_weight: float = 0.5\n    """reward lost per m of height"""\n    randomize: bool = True\n',
    ),
    (
        '            "failure": np.zeros(self.num_envs),\n',
        '            "failure": np.zeros(self.num_envs),\n'
        '            "height": -self.task.height_weight * scene.tip_m[:, 2],\n',
    ),
]
# another task: the sheet starts turned by a quarter, one more number is observed, success is to be near and level
TASK = """

class MyEnv(SO101ResidualVectorEnv):
    parts = OBSERVATION | {"quarter_turns": Part(("quarter_turns",), 0.0, 1.0, -1)}

    def draw_start(self, rng):
        x, y, yaw = super().draw_start(rng)
        return x, y, yaw + np.pi / 2

    def observe(self, mask, scene):
        return np.column_stack([super().observe(mask, scene), np.float32(scene.sheet_yaw_rad / (np.pi / 2))])

    def success(self, scene):
        return scene.sheet_distance_m < 0.05
"""
OWN_TASK: Patch = [
    ("LOG_2PI = float(np.log(2 * np.pi))\n", "LOG_2PI = float(np.log(2 * np.pi))\n" + TASK),
    ("from so101_env import ACT_DIM,", "from so101_env import OBSERVATION, Part\nfrom so101_env import ACT_DIM,"),
    ("parts = SO101ResidualVectorEnv.parts |", "parts = MyEnv.parts |"),
    ("    return SO101ResidualVectorEnv(\n        num_envs,", "    return MyEnv(\n        num_envs,"),
]


@pytest.fixture
def clone(tmp_path) -> Path:
    """The project's files, as somebody else's copy."""
    copy = tmp_path / "fork"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for name in ("so101", "so101_sim", "assets", "benchmark", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    return copy


def apply(patch: Patch, source: Path, target: Path) -> None:
    text = source.read_text()
    for old, new in patch:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    target.write_text(text)


def run(directory: Path, *words: str, **env: str) -> str:
    """Run a command in a directory to its end and return what it printed. Other copies of the project are not found."""
    variables = environment(PATH=PYTHON_PATH, **{"PYTHONPATH": None, **env})
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error_of_evaluation(clone: Path, *flags: str) -> str:
    """The one line with which the evaluation rejects these flags."""
    command = [sys.executable, "eval_so101.py", *flags]
    variables = environment(PYTHONPATH=None)
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def printed_command(text: str, label: str = "evaluate") -> list[str]:
    """The words of the command that a script printed behind a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{label}:")]
    return shlex.split(line.partition(":")[2])


def train_and_evaluate(
    clone: Path, *script: str, flags: tuple[str, ...] = (), directory: Path | None = None, **env: str
) -> Path:
    """Train for a moment, run the evaluation that the script prints at its end, resume; returns the final model.

    Args:
        script: what follows "python", as "my_ppo.py" or "-m", "so101.my_ppo".
        directory: where to run; None: in the clone.
    """
    where = directory or clone
    before = {*(where / "logs").glob("*")}
    printed = run(where, "python", *script, *TINY.split(), *flags, **env)
    assert "success rate" in run(where, *printed_command(printed), "--episodes", "2", "--json", "result.json", **env)
    (log,) = {*(where / "logs").glob("*")} - before
    checkpoint = min((log / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    run(where, "python", *script, "--resume", str(checkpoint), **env)
    return log / "final_model.pt"


def read(model: Path) -> dict:
    return torch.load(model, weights_only=True)


@pytest.mark.parametrize(
    "patch, weight",
    [(LAYER, "actor_mean.4.weight"), (STATE_DEPENDENT_STD, "actor_std.0.weight"), (FROZEN_AND_TWO_OPTIMISERS, None)],
)
def test_a_copied_script_with_another_network(clone, patch, weight):
    apply(patch, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    model = train_and_evaluate(clone, "my_ppo.py")
    code = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=True); print(saved['script'], *saved['agent'])"
    )
    run(clone, "python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", "--episodes", "2")
    script, *names = run(clone, sys.executable, "-c", code, str(model)).split()
    assert script == "my_ppo.py" and (weight is None or weight in names)
    (clone / "my_ppo.py").unlink()
    assert "written by my_ppo.py" in error_of_evaluation(clone, "--model", str(model))


def test_a_copied_script_is_swept_and_reported(clone):
    apply(LAYER, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    variables = {"SCRIPT": "my_ppo.py", "NAME": "mine", "SEEDS": "1 2", "EPISODES": "2"}
    run(clone, "bash", "benchmark/ppo_residual_so101.sh", *TINY.split(), **variables)
    assert (
        "`python my_ppo.py --total-timesteps 384"
        in (clone / "benchmark" / "results" / "mine" / "results.md").read_text()
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_own_reward_with_a_flag(clone, in_place):
    script = "ppo_residual_so101.py" if in_place else "my_ppo.py"
    if in_place:
        apply(OWN_REWARD_IN_PLACE, clone / "so101_env.py", clone / "so101_env.py")
    else:
        apply(OWN_REWARD, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    returns = []
    for weight in ("0", "10"):
        train_and_evaluate(clone, script, "--height-weight", weight, "--eval-every", "0", "--seed", "3")
        returns.append(json.loads((clone / "result.json").read_text())["mean_return"])
        shutil.rmtree(clone / "logs")
    assert returns[0] - returns[1] > 5  # 10 per m, 15 mm up, 400 steps


def test_own_task(clone):
    apply(OWN_TASK, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    model = train_and_evaluate(clone, "my_ppo.py", "--base-policy", "jacobian")
    # as base of the task as it is, it lacks a number
    assert "made for 26 observations, this environment has 25" in error_of_evaluation(clone, "--base-policy", f"checkpoint:{model}")
    episodes = json.loads((clone / "result.json").read_text())["episode_list"]
    assert all(1.2 < episode["initial_yaw_rad"] < 1.9 for episode in episodes)
    assert any(episode["success"] and episode["final_yaw_error_rad"] > 1 for episode in episodes)


def test_a_removed_and_an_added_flag_are_named(clone):
    """By the checkpoints of before, in one line: a file is never completed with today's defaults."""
    run(clone, "python", "ppo_residual_so101.py", "--total-timesteps", "64", "--num-steps", "16", "--eval-every", "0")
    (model,) = (clone / "logs").glob("*/final_model.pt")
    line = '    vf_coef: float = 0.5\n    """weight of the value loss"""\n'
    for old, new, words in (
        (line, "", "has the setting vf_coef, which PPO of ppo_residual_so101.py lacks"),
        (
            line,
            line + line.replace("vf_coef", "magic"),
            "lacks the setting magic, which PPO of ppo_residual_so101.py has",
        ),
    ):
        apply([(old, new)], ROOT / "ppo_residual_so101.py", clone / "ppo_residual_so101.py")
        assert words in error_of_evaluation(clone, "--model", str(model))
