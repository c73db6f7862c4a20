"""Whole episodes through Gymnasium's wrappers, stable-baselines3 and Minari; installation by pip."""

import os
import shutil
import subprocess
import sys

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import ROOT
from gymnasium import wrappers
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import so101_env  # registers SO101Residual-v0
from so101_env import BasePolicyError


def play(env: gym.Env, seed: int, scale: float = 0.0) -> tuple[int, bool, dict]:
    """An episode to its end, with actions beyond [-1, 1] if scale is large: steps, terminated, last info."""
    env.reset(seed=seed)
    rng, steps, done = np.random.default_rng(seed), 0, False
    while not done:
        *_, terminated, truncated, info = env.step(rng.normal(0, scale, 6).astype(np.float32))
        steps, done = steps + 1, terminated or truncated
    return steps, terminated, info


def test_spec_strings_name_the_base_policy():
    env = gym.make("SO101Residual-v0", base_policy="jacobian")
    steps, terminated, info = play(env, seed=0)
    assert terminated and info["is_success"] and steps < 200 and np.abs(info["base_delta_rad"]).max() > 0
    assert not play(gym.make("SO101Residual-v0", base_policy="zero"), seed=0)[1]
    envs = gym.make_vec("SO101Residual-v0", num_envs=2, base_policy="jacobian", observe_base=True)
    assert envs.reset(seed=0)[0].shape == (2, 31)
    for make, kwargs in ((gym.make, {}), (gym.make_vec, {"num_envs": 2})):
        with pytest.raises(BasePolicyError, match="unknown base policy 'jacobi'"):
            make("SO101Residual-v0", base_policy="jacobi", **kwargs)


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
def test_gymnasiums_checker_with_a_base_policy():
    check_env(so101_env.SO101ResidualEnv(base_policy="jacobian"), skip_render_check=True)


def test_statistics_video_and_clipping_to_success_and_time_out(tmp_path):
    pytest.importorskip("moviepy")
    env = gym.make("SO101Residual-v0", base_policy="jacobian", render_mode="rgb_array", width=64, height=48)
    env = wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda episode: True, disable_logger=True)
    env = wrappers.ClipAction(wrappers.RecordEpisodeStatistics(wrappers.FlattenObservation(env)))
    steps, terminated, info = play(env, seed=0)
    assert terminated and info["episode"]["l"] == steps == info["episode_summary"]["length"]
    assert info["episode"]["r"] == pytest.approx(info["episode_summary"]["return"])
    env.close()
    (film,) = tmp_path.glob("*.mp4")
    frames = imageio.mimread(film, memtest=False)
    assert len(frames) == steps + 1 and frames[0].shape == (48, 64, 3)

    env = wrappers.RecordEpisodeStatistics(wrappers.ClipAction(gym.make("SO101Residual-v0")))
    steps, terminated, info = play(env, seed=0, scale=3.0)  # wild actions, until the time-out
    assert not terminated and steps == info["episode"]["l"] == so101_env.MAX_EPISODE_STEPS

    env = wrappers.RecordEpisodeStatistics(gym.make("SO101Residual-v0", max_episode_steps=20))  # by TimeLimit
    steps, terminated, info = play(env, seed=0)
    assert not terminated and steps == info["episode"]["l"] == info["episode_summary"]["length"] == 20


def test_vector_wrappers_across_autoresets():
    envs = gym.make_vec(
        "SO101Residual-v0", 4, base_policy="jacobian", max_episode_steps=90, autoreset_mode=AutoresetMode.NEXT_STEP
    )
    plain = gym.make_vec("SO101Residual-v0", 4, base_policy="jacobian", max_episode_steps=90)
    envs = statistics = wrappers.vector.RecordEpisodeStatistics(envs)
    envs = wrappers.vector.DtypeObservation(wrappers.vector.FlattenObservation(envs), np.float64)
    envs = wrappers.vector.NormalizeReward(wrappers.vector.NormalizeObservation(envs))
    envs = wrappers.vector.DictInfoToList(wrappers.vector.ClipAction(envs))
    envs.reset(seed=0)
    plain.reset(seed=0)
    returns, expected, seen = [], [], []
    for _ in range(300):
        obs, _, terminated, truncated, infos = envs.step(np.zeros((4, 6)))
        seen.append(obs)
        for info in (infos[i] for i in np.flatnonzero(terminated | truncated)):
            returns.append(info["episode"]["r"])
            assert info["episode"]["r"] == pytest.approx(info["episode_summary"]["return"])
        info = plain.step(np.zeros((4, 6)))[-1]
        if "final_info" in info:
            expected += info["final_info"]["episode_summary"]["return"][info["_final_info"]].tolist()
    assert len(returns) >= 10 and list(statistics.return_queue) == returns
    assert set(np.round(returns, 9)) <= set(np.round(expected, 9))  # the same episodes, each a step later
    assert np.isfinite(seen).all() and np.abs(np.mean(seen[100:], axis=(0, 1))).max() < 1.0


@pytest.mark.parametrize(
    "algorithm, steps",
    [
        ("PPO", 1024),
        pytest.param("PPO", 3000, marks=pytest.mark.slow),
        pytest.param("SAC", 3000, marks=pytest.mark.slow),
    ],
)
def test_stable_baselines3_learns_on_it(algorithm, steps):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env

    env = gym.make("SO101Residual-v0", base_policy="jacobian", shaping_gamma=0.98)
    check_env(env)
    settings = {
        "PPO": {"n_steps": 512, "batch_size": 128, "gamma": 0.98, "policy_kwargs": {"log_std_init": -1.5}},
        "SAC": {"learning_starts": 200, "train_freq": 8, "gradient_steps": 2, "gamma": 0.98},
    }[algorithm]
    model = getattr(sb3, algorithm)("MlpPolicy", env, seed=1, device="cpu", **settings)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(steps)
    assert any((tensor != before[name]).any() for name, tensor in model.policy.state_dict().items())
    assert len(model.ep_success_buffer) > 3 and sum(model.ep_success_buffer) > 0  # it reads info["is_success"]
    obs, _ = env.reset(seed=0)
    assert model.predict(obs, deterministic=True)[0] in env.action_space


def test_stable_baselines3_trains_from_pixels():
    """MultiInputPolicy on the pictures and measurements, without any wrapper."""
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env

    env = gym.make("SO101Residual-v0", base_policy="jacobian", observe="pixels", image_size=(64, 64))
    check_env(env)
    model = sb3.PPO("MultiInputPolicy", env, seed=1, device="cpu", n_steps=128, batch_size=64, n_epochs=2)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(384)
    changed = {name for name, tensor in model.policy.state_dict().items() if (tensor != before[name]).any()}
    assert any("pixels_top.cnn" in name for name in changed)
    obs, _ = env.reset(seed=0)
    assert model.predict(obs, deterministic=True)[0] in env.action_space


def test_minari_records_it(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    pytest.importorskip("jax")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gym.make("SO101Residual-v0", base_policy="jacobian")
    env = minari.DataCollector(env, record_infos=True, data_format="arrow")
    lengths = [play(env, seed)[0] for seed in (0, 1)]
    dataset = env.create_dataset("so101/test-v0")
    assert [len(episode) for episode in dataset] == lengths
    for episode in dataset:
        assert len(episode.infos["distance_m"]) == len(episode) + 1  # from reset, too
        assert np.isfinite([terms["yaw"] for terms in episode.infos["reward_terms"]]).all()
        assert episode.infos["is_success"][-1] and not episode.infos["is_success"][:-1].any()
    env.close()


@pytest.mark.slow
def test_pip_installs_what_works_from_any_directory(tmp_path):
    """The wheel that `pip install git+URL` builds: three modules and three packages with names of ours."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "logs", "results", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    installed = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} - {"__pycache__"}
    scripts = {"ppo_residual_so101.py", "eval_so101.py", "so101_env.py"}
    assert installed == scripts | {"so101", "so101_sim", "so101_assets"}
    for package in ("so101", "so101_sim"):
        own = {path.name for path in (ROOT / package).glob("*.py")}
        assert {path.name for path in (site / package).iterdir()} - {"__pycache__"} == own
    assets = {path.name for path in (site / "so101_assets").iterdir()}
    assert {"so101.xml", "table.xml", "paper_in_square.xml", "pretrained.pt", "arm.onnx", "tags.pdf"} <= assets

    def run(*words: str) -> str:
        variables = {**os.environ, "PYTHONPATH": str(site), "PATH": ""}
        command = [sys.executable, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = (
        "import gymnasium, so101_env\nenv = gymnasium.make('SO101Residual-v0', base_policy='jacobian')\n"
        "env.reset(seed=0); env.step(env.action_space.sample()); print(so101_env.__file__)"
    )
    assert str(site) in run("-c", code)
    tiny = "--total-timesteps 64 --num-steps 16 --num-envs 4 --minibatch-size 64 --eval-every 0".split()
    run("-m", "ppo_residual_so101", *tiny, "--run-name", "tiny")
    for model in ((), ("--model", "logs/tiny/final_model.pt")):
        assert "success rate" in run("-m", "eval_so101", *model, "--episodes", "2")
    assert "usage" in run("-m", "so101.drive", "--help")
