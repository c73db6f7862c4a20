"""Policies as ONNX files: the same actions as the checkpoint, other tools' files, what is refused."""

import copy
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, load, run_script, train
from gymnasium.vector import AutoresetMode

from so101.checkpoints import load_checkpoint, load_script, save_tensors
from so101.evaluation import evaluate, no_residual
from so101.networks import Derived, sheet_to_tip
from so101.onnx import OnnxPolicy
from so101.onnx_export import export_onnx, serialize
from so101.policies import load_policy
from so101_env import SO101ResidualVectorEnv, base_observation
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MODEL = str(ROOT / "assets" / "pretrained.pt")
SEEDS = [1_510_000_000 + i for i in range(30)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "policy.onnx"
    done = run_script("eval_so101.py", "--model", MODEL, "--export", str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_it_acts_as_the_checkpoint(exported):
    """On states of its own episodes and on any others, alone and in a batch; and so it succeeds as often as a base."""
    agent, policy = load_checkpoint(MODEL).agent(MODEL), OnnxPolicy(str(exported))
    envs = SO101ResidualVectorEnv(50, full_randomization=True)
    obs, rng, seen = envs.reset(seed=SEEDS[0])[0], np.random.default_rng(0), []
    for _ in range(20):
        seen.append(obs)
        obs = envs.step(rng.uniform(-1, 1, (50, ACT_DIM)))[0]
    obs = np.concatenate(seen)
    assert np.abs(policy.residuals(obs) - agent.act(obs)).max() < 1e-5
    np.testing.assert_allclose(policy.residuals(obs[7:8]), policy.residuals(obs)[7:8], atol=1e-6)

    results = []
    for spec in (f"checkpoint:{MODEL}", f"onnx:{exported}"):
        envs = SO101ResidualVectorEnv(30, spec, autoreset_mode=AutoresetMode.DISABLED)
        results.append([(episode["success"], episode["length"]) for episode in evaluate(no_residual, envs, SEEDS)])
    same = [a == b for a, b in zip(*results)]  # a rounding may turn one step of one of them
    assert sum(same) >= 28 and sum(success for success, _ in results[1]) >= 28


def test_an_export_does_not_replace_the_base_policy(exported, tmp_path):
    """Afterwards neither the base policy nor the residual on it could be used."""
    saved, base = load(MODEL), shutil.copy(exported, tmp_path / "base.onnx")
    saved["args"]["base"]["base_policy"] = f"onnx:{base}"
    saved["base_fingerprint"] = OnnxPolicy(str(base)).fingerprint
    save_tensors(tmp_path / "residual.pt", saved)
    before = base.read_bytes()
    done = run_script("eval_so101.py", "--model", str(tmp_path / "residual.pt"), "--export", str(base))
    assert done.returncode == 2 and "is only read; name another place" in done.stderr, done.stderr
    assert base.read_bytes() == before


def test_its_metadata_say_what_a_user_must_know(exported):
    saved = torch.load(MODEL, weights_only=True)
    metadata = json.loads({p.key: p.value for p in onnx.load(exported).metadata_props}["so101"])
    assert [each["name"] for each in metadata["observation"]][:2] == ["shoulder_pan.pos", "shoulder_lift.pos"]
    units = {each["name"]: each["unit"] for each in metadata["observation"]}
    assert len(units) == 25 and units["gripper.vel"] == "rad/s" and units["tip.z"] == "m" and units["sheet.qw"] == "1"
    assert metadata["scale_rad"] == pytest.approx(0.7 * 0.02) and metadata["base_policy"] == "zero"
    assert metadata["task"] == saved["args"]["task"] and metadata["global_step"] == saved["global_step"]
    assert b"so101/onnx_export.py" not in exported.read_bytes()  # nor paths of the machine that wrote it
    assert metadata["script"] == "ppo_residual_so101.py" and set(metadata["git"]) == {"commit", "dirty"}
    seed, steps = (saved["args"][name] for name in ("seed", "total_timesteps"))
    assert metadata["command"] == f"python ppo_residual_so101.py --seed {seed} --total-timesteps {steps}"
    assert metadata["evaluations"] == saved["recorder"]["finalists"]


def foreign(path, batch="N", width=25, actions=ACT_DIM, outputs=1, **options):
    """A policy as another tool might write it: one linear layer, no metadata; options of onnx.save."""
    weights = np.random.default_rng(1).normal(0, 0.1, (width, actions)).astype(np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["obs", "w"], [f"out{i}"]) for i in range(outputs)]
    graph = onnx.helper.make_graph(
        nodes,
        "policy",
        [onnx.helper.make_tensor_value_info("obs", onnx.TensorProto.FLOAT, [batch, width])],
        [
            onnx.helper.make_tensor_value_info(f"out{i}", onnx.TensorProto.FLOAT, [batch, actions])
            for i in range(outputs)
        ],
        [onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, **options)
    return weights


@pytest.mark.parametrize("batch", ["N", 1, 2, 4])
def test_a_file_of_another_tool_is_a_residual_of_the_default_task(tmp_path, batch):
    weights, rng = foreign(tmp_path / "p.onnx", batch), np.random.default_rng(0)
    policy, mask = load_policy(f"onnx:{tmp_path / 'p.onnx'}"), np.array([True, False, True])
    obs = rng.normal(0, 1, (3, 25)).astype(np.float32)
    policy.reset(mask)
    delta = policy.act(base_observation(obs, np.zeros((3, 6))), mask)
    expected = 0.014 * np.clip(obs.astype(np.float64) @ weights, -1, 1) * mask[:, None]
    np.testing.assert_allclose(delta, expected, atol=1e-7)


def test_weights_beside_the_file_are_read_and_no_other_file_is(tmp_path, monkeypatch):
    """torch.onnx.export writes policy.onnx and policy.onnx.data by default."""
    beside = {"save_as_external_data": True, "size_threshold": 0, "location": "p.onnx.data"}
    weights = foreign(tmp_path / "p.onnx", **beside)
    obs = np.random.default_rng(0).normal(0, 1, (3, 25)).astype(np.float32)
    for name in ("p.onnx", "renamed.onnx"):
        (tmp_path / name).write_bytes((tmp_path / "p.onnx").read_bytes())
        policy = OnnxPolicy(str(tmp_path / name))
        np.testing.assert_allclose(policy.residuals(obs), np.clip(obs @ weights, -1, 1), atol=1e-6)
    data, fingerprint = tmp_path / "p.onnx.data", policy.fingerprint
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert OnnxPolicy(str(tmp_path / "p.onnx")).fingerprint != fingerprint

    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path)  # a path in the file must not be taken from the working directory either
    for location in ("p.onnx.data", "../p.onnx.data", str(data), "absent"):
        model = onnx.load_from_string((tmp_path / "p.onnx").read_bytes())
        model.graph.initializer[0].external_data[0].value = location
        (tmp_path / "deeper" / "p.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(SO101Error, match="which is not beside it|external data"):
            OnnxPolicy("deeper/p.onnx")


def test_one_flipped_bit_is_noticed(tmp_path):
    """Anywhere in the included policy: graph, metadata, checksum."""
    content, rng = (ROOT / "assets" / "arm.onnx").read_bytes(), np.random.default_rng(0)
    path, ends = tmp_path / "p.onnx", np.arange(len(content) - 90, len(content))
    for position in [*rng.integers(0, len(content), 60), *ends]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(SO101Error, match=str(path)):
            OnnxPolicy(str(path))


LIES = {
    ("base_policy",): ["jacobian", "", "helper:Base", 3],
    ("base_fingerprint",): ["x", None],
    ("task", "alpha"): [-1, 0, 1.5, "x", float("nan")],
    ("task", "act_scale"): [0.04, 1e300],
    ("task", "firmware_p"): [0, 2.5, True],
    ("observe_base",): [True, 1],
    ("scale_rad",): [0.0, 0.8, None],
    ("control_hz",): [60, "30"],
    ("global_step",): [-1, 10**30, True, 2.0],
    ("command",): [1, ["python"]],
    ("observation", 0, "unit"): ["deg"],
    ("observation", 0, "name"): ["elbow_flex.pos"],
    ("action",): ["degrees"],
    ("task", "magic"): [1],
    ("magic",): [1],
    ("evaluations",): [None, "none"],
}


def test_metadata_that_contradict_the_file_are_refused(tmp_path, monkeypatch):
    """With a checksum that fits, as of somebody who has written the file anew."""
    model, path = onnx.load(ROOT / "assets" / "arm.onnx"), tmp_path / "p.onnx"
    metadata = json.loads(model.metadata_props[0].value)
    path.write_bytes(serialize(model, metadata))
    OnnxPolicy(str(path))
    for (*where, last), values in LIES.items():
        for value in values:
            changed = copy.deepcopy(metadata)
            inner = functools.reduce(lambda item, key: item[key], where, changed)
            inner[last] = value
            path.write_bytes(serialize(model, changed))
            with pytest.raises(SO101Error, match=str(path)):
                OnnxPolicy(str(path))
    twice = '{"scale_rad": 1.0, ' + json.dumps(metadata)[1:]
    monkeypatch.setattr(json, "dumps", lambda _: twice)
    path.write_bytes(serialize(model, metadata))
    with pytest.raises(SO101Error, match="contains 'scale_rad' twice"):
        OnnxPolicy(str(path))


def test_what_is_no_policy_is_refused(tmp_path, exported, monkeypatch):
    path = tmp_path / "p.onnx"
    cases = [({"width": 24}, "not observations"), ({"actions": 5}, "not residuals"), ({"outputs": 2}, "one of each")]
    for settings, text in cases:
        foreign(path, **settings)
        with pytest.raises(SO101Error, match=text):
            OnnxPolicy(str(path))
    path.write_bytes(b"hello")
    with pytest.raises(SO101Error, match="is not a usable ONNX file"):
        OnnxPolicy(str(path))
    with pytest.raises(SO101Error, match="no such file"):
        OnnxPolicy(str(tmp_path / "none.onnx"))
    model = onnx.load(exported)
    metadata = json.loads(model.metadata_props[0].value)
    for change, text in (
        ({"format": "so101 onnx 0"}, "export it again"),
        ({"task": {"alpha": 1.0}}, "lacks the setting"),
    ):
        path.write_bytes(serialize(model, metadata | change))
        with pytest.raises(SO101Error, match=text):
            OnnxPolicy(str(path))
    assert "must end in .onnx" in error_of(monkeypatch, "eval_so101.py", "--export", "policy.pt")


def test_an_export_that_would_not_be_the_same_is_not_written(tmp_path, monkeypatch):
    """A feature that uses an array of its module, which the tracer loses."""
    shift = np.array([1.0, 2.0], np.float32)
    wrong = Derived(lambda obs: sheet_to_tip(obs) + shift, (1, -1))
    monkeypatch.setattr(load_script("ppo_residual_so101.py"), "SHEET_TO_TIP", wrong)
    path = tmp_path / "p.onnx"
    with pytest.raises(SO101Error, match="make the array within the function|cannot be"):
        export_onnx(MODEL, path)
    assert not path.exists()


@pytest.mark.parametrize(
    "load, width", [((), 31), pytest.param(("--observe-load",), 37, marks=pytest.mark.slow)], ids=["base", "load"]
)
def test_a_residual_that_sees_its_base(tmp_path, load, width):
    """And the load: 31 or 37 numbers go in, and the base policy named in the file acts below it."""
    done = run_script(
        "ppo_residual_so101.py", *"--total-timesteps 384 --num-envs 4 --num-steps 32 --minibatch-size 64".split(),
        *"--eval-every 0 --base-policy jacobian --observe-base --run-name r --learning-rate 0.01".split(),
        "--log-dir", str(tmp_path), *load,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, path = str(tmp_path / "r" / "final_model.pt"), tmp_path / "p.onnx"
    metadata = export_onnx(model, path)
    assert metadata["base_policy"] == "jacobian" and len(metadata["observation"]) == width
    assert OnnxPolicy(str(path)).session.get_inputs()[0].shape[1] == width
    task = dataclasses.asdict(OnnxPolicy(str(path)).task)
    assert task == torch.load(model, weights_only=True)["args"]["task"]
    steps = []
    for spec in (f"checkpoint:{model}", f"onnx:{path}"):
        envs = SO101ResidualVectorEnv(4, spec, autoreset_mode=AutoresetMode.DISABLED, max_episode_steps=40)
        steps.append(np.array([episode["base_delta_rad"] for episode in evaluate(no_residual, envs, SEEDS[:4])]))
    np.testing.assert_allclose(steps[0], steps[1], rtol=2e-3, atol=1e-5)
    assert steps[0].max() > 1e-3


def test_the_load_is_the_same_in_the_environment_and_in_both_kinds_of_files(tmp_path):
    """In a rollout of random residuals: what the agent gets in training, and what policies in files compute."""
    flags = "--total-timesteps 8 --num-envs 4 --num-steps 2 --minibatch-size 8 --eval-every 0 --final-eval-episodes 0"
    model = train(tmp_path, *flags.split(), "--observe-load") / "final_model.pt"
    policies, seen = [load_policy(f"checkpoint:{model}"), OnnxPolicy(str(ROOT / "assets" / "arm.onnx"))], {0: [], 1: []}
    agent, session = policies[0].agent, policies[1].residuals
    agent.act = lambda flat: seen[0].append(flat) or np.zeros((len(flat), ACT_DIM), np.float32)
    policies[1].residuals = lambda flat: seen[1].append(flat) or session(flat)
    envs = SO101ResidualVectorEnv(5, arm_randomization=True, observe_load=True, firmware_p=16)
    obs, rng, mask = envs.reset(seed=0)[0], np.random.default_rng(0), np.array([True, True, False, True, True])
    for policy in policies:
        policy.reset(np.ones(5, bool))
    for step in range(20):
        for i, policy in enumerate(policies):
            policy.act(base_observation(envs.full_observation, envs.command, load=envs.arms.load), mask)
            np.testing.assert_array_equal(seen[i][step], obs[mask])
        obs = envs.step(rng.uniform(-1, 1, (5, ACT_DIM)))[0]
    assert np.abs(obs[:, 25:31]).max() > 0.01
