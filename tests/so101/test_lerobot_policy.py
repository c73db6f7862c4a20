"""The policy type so101_residual in LeRobot's environment: trained here, exported, and run by LeRobot.

With the Python of an environment in LEROBOT_PYTHON that has LeRobot, this project and its plug-in, and what --export
needs.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_server import ACT, TINY_POLICY

PYTHON = os.environ.get("LEROBOT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no Python of an environment with LeRobot")
TRAIN = "--total-timesteps 128 --num-envs 2 --num-steps 32 --minibatch-size 32 --eval-every 0 --final-eval-episodes 2"
LOADED = """
import sys, numpy as np, torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins

register_third_party_plugins()
def load(path):
    config = PreTrainedConfig.from_pretrained(path)
    config.device = "cpu"
    return get_policy_class(config.type).from_pretrained(path, config=config), make_pre_post_processors(config, path)

torch.manual_seed(0)
frame = {"observation.state": torch.tensor([0.0, 27.3, -13.4, 76.1, 2.7, 5.0])}
frame |= {"observation.images.top": torch.rand(3, 64, 64), "task": ["slide"]}
actions = []
for path in (sys.argv[1], sys.argv[2]):
    policy, (before, after) = load(path)
    policy.reset()
    actions.append(np.array([after(policy.select_action(before(dict(frame)))).numpy()[0] for _ in range(5)]))
    if path == sys.argv[1]:
        policy.save_pretrained(sys.argv[2])
        before.save_pretrained(sys.argv[2])
        after.save_pretrained(sys.argv[2])
assert actions[0].shape == (5, 6) and np.array_equal(*actions), actions
# without a view of the sheet the base acts alone: its first chunk is its own
base, (before, after) = load(sys.argv[1] + "/base")
with torch.inference_mode():
    chunk = after(base.predict_action_chunk(before(dict(frame))))[0].numpy()
start = frame["observation.state"].numpy()
towards = np.sign(chunk[0] - start) == np.sign(actions[0][4] - start)
assert towards[:2].all(), (chunk[0], actions[0][4], start)
print("the same after a round trip")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A directory with a tiny ACT and a residual on it, in LeRobot's environment."""
    directory = tmp_path_factory.mktemp("lerobot")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [PYTHON, *words], capture_output=True, text=True, timeout=400, cwd=directory, env=variables
        )  # fmt: skip
        if "No package metadata" in done.stderr or "No module named 'lerobot_policy" in done.stderr + done.stdout:
            pytest.skip("the plug-in is not installed there, see docs/lerobot.md")
        assert done.returncode == code, done.stdout[-500:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    options = ACT + "pretrained_backbone_weights=None"
    run("-c", TINY_POLICY.format(module="act.configuration_act", name="ACT", options=options), "act")
    base = ["--base-policy", "lerobot:act", "--units", "deg"]
    run(str(ROOT / "ppo_residual_so101.py"), *base, *TRAIN.split(), "--log-dir", "logs", "--run-name", "run")
    return directory, run


def export(run, target: str, *flags: str, code: int = 0) -> str:
    words = ["--model", "logs/run/final_model.pt", "--episodes", "2", "--export-lerobot", target, *flags]
    return run(str(ROOT / "eval_so101.py"), *words, code=code)


def test_it_is_exported_and_evaluated_by_lerobot(environment):
    directory, run = environment
    export(run, "both", "--base-policy", "lerobot:act")
    assert {path.name for path in (directory / "both").iterdir()} >= {
        "README.md",
        "config.json",
        "residual.onnx",
        "base",
    }
    card = (directory / "both/README.md").read_text()
    assert "type act" in card and "2000000000 to 2000000001" in card and "0.000 to 0.658" in card  # Wilson, 0 of 2
    assert not (directory / "both/base/train_config.json").exists() and not list(directory.glob(".*"))
    assert "the same after a round trip" in run("-c", LOADED, "both", "again")
    env = ["--env.type=so101_residual", "--env.episode_length=12", "--eval.n_episodes=2", "--eval.batch_size=2"]
    run("-m", "lerobot.scripts.lerobot_eval", "--policy.path=both", *env, "--output_dir=evaluated")
    info = json.loads((directory / "evaluated/eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(environment):
    directory, run = environment
    (directory / "there").mkdir()
    assert "exists already" in export(run, "there", "--allow", "lerobot:act", code=2)
    assert "--allow lerobot:act" in export(run, "new", code=2)
    shutil.copytree(directory / "act", directory / "other")
    config = json.loads((directory / "other/config.json").read_text())
    (directory / "other/config.json").write_text(json.dumps({**config, "dropout": 0.2}))
    assert "put the old one back" in export(run, "new", "--allow", "lerobot:other", code=2)
    assert not (directory / "new").exists() and not list(directory.glob(".*")) and not list(Path("there").glob("*"))


def test_a_directory_with_another_base_is_refused(environment):
    directory, run = environment
    if not (directory / "both").exists():
        export(run, "both", "--allow", "lerobot:act")
    shutil.copytree(directory / "both", directory / "changed")
    weights = directory / "changed/base/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code = "import sys; from lerobot_policy_so101_residual.modeling_so101_residual import *; "
    text = run("-c", code + "SO101ResidualPolicy.from_pretrained(sys.argv[1])", "changed", code=1)
    assert "put the old one back" in text
