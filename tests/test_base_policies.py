"""Base policies, alone and under a residual."""

import json
import re
import sys

import mujoco
import numpy as np
import pytest
import torch
from conftest import SMALL, press_force_n, run_script, train
from gymnasium.vector import AutoresetMode
from so101_base_policies import JacobianPolicy, make_base_policy

import ppo_residual_so101 as ppo
from so101_env import ACT_DIM, TAPE_CENTER_M, BasePolicyError, SO101ResidualVectorEnv

SEEDS = list(range(1_700_000_000, 1_700_000_100))  # of no training and no evaluation


def run_alone(tape_margin: float, num_envs: int = 50) -> list[dict]:
    envs = SO101ResidualVectorEnv(
        num_envs, JacobianPolicy(), tape_margin=tape_margin, autoreset_mode=AutoresetMode.DISABLED
    )
    return ppo.evaluate(ppo.no_residual, envs, SEEDS)


def test_pusher_masters_standard_and_leaves_the_yaw_of_precise_to_the_residual():
    standard = run_alone(0.04)
    assert np.mean([episode["success"] for episode in standard]) >= 0.95
    precise = run_alone(0.02)
    assert 0.3 <= np.mean([episode["success"] for episode in precise]) <= 0.7
    failed = [episode for episode in precise if not episode["success"]]
    # it brings the sheet there, or to where it tries again from, and fails because the sheet is turned
    assert np.median([episode["final_distance_m"] for episode in failed]) < 0.05
    assert np.median([episode["final_yaw_error_rad"] for episode in failed]) > 0.15


def test_pusher_is_deterministic_and_alike_in_every_batch():
    assert run_alone(0.04, num_envs=50)[:20] == run_alone(0.04, num_envs=20)[:20]


def test_pusher_drags_the_sheet_with_a_light_press():
    """Contact force of the fingertips while the sheet moves."""
    envs = SO101ResidualVectorEnv(20, JacobianPolicy(), randomize=False, autoreset_mode=AutoresetMode.DISABLED)
    obs, _ = envs.reset(seed=SEEDS[0])
    data, sensed = mujoco.MjData(envs.model), []
    for _ in range(120):
        before = obs[:, 12:14].copy()
        obs = envs.step(np.zeros((20, ACT_DIM)))[0]
        moving = np.linalg.norm(obs[:, 12:14] - before, axis=1) > 0.0005
        for i in np.flatnonzero(moving):
            envs.batch.get_data(i, data)
            mujoco.mj_forward(envs.model, data)
            sensed.append(press_force_n(envs.model, data))
        if envs._done.all():
            break
    assert len(sensed) > 200
    assert 0.3 < np.median(sensed) < 1.2 and np.percentile(sensed, 95) < 3.0


def test_untrained_residual_leaves_every_episode_to_the_base():
    args = ppo.Args(base_policy="jacobian", tape_margin=0.02, num_threads=1)
    agent = ppo.Agent(args)
    envs = ppo.make_envs(args, 25, AutoresetMode.DISABLED)
    seeds = SEEDS[:25]
    assert ppo.evaluate(ppo.mean_action(agent), envs, seeds) == ppo.evaluate(ppo.no_residual, envs, seeds)


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
    done = run_script("eval_so101.py", "--base-policy", "jacobian", "--episodes", "20", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["base_policy"] == "jacobian" and result["model"] is None and result["episodes"] == 20
    assert result["success_rate"] > 0.8 and result["mean_residual_magnitude"] == 0.0
    assert f"{result['mean_return']:.2f}" in done.stdout and "base alone" in done.stdout


def test_training_on_the_pusher_resumes_to_the_bit(tmp_path):
    flags = [*SMALL.split(), "--base-policy", "jacobian"]
    whole = train(tmp_path / "whole", *flags)
    half = min((whole / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    done = run_script("ppo_residual_so101.py", "--resume", str(half), "--log-dir", str(tmp_path / "resumed"))
    assert done.returncode == 0, done.stderr
    resumed = next((tmp_path / "resumed").iterdir())
    first, second = (torch.load(run / "final_model.pt", weights_only=True)["agent"] for run in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--base-policy"),
        ("--base-policy magic", "known are zero, jacobian"),
        ("--base-policy jacobian --tape-margin 3", "--tape-margin"),
    ],
)
def test_bad_flags_of_an_evaluation_without_a_model(flags, message):
    done = run_script("eval_so101.py", *flags.split())
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_zero_is_no_policy():
    assert make_base_policy("zero") is None


@pytest.mark.parametrize("observe_base", [False, True])
def test_residuals_stack(observe_base, tmp_path):
    """A frozen policy as base, and nothing added: the episodes of the frozen policy itself."""
    flags = "--base-policy jacobian --tape-margin 0.02 --learning-rate 0.05" + observe_base * " --observe-base"
    run = train(tmp_path, *SMALL.split(), *flags.split())
    model = run / "final_model.pt"
    checkpoint = ppo.load_checkpoint(str(model), "--model")
    args = ppo.checkpoint_args(checkpoint)
    args.num_threads = 1
    agent = ppo.load_agent(checkpoint)
    trained = ppo.evaluate(ppo.mean_action(agent), ppo.make_envs(args, 10, AutoresetMode.DISABLED), SEEDS[:10])
    args.base_policy, args.observe_base = f"checkpoint:{model}", False
    stacked = ppo.evaluate(ppo.no_residual, ppo.make_envs(args, 10, AutoresetMode.DISABLED), SEEDS[:10])
    assert [e["length"] for e in stacked] == [e["length"] for e in trained]
    np.testing.assert_allclose(
        [e["final_distance_m"] for e in stacked], [e["final_distance_m"] for e in trained], atol=1e-9
    )
    assert np.mean([e["residual_magnitude"] for e in trained]) > 0.05  # it does not just repeat the pusher


def test_another_base_is_refused(tmp_path):
    """A checkpoint whose base policy's file was trained anew can be neither evaluated nor resumed."""
    first, second = (train(tmp_path / seed, *SMALL.split(), "--seed", seed) / "final_model.pt" for seed in "12")
    base = tmp_path / "base.pt"
    base.write_bytes(first.read_bytes())
    top = train(tmp_path / "top", *SMALL.split(), "--base-policy", f"checkpoint:{base}")
    half = min((top / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    for script, flag, path in (
        ("eval_so101.py", "--model", top / "final_model.pt"),
        ("ppo_residual_so101.py", "--resume", half),
    ):
        base.write_bytes(second.read_bytes())
        done = run_script(script, flag, str(path))
        assert done.returncode == 2 and "weights" in done.stderr and "Traceback" not in done.stderr
        base.unlink()
        done = run_script(script, flag, str(path))
        assert done.returncode == 2 and str(base) in done.stderr and "Traceback" not in done.stderr


def test_base_success_and_residual_per_joint_are_reported(tmp_path):
    run = train(tmp_path, *SMALL.split(), "--base-policy", "jacobian", "--learning-rate", "0.05")
    lines = [json.loads(line) for line in (run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    seeds = [ppo.VALIDATION_SEED + i for i in range(3)]
    envs = ppo.make_envs(ppo.Args(base_policy="jacobian", num_threads=1), 3, AutoresetMode.DISABLED)
    alone = np.mean([e["success"] for e in ppo.evaluate(ppo.no_residual, envs, seeds)])
    assert {line["base_success_rate"] for line in lines} == {alone}
    # by hand, for one joint: how far each of the two moved the targets
    agent = ppo.load_agent(ppo.load_checkpoint(str(run / "final_model.pt"), "--model"))
    residual, base, act = [], [], ppo.mean_action(agent)
    for seed in seeds:
        envs = ppo.make_envs(ppo.Args(base_policy="jacobian", num_threads=1), 1, AutoresetMode.DISABLED)
        obs, done = envs.reset(seed=[seed])[0], False
        pusher, one = JacobianPolicy(), np.ones(1, bool)
        pusher.reset(one)
        while not done:
            base.append(abs(pusher.act(obs, envs.command, one)[0, 1]))
            residual.append(0.7 * 0.02 * abs(act(obs)[0, 1]))
            obs, _, terminated, truncated, _ = envs.step(act(obs))
            done = terminated[0] or truncated[0]
    assert lines[-1]["residual_to_base/shoulder_lift"] == pytest.approx(np.mean(residual) / np.mean(base), rel=1e-3)
    assert "residual_to_base/wrist_roll" not in lines[-1]  # the pusher keeps it still


def test_only_the_critic_learns_while_it_warms_up(tmp_path):
    run = train(tmp_path, *SMALL.split(), "--base-policy", "jacobian", "--critic-warmup-steps", "3000")
    early = min((run / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    first, last = (torch.load(path, weights_only=True)["agent"] for path in (early, run / "final_model.pt"))
    for name in first:
        learned = not torch.equal(first[name], last[name])
        assert learned == (name.startswith("critic")), name
    assert (last["actor_mean.5.weight"] == 0.0).all()  # as the residual began


def test_progressive_residual_leaves_steps_to_the_base_and_out_of_the_loss():
    args = ppo.Args(base_policy="jacobian", num_threads=1, num_envs=8)
    agent, envs = ppo.Agent(args), ppo.make_envs(args, 8)
    applied, step = [], envs.step
    envs.step = lambda action: (applied.append(action.copy()), step(action))[1]
    obs, _ = envs.reset(seed=0)
    buffers, _, _ = ppo.rollout(agent, envs, obs, 64, torch.Generator().manual_seed(0), residual_share=0.25)
    acts = buffers["acts"].numpy()
    assert 0.15 < acts.mean() < 0.35 and set(np.unique(acts)) == {0.0, 1.0}
    np.testing.assert_array_equal(np.array(applied) != 0.0, np.repeat(acts[:, :, None] == 1.0, ACT_DIM, axis=2))
    # the gradient of the actor is that of the steps in which it acted
    x, actions = agent.features(buffers["obs"].flatten(0, 1).numpy()), buffers["actions"].flatten(0, 1)
    mask, advantages = buffers["acts"].flatten(), torch.randn(len(x), generator=torch.Generator().manual_seed(1))
    args.norm_adv = False
    gradients = []
    for rows, masks in ((slice(None), [mask]), (mask == 1.0, [])):
        old = torch.zeros(len(x)) - 8.0
        loss, _ = ppo.ppo_loss(
            agent, x[rows], 0, actions[rows], old[rows], advantages[rows], advantages[rows], args, *masks
        )
        agent.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.actor_mean.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    "answer, message",
    [(np.zeros((4, 5)), "(4, 6)"), (np.full((4, ACT_DIM), np.nan), "finite"), (np.full((4, ACT_DIM), 40.0), "degrees")],
)
def test_a_base_policy_that_fails_stops_the_run(answer, message):
    policy = JacobianPolicy()
    policy.act = lambda obs, command, mask: answer
    envs = SO101ResidualVectorEnv(4, policy)
    envs.reset(seed=0)
    with pytest.raises(BasePolicyError, match=re.escape(message)):
        envs.step(np.zeros((4, ACT_DIM)))


def test_training_on_a_base_policy_that_fails_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(JacobianPolicy, "act", lambda self, obs, command, mask: np.full((len(obs), ACT_DIM), np.nan))
    monkeypatch.setattr(sys, "argv", ["ppo_residual_so101.py", "--base-policy", "jacobian", "--log-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--base-policy jacobian" in line and "JacobianPolicy" in line


def test_observed_base_action_is_the_one_that_acts():
    """After a reset, too, and the final observation of an episode has its own; the pusher remembers each step once."""
    pusher, everyone = JacobianPolicy(), np.ones(6, bool)
    envs = SO101ResidualVectorEnv(6, JacobianPolicy(), observe_base=True, max_episode_steps=40)
    obs, _ = envs.reset(seed=0)
    pusher.reset(everyone)
    envs._steps[:3] = 20  # so that half of them is reset while the others go on
    for _ in range(70):
        np.testing.assert_allclose(obs[:, 25:], pusher.act(obs[:, :25], envs.command, everyone), atol=1e-6)
        shown = obs[:, 25:].copy()
        obs, _, terminated, truncated, info = envs.step(np.zeros((6, ACT_DIM)))
        np.testing.assert_allclose(info["base_delta_rad"], shown, atol=1e-6)
        if truncated.any():
            assert np.abs(info["final_obs"][truncated, 25:] - obs[truncated, 25:]).max() > 1e-4
        pusher.reset(terminated | truncated)
