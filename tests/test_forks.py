"""What people change first, each as a patch of a copy of the project: how little it takes, and that all of it works."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PYTHON_PATH, ROOT, environment, error_of, load, run_script, train

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
        "Adam(agent.parameters(), lr=args.ppo.learning_rate, eps=1e-5, fused=True)",
        'Adam([{"params": agent.critic.parameters(), "weight_decay": 0.1}, {"params": [*agent.actor_mean.'
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
from so101_env import OBSERVATION
from so101_sim.vector import Part


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
    """Write a patched copy of a file."""
    text = source.read_text()
    for old, new in patch:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    target.write_text(text)


def replacements_of(diff: str) -> Patch:
    """The changes of a diff of one file, with or without @@ lines and context."""
    changes: list[list[str]] = [[]]
    for line in diff.splitlines(keepends=True):
        if line.startswith("@@") or (line[0] == "-" and changes[-1] and changes[-1][-1][0] == "+"):
            changes.append([])
        if not line.startswith(("@@", "--- ", "+++ ", "diff ")):
            changes[-1].append(line)
    return [
        ("".join(line[1:] for line in change if line[0] != "+"), "".join(line[1:] for line in change if line[0] != "-"))
        for change in changes
        if change
    ]


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


def allow(model: Path) -> tuple[str, str]:
    """The flag that lets a command load a model through the script that wrote it."""
    return "--allow", load(model)["script"]


def printed_command(text: str, label: str = "evaluate") -> list[str]:
    """The words of the command that a script printed behind a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{label}:")]
    return shlex.split(line.partition(":")[2])


def train_and_evaluate(
    clone: Path, *script: str, tiny: str = TINY, flags: tuple[str, ...] = (), directory: Path | None = None, **env: str
) -> Path:
    """Train for a moment, run the evaluation that the script prints at its end, resume; returns the final model.

    Args:
        script: what follows "python", as "my_ppo.py" or "-m", "so101.my_ppo".
        tiny: flags that make the run short.
        directory: where to run; None: in the clone.
    """
    where = directory or clone
    before = {*(where / "logs").glob("*")}
    printed = run(where, "python", *script, *tiny.split(), *flags, **env)
    assert "success rate" in run(where, *printed_command(printed), "--episodes", "2", "--json", "result.json", **env)
    (log,) = {*(where / "logs").glob("*")} - before
    checkpoint = min((log / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    run(where, "python", *script, "--resume", str(checkpoint), **env)
    return log / "final_model.pt"


def test_a_copied_script_in_the_working_directory(tmp_path, monkeypatch):
    """Trained in this process and evaluated through the copy; the longer tests below run it as a user does."""
    apply(LAYER, ROOT / "ppo_residual_so101.py", tmp_path / "short_fork.py")
    monkeypatch.chdir(tmp_path)
    model = train(tmp_path / "logs", *TINY.split(), script="short_fork.py") / "final_model.pt"
    saved = load(model)
    assert saved["script"] == "short_fork.py" and "actor_mean.4.weight" in saved["agent"]
    flags = ("--model", str(model), "--allow", "short_fork.py", "--episodes", "2")
    done = run_script("eval_so101.py", *flags)
    assert done.returncode == 0 and "success rate" in done.stdout, done.stderr
    (tmp_path / "short_fork.py").unlink()
    line = error_of(monkeypatch, "eval_so101.py", *flags)
    assert "written by short_fork.py" in line and "working directory" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "patch, weight",
    [(LAYER, "actor_mean.4.weight"), (STATE_DEPENDENT_STD, "actor_std.0.weight"), (FROZEN_AND_TWO_OPTIMISERS, None)],
    ids=["layer", "state-dependent std", "frozen layer and two groups of parameters"],
)
def test_a_copied_script_with_another_network(clone, patch, weight):
    apply(patch, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    model = train_and_evaluate(clone, "my_ppo.py")
    run(clone, "python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", *allow(model), "--episodes", "2")
    saved = load(model)
    assert saved["script"] == "my_ppo.py" and (weight is None or weight in saved["agent"])
    (clone / "my_ppo.py").unlink()
    assert "written by my_ppo.py" in error_of_evaluation(clone, "--model", str(model), "--allow", "my_ppo.py")


@pytest.mark.slow
def test_a_copied_script_is_swept_and_reported(clone):
    apply(LAYER, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    variables = {"SCRIPT": "my_ppo.py", "NAME": "mine", "SEEDS": "1 2", "EPISODES": "2"}
    run(clone, "bash", "benchmark/ppo_residual_so101.sh", *TINY.split(), **variables)
    report = (clone / "benchmark" / "results" / "mine" / "results.md").read_text()
    assert "`python my_ppo.py --total-timesteps 384" in report


@pytest.mark.slow
def test_one_more_logged_number_is_one_line(clone):
    """It appears in TensorBoard, also in a run that is resumed from a checkpoint of the script without that line."""
    trainer = clone / "ppo_residual_so101.py"
    run(clone, "python", trainer.name, *TINY.split(), "--run-name", "before")
    checkpoint = clone / "logs" / "before" / "checkpoints" / "ppo_residual_256_steps.pt"
    apply(LOGGED_NUMBER, trainer, trainer)
    assert len(trainer.read_text().splitlines()) == len((ROOT / trainer.name).read_text().splitlines()) + 1
    run(clone, "python", trainer.name, "--resume", str(checkpoint), "--run-name", "resumed")
    run(clone, "python", trainer.name, *TINY.split(), "--run-name", "new")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distances = {}
    for name in ("before", "resumed", "new"):
        events = EventAccumulator(str(clone / "logs" / name / "tensorboard"))
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("rollout/")]
        assert "rollout/success_rate_100" in tags
        distances[name] = [each.value for each in events.Scalars("rollout/distance")] if len(tags) == 5 else []
    assert distances["before"] == [] and len(distances["resumed"]) == 1 and len(distances["new"]) == 2
    assert all(0.01 < each < 0.3 for values in distances.values() for each in values)


@pytest.mark.slow
def test_early_stopping_is_three_lines(clone):
    """A rollout is learned from once instead of eight times, because the divergence exceeds the tiny limit."""
    apply(EARLY_STOPPING, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    run(clone, "python", "ppo_residual_so101.py", *TINY.split(), "--run-name", "original")
    models = clone / "logs" / "original" / "final_model.pt", train_and_evaluate(clone, "my_ppo.py")
    steps = [{int(state["step"]) for state in load(model)["optimizer"]["state"].values()} for model in models]
    assert steps == [{3 * 8 * 2}, {3 * 2}]  # rollouts, passes, minibatches


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_own_reward_with_a_flag(clone, in_place):
    script = "ppo_residual_so101.py" if in_place else "my_ppo.py"
    if in_place:
        apply(OWN_REWARD_IN_PLACE, clone / "so101_env.py", clone / "so101_env.py")
    else:
        apply(OWN_REWARD, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    returns = []
    for weight in ("0", "10"):
        train_and_evaluate(clone, script, flags=("--height-weight", weight, "--eval-every", "0", "--seed", "3"))
        returns.append(json.loads((clone / "result.json").read_text())["mean_return"])
        shutil.rmtree(clone / "logs")
    assert returns[0] - returns[1] > 5  # 10 per m, 15 mm up, 400 steps


@pytest.mark.slow
def test_own_variant_of_the_task(clone):
    apply(OWN_TASK, clone / "ppo_residual_so101.py", clone / "my_ppo.py")
    model = train_and_evaluate(clone, "my_ppo.py", flags=("--base-policy", "jacobian"))
    # as base policy of the original task it gets one number too few
    line = error_of_evaluation(clone, "--base-policy", f"checkpoint:{model}", *allow(model))
    assert "made for 26 observations, this environment has 25" in line
    episodes = json.loads((clone / "result.json").read_text())["episode_list"]
    assert all(1.2 < episode["initial_yaw_error_rad"] < 1.9 for episode in episodes)
    assert any(episode["success"] and episode["final_yaw_error_rad"] > 1 for episode in episodes)


@pytest.mark.slow
def test_own_task_of_the_documentation(clone):
    """The diff in docs/own_task.md turns a copy of the trainer into one for examples/push_cube_env.py."""
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs" / "own_task.md").read_text(), re.MULTILINE | re.DOTALL)
    patch = [change for diff in diffs for change in replacements_of(diff)]
    assert patch
    apply(patch, clone / "ppo_residual_so101.py", clone / "ppo_push_cube.py")
    model = train_and_evaluate(clone, "ppo_push_cube.py")
    assert load(model)["script"] == "ppo_push_cube.py"
    assert "initial_distance_m" in json.loads((clone / "result.json").read_text())["episode_list"][0]
    outputs = ("--video", "cube.mp4", "--plot", "cube.png")
    run(
        clone,
        "python",
        "eval_so101.py",
        "--model",
        str(model),
        *allow(model),
        "--episodes",
        "2",
        "--video-episodes",
        "1",
        *outputs,
    )
    assert all((clone / name).stat().st_size > 1000 for name in ("cube.mp4", "cube.png"))


@pytest.mark.slow
def test_a_removed_and_an_added_flag_are_named(clone):
    """For an older checkpoint, in one line: no missing value is replaced by today's default."""
    run(clone, "python", "ppo_residual_so101.py", "--total-timesteps", "64", "--num-steps", "16", "--eval-every", "0")
    (model,) = (clone / "logs").glob("*/final_model.pt")
    line = '    vf_coef: float = 0.5\n    """weight of the value loss"""\n'
    added = line + line.replace("vf_coef", "magic")
    for new, words in (
        ("", "has the setting vf_coef, which PPO of ppo_residual_so101.py lacks"),
        (added, "lacks the setting magic, which PPO of ppo_residual_so101.py has"),
    ):
        apply([(line, new)], ROOT / "ppo_residual_so101.py", clone / "ppo_residual_so101.py")
        assert words in error_of_evaluation(clone, "--model", str(model), *allow(model))


# -- copies of the other scripts


@pytest.mark.slow
def test_a_copy_of_ppo_rgb(clone):
    """With one more layer: the original could not load its weights."""
    layer = "layer_init(nn.Linear(width, width)), nn.LayerNorm(width), nn.ReLU(inplace=True),\n"
    apply(
        [(layer, "layer_init(nn.Linear(width, width)), nn.ReLU(), " + layer)],
        clone / "so101" / "ppo_rgb.py",
        clone / "my_rgb.py",
    )
    model = train_and_evaluate(clone, "my_rgb.py", flags=("--actor-image-size", "16"))
    saved = load(model)
    assert saved["script"] == "my_rgb.py" and "actor_mean.4.weight" in saved["agent"]
    run(clone, "python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", *allow(model), "--episodes", "2")


@pytest.mark.slow
def test_a_copy_of_sac(clone):
    """With one more layer, and a flag of its own: the original could not load its weights or its settings."""
    layer = "layer_init(nn.Linear(width, width)), norms[1], nn.ReLU(inplace=True),\n"
    flag = "    buffer_size: int = 1_000_000\n"
    patch = [
        (layer, "layer_init(nn.Linear(width, width)), nn.ReLU(), " + layer),
        (flag, "    magic: float = 0.5\n" + flag),
    ]
    apply(patch, clone / "so101" / "sac.py", clone / "my_sac.py")
    words = "--total-timesteps 384 --num-envs 4 --learning-starts 64 --batch-size 32 --train-episode-steps 40 "
    words += "--checkpoint-every 128 --eval-every 256 --eval-episodes 2 --final-eval-episodes 0"
    model = train_and_evaluate(clone, "my_sac.py", flags=("--magic", "2"), tiny=words)
    saved = load(model)
    assert saved["script"] == "my_sac.py" and saved["args"]["sac"]["magic"] == 2 and "actor.8.weight" in saved["agent"]
    run(clone, "python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", *allow(model), "--episodes", "2")


@pytest.mark.slow
def test_a_copy_of_distill(clone):
    layer = "nn.Linear(width, width),\n            nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, ACT_DIM),"
    more = "nn.Linear(width, width), nn.ReLU(), " + layer
    apply([(layer, more)], clone / "so101" / "distill.py", clone / "my_distill.py")
    words = TINY.replace("--minibatch-size 64", "--minibatch-size 8 --updates 2 --image-size 16 --teacher-steps 64")
    model = train_and_evaluate(clone, "my_distill.py", tiny=words)
    saved = load(model)
    assert saved["script"] == "my_distill.py" and "residual.4.bias" in saved["agent"]
    run(clone, "python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", *allow(model), "--episodes", "2")


@pytest.mark.slow
def test_a_copy_of_clone(clone):
    demos = ("--base-policy", "jacobian", "--dataset", "demos", "--episodes", "3")
    printed = run(clone, "python", "-m", "so101.record", *demos)
    assert printed_command(printed, "clone")[:3] == ["python", "-m", "so101.clone"]
    layer = "nn.Linear(hidden_size, hidden_size),\n"
    more = "nn.Linear(hidden_size, hidden_size), nn.ReLU(), " + layer
    scale = ("(2, np.sqrt(2)), (5, 0.01)", "(2, np.sqrt(2)), (7, 0.01)")
    apply([(layer, more), scale], clone / "so101" / "clone.py", clone / "my_clone.py")
    printed = run(clone, "python", "my_clone.py", "--dataset", "demos", "--train-steps", "50")
    assert "success rate" in run(clone, *printed_command(printed), "--episodes", "2")
    (model,) = (clone / "logs").glob("my_clone_*/final_model.pt")
    assert load(model)["script"] == "my_clone.py" and "actor.4.bias" in load(model)["agent"]
    command = printed_command(printed, "reinforce")
    run(clone, *command, *TINY.split())


# -- where a script is found


@pytest.mark.slow
def test_a_script_in_another_directory(clone, tmp_path):
    """A user's directory with the copied trainer, and PYTHONPATH to the project."""
    own = tmp_path / "elsewhere"
    own.mkdir()
    apply(LAYER, clone / "ppo_residual_so101.py", own / "my_ppo.py")
    model = train_and_evaluate(clone, "my_ppo.py", directory=own, PYTHONPATH=str(clone))
    assert load(model)["script"] == "my_ppo.py" and not (clone / "logs").exists()
    base = ("python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", *allow(model), "--episodes", "2")
    run(own, "python", str(clone / base[1]), *base[2:], PYTHONPATH=str(clone))
    # from the project's directory it is not found
    assert "written by my_ppo.py" in error_of_evaluation(clone, *base[2:])


@pytest.mark.slow
def test_a_script_in_the_package(clone):
    apply(LAYER, clone / "ppo_residual_so101.py", clone / "so101" / "my_ppo.py")
    model = train_and_evaluate(clone, "-m", "so101.my_ppo")
    assert load(model)["script"] == "my_ppo.py" and "actor_mean.4.weight" in load(model)["agent"]
    run(clone, "python", "eval_so101.py", "--base-policy", f"checkpoint:{model}", *allow(model), "--episodes", "2")
