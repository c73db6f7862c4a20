"""Base policies: alone and under a residual, from files and from modules, with and without cameras."""

import json
import re
import shlex
import shutil
import sys

import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, assert_same, error_of, load, press_force_n, run_script, train
from gymnasium.vector import AutoresetMode

import ppo_residual_so101 as ppo
from so101.base import BasePolicy, StackedPolicy
from so101.checkpoints import load_checkpoint
from so101.evaluation import VALIDATION_SEED, evaluate, no_residual
from so101.policies import load_policy
from so101.pusher import JacobianPolicy
from so101.server import Server
from so101.trust import Trust, may_lie_at
from so101_env import TAPE_CENTER_M, BasePolicyError, SO101ResidualVectorEnv, base_observation
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error

SEEDS = list(range(1_700_000_000, 1_700_000_050))  # of no training and no evaluation


def run_alone(tape_margin: float, seeds: list[int]) -> list[dict]:
    envs = SO101ResidualVectorEnv(
        min(50, len(seeds)), JacobianPolicy(), tape_margin=tape_margin, autoreset_mode=AutoresetMode.DISABLED
    )
    return evaluate(no_residual, envs, seeds)


def test_pusher_masters_standard_and_leaves_the_yaw_of_precise_to_the_residual():
    standard = run_alone(0.04, SEEDS)
    assert np.mean([episode["success"] for episode in standard]) >= 0.95
    precise = run_alone(0.02, SEEDS)
    assert 0.3 <= np.mean([episode["success"] for episode in precise]) <= 0.7
    failed = [episode for episode in precise if not episode["success"]]
    # it brings the sheet there, or to where it tries again from, and fails because the sheet is turned
    assert np.median([episode["final_distance_m"] for episode in failed]) < 0.05
    assert np.median([episode["final_yaw_error_rad"] for episode in failed]) > 0.15


def test_pusher_is_deterministic_and_alike_in_every_batch():
    assert run_alone(0.04, SEEDS)[:10] == run_alone(0.04, SEEDS[:10])


@pytest.mark.parametrize("stacked", [False, True])
def test_pusher_knows_the_servos(stacked):
    """At LeRobot's gain, half of the model's; also where it is the base policy of another one."""

    class Frozen(StackedPolicy):
        def act(self, obs, mask):
            return self.base_delta(obs, mask)

    pusher = Frozen(JacobianPolicy()) if stacked else JacobianPolicy()
    envs = SO101ResidualVectorEnv(50, pusher, firmware_p=16, autoreset_mode=AutoresetMode.DISABLED)
    episodes = evaluate(no_residual, envs, SEEDS)
    assert np.mean([episode["success"] for episode in episodes]) >= 0.95


@pytest.mark.parametrize("firmware_p", [16, 32])
def test_pusher_drags_the_sheet_with_a_light_press(firmware_p):
    """Contact force of the fingertips while the sheet moves."""
    envs = SO101ResidualVectorEnv(
        20, JacobianPolicy(), randomize=False, firmware_p=firmware_p, autoreset_mode=AutoresetMode.DISABLED
    )
    obs, _ = envs.reset(seed=SEEDS[0])
    data, sensed = mujoco.MjData(envs.model), []
    for _ in range(120):
        before = obs[:, 12:14].copy()
        obs = envs.step(np.zeros((20, ACT_DIM)))[0]
        moving = np.linalg.norm(obs[:, 12:14] - before, axis=1) > 0.0005
        for i in np.flatnonzero(moving):
            envs.arms.batch.get_data(i, data)
            mujoco.mj_forward(envs.model, data)
            sensed.append(press_force_n(envs.model, data))
        if envs._done.all():
            break
    assert len(sensed) > 200
    assert 0.3 < np.median(sensed) < 1.2 and np.percentile(sensed, 95) < 3.0


def test_untrained_residual_leaves_every_episode_to_the_base():
    args = ppo.Args(base=ppo.Base("jacobian"), task=ppo.Task(tape_margin=0.02))
    agent, envs, seeds = ppo.Agent(args), ppo.make_envs(args, 25, evaluation=True), SEEDS[:25]
    assert evaluate(agent.act, envs, seeds) == evaluate(no_residual, envs, seeds)


def test_pusher_tries_again():
    """A sheet that lies at the tape's centre, but turned too far, is pulled out, let go, and pushed back."""
    envs = SO101ResidualVectorEnv(1, JacobianPolicy(), randomize=False, tape_margin=0.02)
    envs.reset(seed=0)
    qpos = envs.qpos
    qpos[0, 6:10] = [*TAPE_CENTER_M, qpos[0, 8], 0.3]
    envs.reset(options={"qpos": qpos})
    distance_m, tip_m = [], []
    for _ in range(300):
        obs, _, _, _, info = envs.step(np.zeros((1, ACT_DIM)))
        distance_m.append(info["distance_m"][0])
        tip_m.append(obs[0, 24])
    distance_m, tip_m = np.array(distance_m), np.array(tip_m)
    out = np.flatnonzero(distance_m > 0.04)[0]
    lifted = out + np.flatnonzero(tip_m[out:] > 0.0125)[0]
    back = lifted + np.flatnonzero(distance_m[lifted:] < 0.01)[0]
    assert distance_m[:out].min() < 0.002 and distance_m.max() < 0.07
    assert tip_m[lifted:back].min() < 0.009  # pressed again on the way back


def test_evaluation_of_a_base_alone(tmp_path):
    path = tmp_path / "result.json"
    done = run_script("eval_so101.py", "--base-policy", "jacobian", "--episodes", "8", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["base_policy"] == "jacobian" and result["model"] is None and result["episodes"] == 8
    assert result["success_rate"] > 0.8 and result["mean_residual_magnitude"] == 0.0
    assert f"{result['mean_return']:.2f}" in done.stdout and "base alone" in done.stdout


@pytest.mark.parametrize("observe_base", [pytest.param(False, marks=pytest.mark.slow), True])
def test_residuals_stack(observe_base, tmp_path):
    """A frozen policy as base, and nothing added: the episodes of the frozen policy itself."""
    flags = (
        "--base-policy jacobian --tape-margin 0.02 --learning-rate 0.05 --eval-every 0"
        + observe_base * " --observe-base"
    )
    run = train(tmp_path, *SMALL.split(), *flags.split())
    model = run / "final_model.pt"
    checkpoint = load_checkpoint(model)
    envs = ppo.make_envs(checkpoint.args, 10, evaluation=True)
    trained = evaluate(checkpoint.agent(model).act, envs, SEEDS[:10])
    frozen = load_policy(f"checkpoint:{model}")
    envs = SO101ResidualVectorEnv(10, frozen, checkpoint.args.task, autoreset_mode=AutoresetMode.DISABLED)
    stacked = evaluate(no_residual, envs, SEEDS[:10])
    assert [e["length"] for e in stacked] == [e["length"] for e in trained]
    np.testing.assert_allclose(
        [e["final_distance_m"] for e in stacked], [e["final_distance_m"] for e in trained], atol=1e-9
    )
    assert np.mean([e["residual_magnitude"] for e in trained]) > 0.05  # it does not just repeat the pusher


def test_a_base_policy_in_a_file_may_have_moved(tmp_path, monkeypatch, capsys):
    """Both files of a chain: the person says where they are, and the weights must still be the same."""
    tiny = "--total-timesteps 256 --num-envs 2 --num-steps 64 --minibatch-size 64 --eval-every 0 --checkpoint-every 128"
    below, middle, top = (tmp_path / f"{name}.pt" for name in ("below", "middle", "top"))
    for path, base in ((below, "zero"), (middle, f"checkpoint:{below}"), (top, f"checkpoint:{middle}")):
        run = train(tmp_path / path.stem, *tiny.split(), "--base-policy", base)
        shutil.copy(run / "final_model.pt", path)
    half = run / "checkpoints" / "ppo_residual_128_steps.pt"
    before = load_policy(f"checkpoint:{top}").fingerprint
    (tmp_path / "moved").mkdir()
    names = [f"checkpoint:{tmp_path / 'moved' / path.name}" for path in (below, middle)]
    evaluate_top = ("eval_so101.py", "--model", str(top), "--episodes", "1")

    def check(*cases: tuple[list[str], str]) -> None:
        for flags, words in cases:
            if words:
                assert words in error_of(monkeypatch, *evaluate_top, *flags), flags
            else:
                assert (done := run_script(*evaluate_top, *flags)).returncode == 0, done.stderr

    check((["--allow", f"checkpoint:{below}"], ""))  # without need
    check((["--base-policy", f"checkpoint:{below}"], "the model has its own base policy; drop the flag"))
    below.rename(tmp_path / "moved" / below.name)
    hint = f"{middle}: its base policy, {below}: no such file; if it has moved, add --allow checkpoint:PATH"
    check(([], hint), (["--allow", names[0]], ""))
    resumed = train(tmp_path / "resumed", "--resume", str(half), "--allow", names[0])
    assert_same(load(resumed / "final_model.pt")["agent"], load(top)["agent"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate: ")][-1:]
    assert run_script("eval_so101.py", "--episodes", "1", *shlex.split(line)[3:]).returncode == 0

    middle.rename(tmp_path / "moved" / middle.name)
    check(
        ([], f"{top}: its base policy, {middle}: no such file; if it has moved, add --allow checkpoint:PATH"),
        (["--allow", f"checkpoint:{top}"], f"{middle}: no such file"),  # no file is its own base policy
        (["--base-policy", names[1]], f"{tmp_path / 'moved' / middle.name}: its base policy, {below}: no such file"),
        (["--base-policy", names[0]], f"{top}: trained on base policy {names[0]} with weights"),
        (["--allow", *names[::-1]], f"{top}: trained on base policy {names[0]} with weights"),  # the model's own: last
        (["--base-policy", "jacobian"], "the model has its own base policy; drop the flag"),
        (["--base-policy", names[1].replace("checkpoint", "bc")], "the model has its own base policy; drop the flag"),
        (["--allow", *names], ""),
        (["--allow", names[0], "--base-policy", names[1]], ""),
    )  # fmt: skip
    assert load_policy(f"checkpoint:{top}", Server(trust=Trust(tuple(names)))).fingerprint == before
    for flags in (["--base-policy", names[1], "--allow", names[0]], ["--allow", *names]):
        resumed = train(tmp_path / "resumed", "--resume", str(half), *flags)
        assert_same(load(resumed / "final_model.pt")["agent"], load(top)["agent"])
        assert load(resumed / "final_model.pt")["args"]["base"]["base_policy"] == names[1]


@pytest.mark.parametrize(
    "spec, place, fits",
    [
        ("checkpoint:gone.pt", "checkpoint:b.pt", True),
        ("opencv:checkpoint:gone.pt", "checkpoint:b.pt", True),
        ("checkpoint:gone.pt", "opencv:opencv:checkpoint:b.pt", True),
        ("checkpoint:/dev", "checkpoint:b.pt", True),
        ("server:localhost:1", "lerobot:b", True),
        ("opencv:lerobot:a", "server:localhost:1", True),
        (f"checkpoint:{ROOT / 'assets' / 'pretrained.pt'}", "checkpoint:b.pt", False),  # it is there
        ("checkpoint:gone.pt", "bc:b.pt", False),
        ("checkpoint:gone.pt", "my_policy:Mine", False),
        ("my_policy:Mine", "checkpoint:b.pt", False),
        ("lerobot:a", "bc:b.pt", False),
        ("jacobian", "checkpoint:b.pt", False),
        ("zero", "zero", False),
    ],
)
def test_what_a_person_may_name_in_place_of_a_base_policy(spec, place, fits):
    assert may_lie_at(spec, place) == fits
    if fits:
        resolved, _ = Trust((place,)).resolve(spec, "model.pt")
        assert resolved.startswith("opencv:") == spec.startswith("opencv:")
        assert resolved.removeprefix("opencv:") == place.replace("opencv:", "")


def test_another_base_is_refused(tmp_path, monkeypatch):
    """A checkpoint whose base policy's file was retrained can be neither evaluated nor resumed."""
    flags = [*SMALL.split(), "--total-timesteps", "1100", "--eval-every", "0"]
    first, second = (train(tmp_path / seed, *flags, "--seed", seed) / "final_model.pt" for seed in "12")
    base = tmp_path / "base.pt"
    base.write_bytes(first.read_bytes())
    top = train(tmp_path / "top", *flags, "--base-policy", f"checkpoint:{base}")
    half = min((top / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    for script, flag, path in (
        ("eval_so101.py", "--model", top / "final_model.pt"),
        ("ppo_residual_so101.py", "--resume", half),
    ):
        base.write_bytes(second.read_bytes())
        assert "weights" in error_of(monkeypatch, script, flag, str(path))
        base.unlink()
        assert str(base) in error_of(monkeypatch, script, flag, str(path))


def test_base_success_and_residual_per_joint_are_reported(tmp_path):
    flags = "--base-policy jacobian --learning-rate 0.05 --total-timesteps 1000 --eval-every 1000".split()
    run = train(tmp_path, *SMALL.split(), *flags)
    lines = [json.loads(line) for line in (run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    seeds = [VALIDATION_SEED + i for i in range(3)]
    args = ppo.Args(base=ppo.Base("jacobian"))
    envs = ppo.make_envs(args, 3, evaluation=True)
    alone = np.mean([e["success"] for e in evaluate(no_residual, envs, seeds)])
    assert {line["reference_success_rate"] for line in lines} == {alone}
    # by hand, for one joint: how far each of the two moved the targets
    act = load_checkpoint(run / "final_model.pt").agent("").act
    residual, base = [], []
    for seed in seeds:
        envs = ppo.make_envs(args, 1, evaluation=True)
        obs, done = envs.reset(seed=[seed])[0], False
        pusher, one = JacobianPolicy(), np.ones(1, bool)
        pusher.reset(one)
        while not done:
            base.append(abs(pusher.act(base_observation(obs, envs.command), one)[0, 1]))
            residual.append(0.7 * 0.02 * abs(act(obs)[0, 1]))
            obs, _, terminated, truncated, _ = envs.step(act(obs))
            done = terminated[0] or truncated[0]
    assert lines[-1]["residual_to_base/shoulder_lift"] == pytest.approx(np.mean(residual) / np.mean(base), rel=1e-3)
    assert "residual_to_base/wrist_roll" not in lines[-1]  # the pusher keeps it still


@pytest.mark.parametrize(
    "answer, message",
    [(np.zeros((4, 5)), "(4, 6)"), (np.full((4, ACT_DIM), np.nan), "finite"), (np.full((4, ACT_DIM), 40.0), "degrees")],
)
def test_a_base_policy_that_fails_stops_the_run(answer, message):
    policy = JacobianPolicy()
    policy.act = lambda obs, mask: answer
    envs = SO101ResidualVectorEnv(4, policy)
    envs.reset(seed=0)
    with pytest.raises(BasePolicyError, match=re.escape(message)):
        envs.step(np.zeros((4, ACT_DIM)))


def test_training_on_a_base_policy_that_fails_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(JacobianPolicy, "act", lambda self, obs, mask: np.full((len(mask), ACT_DIM), np.nan))
    line = error_of(monkeypatch, "ppo_residual_so101.py", "--base-policy", "jacobian", "--log-dir", str(tmp_path))
    assert "--base-policy jacobian" in line and "JacobianPolicy" in line and str(tmp_path) in line
    for flags in (["--observe-base"], []):  # before the first rollout, and outside of training
        name = "ppo_residual_so101.py" if flags else "eval_so101.py"
        assert "JacobianPolicy" in error_of(monkeypatch, name, "--base-policy", "jacobian", *flags)


def test_observed_base_action_is_the_one_that_acts():
    """After a reset, too, and the final observation of an episode has its own; the pusher remembers each step once."""
    pusher, everyone = JacobianPolicy(), np.ones(6, bool)
    envs = SO101ResidualVectorEnv(6, JacobianPolicy(), observe_base=True, max_episode_steps=40)
    obs, _ = envs.reset(seed=0)
    pusher.reset(everyone)
    envs._steps[:3] = 20  # so that half of them is reset while the others go on
    for _ in range(70):
        np.testing.assert_allclose(obs[:, 25:], pusher.act(base_observation(obs, envs.command), everyone), atol=1e-6)
        shown = obs[:, 25:].copy()
        obs, _, terminated, truncated, info = envs.step(np.zeros((6, ACT_DIM)))
        np.testing.assert_allclose(info.get("final_info", info)["base_delta_rad"], shown, atol=1e-6)
        if truncated.any():
            assert np.abs(info["final_obs"][truncated, 25:] - obs[truncated, 25:]).max() > 1e-4
        pusher.reset(terminated | truncated)


# -- policies of one's own


OWN = """
from so101.base import BasePolicy

class Own(BasePolicy):
    def __init__(self, speed_rad="0.01"):
        self.speed_rad = float(speed_rad)

    def act(self, obs, mask):
        delta = 0.0 * obs["command"]
        delta[:, 0] = self.speed_rad * obs["observation.environment_state"][:, 14] / 0.1  # pan to where the tape is
        return delta

class NoAct(BasePolicy):
    pass

class Stranger:
    def reset(self, mask): ...
    def act(self, obs, mask): ...
    def close(self): ...
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    """Name of a module with policies, importable from the working directory."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_class_by_name_is_trained_on_resumed_and_evaluated(own_module, tmp_path):
    """From the directory that holds it, with no file of the project changed: through checkpoints and evaluations."""
    spec = f"{own_module}:Own:0.005"
    flags = ("--total-timesteps", "2000", "--eval-every", "0")
    run = train(tmp_path / "logs", *SMALL.split(), *flags, "--base-policy", spec)
    half = min((run / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = train(tmp_path / "resumed", "--resume", str(half), "--base-policy", spec)
    first, second = (torch.load(r / "final_model.pt", weights_only=True)["agent"] for r in (run, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    done = run_script("eval_so101.py", "--model", str(run / "final_model.pt"), "--episodes", "2", "--allow", spec)
    assert done.returncode == 0 and own_module in done.stdout, done.stderr
    assert load_policy(spec).speed_rad == 0.005 and load_policy(f"{own_module}:Own").speed_rad == 0.01


def test_what_is_no_policy_is_refused_at_the_start(own_module):
    for spec, words in (
        (f"{own_module}:NoAct", "with act"),
        (f"{own_module}:Stranger", "BasePolicy"),
        (f"{own_module}:Absent", "BasePolicy"),
        ("no_such_module_here:Own", "no module no_such_module_here"),
        ("magic", "known: zero, jacobian"),
        ("bc:", "known:"),
        ("checkpoint:nowhere.pt", "nowhere.pt: no such file"),
        ("bc:nowhere.pt", "nowhere.pt: no such file"),
        ("checkpoint:/dev", "/dev: is a directory; name a file in it"),
        ("onnx:/dev/null", "/dev/null: is not a file"),
    ):
        with pytest.raises(SO101Error, match=re.escape(words)):
            load_policy(spec)
    assert load_policy("zero") is None
    stranger = type("Stranger", (), {"act": lambda self, obs, mask: None, "reset": None, "close": None})
    with pytest.raises(BasePolicyError, match="Stranger has no memory: derive it from"):
        SO101ResidualVectorEnv(2, stranger())


class Looker(BasePolicy):
    """Looks through two cameras every fourth step, and keeps what it saw."""

    cameras, image_size = ("top", "wrist"), (24, 32)

    def __init__(self):
        self.memory, self.seen = {"step": np.zeros(3, np.int64)}, []

    def reset(self, mask):
        self.memory["step"][mask] = 0

    def act(self, obs, mask):
        look = mask & (self.memory["step"] % 4 == 0)
        if look.any():
            rows = obs.rows(look)
            self.seen.append((look, {key: rows[key] for key in rows}))
        self.memory["step"][mask] += 1
        return np.zeros((len(mask), ACT_DIM))


def test_images_are_rendered_only_of_who_looks_and_when(monkeypatch):
    policy = Looker()
    envs = SO101ResidualVectorEnv(3, policy)
    rendered, images = [], envs.camera_images
    monkeypatch.setattr(envs, "camera_images", lambda *a: (rendered.extend([a[1]] * len(a[0])), images(*a))[1])
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.zeros((3, ACT_DIM)))
    envs.reset(options={"reset_mask": np.array([False, True, False])})
    for _ in range(3):
        envs.step(np.zeros((3, ACT_DIM)))
    looks = [look.tolist() for look, _ in policy.seen]
    assert looks == [[True] * 3, [False, True, False], [True, False, True]]
    assert rendered == ["top"] * 3 + ["wrist"] * 3 + ["top", "wrist"] + ["top"] * 2 + ["wrist"] * 2
    keys = {"observation.state", "observation.environment_state", "command", "residual", "load"}
    for look, seen in policy.seen:
        assert set(seen) == keys | {"observation.images.top", "observation.images.wrist"}
        assert all(len(array) == look.sum() for array in seen.values())
        top = seen["observation.images.top"]
        assert top.shape[1:] == (24, 32, 3) and top.dtype == np.uint8 and top.std() > 10
    first = policy.seen[0][1]["observation.images.top"].astype(int)
    assert np.abs(first[0] - first[1]).max() > 30  # the sheets lie in other places
    with pytest.raises(KeyError):
        envs._base_delta(np.ones(3, bool)) if policy.seen.clear() else None
        policy.cameras = ()
        policy.act = lambda obs, mask: obs["observation.images.top"]
        envs.step(np.zeros((3, ACT_DIM)))


def test_documented_example_of_a_base_policy(tmp_path, monkeypatch):
    """The class that docs/base_policies.md prints, as it is printed, and the command below it."""
    readme = (ROOT / "docs" / "base_policies.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "(BasePolicy)" in block)
    (tmp_path / "my_policy.py").write_text(code)
    (command,) = re.findall(r"--base-policy (my_policy:\S+)", readme)
    monkeypatch.chdir(tmp_path)
    policy = load_policy(command)
    envs = SO101ResidualVectorEnv(2, policy)
    start = envs.reset(seed=0)[0]
    for _ in range(20):
        obs = envs.step(np.zeros((2, ACT_DIM)))[0]
    assert np.abs(obs[:, :6] - start[:, :6]).max() > 0.01  # it moves the arm
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10


def test_policies_see_no_shadows_but_people_do():
    """Without its lamp's shadows the scene looks the same to a camera, at a fraction of the cost, and not to a film."""
    envs, unshadowed = SO101ResidualVectorEnv(1), SO101ResidualVectorEnv(1)
    envs.reset(seed=0)
    unshadowed.model.light_castshadow[:] = 0
    for camera in ("top", "wrist"):
        one, two = (each.camera_images(envs.qpos, camera, (64, 64)) for each in (envs, unshadowed))
        assert np.array_equal(one, two) and one.std() > 10
    assert not np.array_equal(*(each.render_state(envs.qpos[0]) for each in (envs, unshadowed)))
    with pytest.raises(SO101Error, match="camera roof: the scene has no such camera, it has top and wrist"):
        envs.camera_images(envs.qpos, "roof", (64, 64))
    envs.close()
    unshadowed.close()
