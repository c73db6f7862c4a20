"""eval_so101.py as a user runs it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, run_script, train

from so101.evaluation import BLOCK, TEST_SEED, VALIDATION_SEED


def test_evaluation_json_and_table(tmp_path):
    """On a residual over the pusher, which succeeds in some of the precise episodes and fails in others."""
    flags = "--total-timesteps 1000 --eval-every 0 --base-policy jacobian --tape-margin 0.02".split()
    run = train(tmp_path / "logs", *SMALL.split(), *flags)
    model = str(run / "final_model.pt")
    done = run_script("eval_so101.py", "--model", model, "--episodes", "12", "--json", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    episodes = result["episode_list"]
    assert result["episodes"] == len(episodes) == 12
    assert [episode["seed"] for episode in episodes] == [TEST_SEED + i for i in range(12)]
    assert TEST_SEED > VALIDATION_SEED + 10**6
    assert result["success_rate"] == sum(episode["success"] for episode in episodes) / 12
    assert result["mean_return"] == pytest.approx(np.mean([episode["return"] for episode in episodes]))
    assert result["mean_length"] == pytest.approx(np.mean([episode["length"] for episode in episodes]))
    k, n, z = sum(episode["success"] for episode in episodes), 12, 1.959964
    centre, root = (k + z**2 / 2) / (n + z**2), z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)  # Wilson
    np.testing.assert_allclose(result["success_ci95"], [centre - root, centre + root], atol=1e-6)
    assert 0 < k < 12 and 0 < result["base_success_rate"] < 1 and result["base"]["mean_residual_magnitude"] == 0.0
    assert "base alone (jacobian)" in done.stdout and f"{result['mean_return']:.2f}" in done.stdout
    again = run_script(
        "eval_so101.py", "--model", model, "--episodes", "12", "--json", str(tmp_path / "b.json"), "--num-threads", "1"
    )
    assert again.stdout == done.stdout
    other = json.loads((tmp_path / "b.json").read_text())
    run, run_again = result.pop("provenance"), other.pop("provenance")
    assert other == result and run["command"].endswith(f"--model {model} --episodes 12 --json {tmp_path / 'a.json'}")
    assert {key for key in run if run[key] != run_again[key]} == {"command", "args"}
    assert result["model_sha256"] == hashlib.sha256(Path(model).read_bytes()).hexdigest()
    alone = [episode["success"] for episode in result["base_episode_list"]]
    assert len(alone) == 12 and sum(alone) / 12 == result["base_success_rate"]


def test_evaluation_video_and_plot(tmp_path):
    import imageio.v3 as iio

    video, picture = tmp_path / "v.mp4", tmp_path / "p.png"
    flags = ["--episodes", "3", "--video", str(video), "--video-episodes", "1", "--plot", str(picture)]
    done = run_script("eval_so101.py", *flags, "--no-base", "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    assert iio.immeta(video)["fps"] == 30
    length = json.loads((tmp_path / "r.json").read_text())["episode_list"][0]["length"]
    frames = iio.imread(video)
    assert frames.shape == (length + 1 + 15, 480, 640, 3)  # and half a second of the last one
    assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).mean() > 0.1
    assert iio.imread(picture).std() > 10
    # a GIF shows every third frame, smaller, three times as long
    gif = tmp_path / "v.gif"
    done = run_script("eval_so101.py", "--base-policy", "jacobian", "--episodes", "1", "--video", str(gif))
    assert done.returncode == 0, done.stderr
    frames = iio.imread(gif)
    assert frames.shape[1:] == (360, 480, 3) and len(frames) > 5 and iio.immeta(gif)["duration"] == 100


def test_blocks_of_episodes_and_conditions(tmp_path):
    """--seed takes other episodes; conditions are those of the model unless a flag changes them."""
    flags = "--total-timesteps 512 --base-policy jacobian --tape-margin 0.03 --eval-every 0".split()
    run = train(tmp_path / "logs", *SMALL.split(), *flags)
    results = []
    for flags in ([], ["--seed", "1"], ["--full-randomization", "--tape-margin", "0.02"]):
        path = tmp_path / "r.json"
        flags = ["--model", str(run / "final_model.pt"), "--episodes", "2", "--no-base", "--json", str(path), *flags]
        done = run_script("eval_so101.py", *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(path.read_text()) | {"printed": done.stdout.splitlines()[0]})
    plain, block, changed = results
    assert plain["task"]["tape_margin"] == 0.03 and not plain["task"]["full_randomization"]
    assert [episode["seed"] for episode in block["episode_list"]] == [TEST_SEED + BLOCK + i for i in range(2)]
    assert "episodes of block 1," in block["printed"] and "of block" not in plain["printed"]
    assert changed["task"]["tape_margin"] == 0.02 and changed["task"]["full_randomization"]
    assert "tape margin 20 mm, full randomisation" in changed["printed"]
    assert [episode["seed"] for episode in changed["episode_list"]] == [TEST_SEED, TEST_SEED + 1]
