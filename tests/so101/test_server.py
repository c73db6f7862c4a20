"""Policy servers as base policies: every dialect, every fault, and runs that outlive a server."""

import dataclasses
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, assert_same, error_of, run_script, train
from gymnasium.vector import AutoresetMode

from so101 import serve
from so101.groot import JOINT_GROUPS
from so101.policies import load_policy
from so101.server import ChunkPolicy, InProcess, Server
from so101.trust import Trust
from so101_env import RESIDUAL, SO101ResidualVectorEnv, base_observation, load_model
from so101_sim.control import JOINTS
from so101_sim.errors import SO101Error

fake_server = pytest.importorskip("fake_server")  # needs pyzmq and msgpack
zmq, msgpack = fake_server.zmq, fake_server.msgpack
HORIZON, FakeServer = fake_server.HORIZON, fake_server.FakeServer

DIALECTS = ("n1.5", "n1.6", "main")
# of servers that answer, late on a busy machine
DEG = Server(units="deg", image_size=(24, 32), server_timeout=20.0)


def make_envs(spec: str, options: Server = DEG, num_envs: int = 3) -> SO101ResidualVectorEnv:
    policy = load_policy(spec, options)
    return SO101ResidualVectorEnv(num_envs, policy, num_threads=1, autoreset_mode=AutoresetMode.DISABLED)


def degrees(joints_rad: np.ndarray) -> np.ndarray:
    """As LeRobot counts: the gripper in percent of its range."""
    low, high = load_model().actuator_ctrlrange[5]
    return np.concatenate([np.rad2deg(joints_rad[:, :5]), 100 * (joints_rad[:, 5:] - low) / (high - low)], axis=1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_carries_pictures_states_and_chunks(dialect):
    """What the server is asked is what the scene shows, and what it answers is what the arm is told."""
    with FakeServer(dialect, cameras=("front", "wrist")) as server:
        options = Server(("front=top", "wrist"), (24, 32), "deg", chunk_steps=5, instruction="Slide it.")
        envs = make_envs(server.spec, options)
        asked = len(server.questions)  # by the constructor, which asks a fixed question twice
        envs.reset(seed=3)
        for step in range(11):
            before, qpos, commands = envs.qpos, envs.qpos.copy(), envs.command
            pictures = [envs.camera_images(qpos, camera, (24, 32)) for camera in ("top", "wrist")]
            _, _, _, _, infos = envs.step(np.zeros((3, 6)))
            assert len(server.questions) - asked == step // 5 + 1  # one request for all arms, every five steps
            if step % 5 == 0:
                question = server.questions[-1]
                for name, picture in zip(("front", "wrist"), pictures):
                    assert np.array_equal(question["video"][name][:, 0], picture)
                told = degrees(before[:, :6])
                state = np.concatenate([question["state"][key][:, 0] for key in ("single_arm", "gripper")], axis=1)
                np.testing.assert_allclose(state, told, atol=1e-4)
                assert question["text"] == [["Slide it."]] * 3
                start = told + 0.01 * sum(picture.mean((1, 2, 3)) for picture in pictures)[:, None]
            wanted = start + 0.1 * (step % 5)
            np.testing.assert_allclose(degrees(commands + infos["base_delta_rad"]), wanted, atol=2e-3)
        assert not server.failed and set(server.endpoints) == {"ping", "get_modality_config", "get_action"}
        envs.close()


def test_only_arms_that_look_are_asked_about_and_the_past_is_shown():
    """An arm that starts an episode looks at once; a policy that sees the last step, too, is shown it."""
    with FakeServer(deltas=(-1, 0), cameras=("top",)) as server:
        envs = make_envs(server.spec, Server((), (16,), "deg", chunk_steps=4))
        envs.reset(seed=3)
        asked, seen = len(server.questions), []
        for step in range(7):
            seen.append(envs.camera_images(envs.qpos, "top", (16, 16)))
            envs.step(np.ones((3, 6)))
            if step == 1:
                envs.reset(seed=9, options={"reset_mask": np.array([False, True, False])})
        first, second, third, fourth = server.questions[asked:]
        assert [len(question["video"]["top"]) for question in (first, second, third)] == [3, 1, 2]
        assert np.array_equal(first["video"]["top"][:, 0], seen[0]) and np.array_equal(
            first["video"]["top"][:, 1], seen[0]
        )
        assert np.array_equal(second["video"]["top"][0, 0], second["video"]["top"][0, 1])  # nothing before it
        assert np.array_equal(third["video"]["top"][:, 0], seen[3][[0, 2]])
        assert np.array_equal(third["video"]["top"][:, 1], seen[4][[0, 2]])
        assert np.array_equal(fourth["video"]["top"][:, 0], seen[5][[1]]) and not server.failed
        envs.close()


def test_a_correction_lasts_until_the_base_looks_again():
    """What the residual has added up to since the plan was made moves the rest of it; a new plan starts afresh."""
    with FakeServer(gain=0.0) as server:
        envs = make_envs(server.spec, Server((), (16,), "deg", chunk_steps=4), num_envs=2)
        envs.reset(seed=3)
        rng, moved, full = np.random.default_rng(0), np.zeros((2, 6)), 0.7 * 0.02
        for step in range(9):
            if step % 4 == 0:
                start, moved = envs.qpos[:, :6], np.zeros((2, 6))
            later = np.append(np.full(5, np.deg2rad(0.1)), 0.001 * np.ptp(load_model().actuator_ctrlrange[5]))
            before, action = envs.command, rng.uniform(-1.5, 1.5, (2, 6))
            infos = envs.step(action)[-1]
            np.testing.assert_allclose(before + infos["base_delta_rad"], start + later * (step % 4) + moved, atol=1e-6)
            moved += full * np.clip(action, -1, 1)
        envs.close()


FAULTS = {
    "error": "get_action: the server reports \"'video'\"",
    "empty error": "get_action: the server reports an error without a message",
    "no pair": "get_action: the answer is a dict instead of [action, info]",
    "no gripper": "get_action: the answer lacks gripper, it has single_arm",
    "shape": "single_arm has shape (1, 16, 4) instead of (1, 8 or more, 5)",
    "short": "single_arm has shape (1, 3, 5) instead of (1, 8 or more, 5)",
    "nan": "single_arm has numbers that are not finite",
    "text": "'single_arm' is not an array of numbers",
    "units": "they are not in deg; check --units",
    "slow": "get_action: no answer within 2 s; wait longer with --server-timeout",
    "garbage": "get_action: the answer is not a message of a policy server",
    "array bomb": "get_action: the answer is not a message of a policy server",
    "pickled array": "get_action: the answer is not a message of a policy server",
    "dies": "get_action: the server has gone away; nothing answers there",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_says_why_and_moves_no_arm(fault):
    with FakeServer(fault=fault, after=3) as server:
        options = dataclasses.replace(DEG, server_timeout=2.0) if fault in ("slow", "dies") else DEG
        envs = make_envs(server.spec, options, num_envs=1)
        envs.reset(seed=1)
        for _ in range(8):  # the chunk that it gave before
            envs.step(np.zeros((1, 6)))
        before = envs.qpos
        with pytest.raises(SO101Error) as error:
            envs.step(np.zeros((1, 6)))
        assert FAULTS[fault] in str(error.value) and server.spec in str(error.value) and "\n" not in str(error.value)
        assert np.array_equal(envs.qpos, before)
        envs.close()


REFUSED = [
    (dict(fault="pickle"), {}, "answers with a pickle, as GR00T N1 does"),
    (dict(config={}), {}, "does not report the cameras, states and actions"),
    (dict(config={"video": {"keys": []}}), {}, "describes its policy in a format that is not one of GR00T"),
    (dict(token="secret"), {}, "Unauthorized: Invalid API token; set its token in the environment variable"),
    (dict(cameras=("front", "wrist")), {}, "say which camera front is, as in --cameras front=top wrist=wrist"),
    (
        {},
        dict(cameras=("side=top",)),
        "--cameras side: its policy does not see this camera; it sees top and wrist",
    ),
    ({}, dict(cameras=("top=roof",)), "--cameras roof: the scene has no such camera, it has top and wrist"),
    ({}, dict(chunk_steps=HORIZON + 1), f"--chunk-steps 17: its policy predicts {HORIZON} steps"),
    ({}, dict(units=None), "pass --units deg"),
    (dict(deltas=(-9, 0)), {}, "sees the steps [-9, 0]"),
]


@pytest.mark.parametrize("server, options, message", REFUSED)
def test_a_server_that_cannot_be_used_is_refused_at_the_start(server, options, message):
    with FakeServer(**server) as fake, pytest.raises(SO101Error) as error:
        load_policy(fake.spec, dataclasses.replace(DEG, **options))
    assert message in str(error.value) and "get_action" not in fake.endpoints


def described(kind: str, **changes) -> dict:
    """A server's description of its policy, changed for one kind."""
    keys = {
        "video": ["top"],
        "state": ["single_arm", "gripper"],
        "action": ["single_arm", "gripper"],
        "language": ["text"],
    }
    deltas = {kind: [0] for kind in keys} | {"action": list(range(HORIZON))}
    config = {each: {"modality_keys": keys[each], "delta_indices": deltas[each]} for each in keys}
    config[kind] |= changes
    return {each: {"__ModalityConfig_class__": True, "as_json": config[each]} for each in config}


ODD_ENTRIES = [None, [], ["top"], 3, "text", {}, np.zeros(2), {"__ModalityConfig_class__": True, "as_json": "{"}]
ODD_FIELDS = [
    *({"modality_keys": keys} for keys in (None, 3, "top", {"top": 1}, [1], [None], [["top"]], [b"top"], [""], [" "])),
    {"modality_keys": ["gripper", "gripper"]}, {"modality_keys": ["a\nb"]},
    *({"delta_indices": deltas} for deltas in (None, 3, "0", {"0": 1}, [None], ["0"], [[0]], [0.0], [0.5], [True], [])),
    *({"delta_indices": deltas} for deltas in ([np.nan], [np.inf], [2**62], [-(2**62), 0], [0, 0], [0, -1])),
    *({"more": value} for value in (np.zeros(2), b"1", {1.5: 2, "1": 2})),
]  # fmt: skip
ODD_CONFIGS = [
    *((str(each), described("video") | {"video": each}) for each in ODD_ENTRIES),
    *((str(each), described("language", **each)) for each in ODD_FIELDS),
]
ODD_CONFIGS += [("bytes key", described("video") | {b"more": 1})]


def refusal(server: FakeServer) -> str:
    """The error line of a policy behind a server that is refused."""
    with server, pytest.raises(SO101Error) as error:
        load_policy(server.spec, DEG)
    line = str(error.value)
    assert line.startswith(f"base policy {server.spec}: ") and "\n" not in line and len(line) < 800
    return line


@pytest.mark.parametrize("config", [config for _, config in ODD_CONFIGS], ids=[name for name, _ in ODD_CONFIGS])
def test_a_description_that_makes_no_sense_is_one_line(config):
    line = refusal(FakeServer(cameras=("top",), config=config))
    assert "its description of" in line or "is not a message of a policy server" in line


class OddServer(FakeServer):
    """Answers one endpoint in another way."""

    def __init__(self, odd: str, body: Any, **given: Any):
        self.odd, self.body = odd, body if isinstance(body, bytes) else fake_server.encode(body, "n1.6")
        super().__init__(cameras=("top",), **given)

    def _reply(self, body: bytes) -> bytes | None:
        return self.body if fake_server.decode(body, "n1.6")["endpoint"] == self.odd else super()._reply(body)


PINGS = [
    None,
    7,
    "ok",
    [1],
    np.zeros(2),
    {"weights": None},
    {"weights": 5},
    {"weights": b"x"},
    {"weights": np.zeros(3)},
]
PINGS += [b"", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, msgpack.packb({1: 2}), {"error": "x" * 10**6}]


@pytest.mark.parametrize("answer", PINGS, ids=lambda answer: repr(answer)[:30])
def test_an_odd_answer_to_ping_is_one_line(answer):
    assert "ping: " in refusal(OddServer("ping", answer))


def npy(array: np.ndarray, size: int | None = None) -> dict:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()[:size]}


ARM, GRIPPER = np.zeros((1, HORIZON, 5), np.float32), np.zeros((1, HORIZON, 1), np.float32)
ODD_ARRAYS = [
    ARM > 0, ARM.astype(complex), npy(ARM.astype(object)), ARM.astype("U4"), np.zeros(3, "f4,f4"), ARM.astype("M8[s]"),
    ARM.tolist(), [[1], [1, 2]], None, 3, "text", {"a": 1}, npy(ARM, 100), npy(ARM, 8), npy(np.zeros(3), 0),
    {"__ndarray_class__": True, "as_npy": None}, {"nd": True, "type": None, "data": b""},
    {"nd": True, "type": "O", "data": b"12345678", "shape": [1]},
    {"nd": True, "type": "<f4", "data": b"1", "shape": "x"},
]  # fmt: skip
ODD_ACTIONS = [None, 3, [], [1, 2, 3], [None, {}], {"error": None}, {"error": {"a": "b\nc"}}, {"error": b"\x1b[31m"}]
ODD_ACTIONS += [[{"single_arm": array, "gripper": GRIPPER}, {}] for array in ODD_ARRAYS]
ODD_ACTIONS += [[{key: ARM, "gripper": GRIPPER}, {}] for key in (b"single_arm", b"more")]


@pytest.mark.parametrize("answer", ODD_ACTIONS, ids=lambda answer: repr(answer)[:40])
def test_an_odd_action_is_one_line(answer):
    assert "get_action: " in refusal(OddServer("get_action", answer))


def test_an_answer_in_two_parts_is_one_line():
    class Parts(FakeServer):
        def _reply(self, body):
            self._socket.send(super()._reply(body), zmq.SNDMORE)
            return b"more"

    assert "ping: the answer has 2 parts instead of one" in refusal(Parts())


class StandIn:
    """What serve.answer needs of a policy."""

    weights = "abc"

    def modality_config(self):
        return {}

    def get_action(self, observation, options):
        if observation is None:
            raise serve.RequestError("observation: video is missing")
        return {"single_arm": np.asarray(observation["state"], np.float32)}


REQUESTS = [
    b"", b"\xc1garbage", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, [b"\x81\xa8endpoint\xa4ping", b""],
    [b"", b"", b""], 3, None, "ping",
    [1], {}, {1: 2}, {"endpoint": "x" * 10**6}, {"endpoint": ["ping"]}, {"endpoint": "\x1b[31m\n"},
    {"endpoint": "get_action"},
    {"endpoint": "get_action", "data": [1]}, {"endpoint": "get_action", "data": {"observation": 3}},
    {"endpoint": "get_action", "data": {"observation": {"state": npy(np.array([{}], object))}}},
    {"endpoint": "get_action", "data": {"observation": {"state": {"a": "text"}}}},
]  # fmt: skip


def test_a_server_answers_every_odd_request_and_goes_on(capfd):
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    socket.setsockopt(zmq.MAXMSGSIZE, 2**22)
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def run() -> None:
        with pytest.raises(zmq.ContextTerminated), socket:
            serve.serve(socket, StandIn())

    thread = threading.Thread(target=run)
    thread.start()

    def ask(parts: list[bytes]) -> Any:
        with zmq.Context.instance().socket(zmq.REQ) as client:
            client.setsockopt(zmq.LINGER, 0)
            client.connect(f"tcp://127.0.0.1:{port}")
            client.send_multipart(parts)
            return msgpack.unpackb(client.recv()) if client.poll(3000 if len(parts[0]) < 2**22 else 300) else None

    try:
        for request in REQUESTS:
            packed = request if isinstance(request, bytes) else msgpack.packb(request)
            reply = ask(request if isinstance(request, list) and isinstance(request[0], bytes) else [packed])
            assert set(reply) == {"error"} and 0 < len(reply["error"]) <= 500, request
            assert reply["error"].isprintable()
        assert ask([bytes(2**22 + 1)]) is None  # too large: the connection ends
        assert ask([msgpack.packb({"endpoint": "ping"})])["weights"] == "abc"
    finally:
        context.term()
        thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(REQUESTS) and all(line.startswith("error: ") for line in lines)


def test_a_server_that_announces_another_dialect_than_it_speaks():
    """Arrays in a form that it does not know arrive as maps: its policy's own words say so, and no arm moves."""
    with FakeServer("main") as other, FakeServer("n1.6", config=other.config) as server:
        with pytest.raises(SO101Error, match="get_action: the server reports .*AttributeError"):
            load_policy(server.spec, DEG)


def test_addresses(monkeypatch):
    for spec in ("server:", "server:5555", "server:localhost:x", "server:localhost:70000"):
        with pytest.raises(SO101Error, match="give server:HOST:PORT"):
            load_policy(spec, DEG)
    with pytest.raises(SO101Error, match="is another machine.*--allow-remote"):
        load_policy("server:10.0.0.7:5555", DEG)
    with FakeServer(token="secret") as server:
        monkeypatch.setenv("SO101_API_TOKEN", "secret")
        load_policy(server.spec, DEG).close()
    started = time.monotonic()
    with pytest.raises(SO101Error, match=f"{server.spec}: nothing answers there .*start the server first"):
        load_policy(server.spec, DEG)  # now closed
    assert time.monotonic() - started < DEG.server_timeout  # it does not wait


def test_what_is_no_policy_server_is_refused():
    """Something else listens there, and closes the connection on what it does not understand, again and again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            for _ in range(100):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        with pytest.raises(SO101Error, match="ping: closes the connection instead of answering"):
            load_policy(f"server:127.0.0.1:{listener.getsockname()[1]}", DEG)


def test_fingerprint_follows_the_policy_and_not_its_address():
    """By the hash that the server tells, or by its answer to a question; an answer that is noise tells nothing."""

    def fingerprint(options: Server = DEG, **server) -> str:
        with FakeServer(**server) as fake:
            policy = load_policy(fake.spec, options)
            policy.close()
            return policy.fingerprint

    plain = fingerprint()
    others = [fingerprint(gain=0.02), fingerprint(horizon=12), fingerprint(dialect="main"), fingerprint(weights="abc")]
    others += [fingerprint(Server(units="rad", image_size=(24, 32))), fingerprint(Server(units="deg"))]
    assert plain == fingerprint() and len({plain, *others}) == 7
    assert fingerprint(weights="abc", gain=0.02) == others[3] != fingerprint(weights="abd")
    assert fingerprint(noise=True) == fingerprint(noise=True, gain=0.02)


@pytest.mark.parametrize("change", [{}, {"gain": 0.02}, {"dialect": "main"}, {"weights": "abc"}])
def test_a_restarted_server_must_be_the_same(change):
    """ZeroMQ connects again by itself: without a look, another policy would go on in the middle of an episode."""
    server = FakeServer()
    envs = make_envs(server.spec, num_envs=1)
    envs.reset(seed=1)
    envs.step(np.zeros((1, 6)))
    server.close()
    with FakeServer(port=server.port, **change):
        for _ in range(7):
            envs.step(np.zeros((1, 6)))
        if change:
            with pytest.raises(SO101Error, match="was restarted with another policy"):
                envs.step(np.zeros((1, 6)))
        else:
            envs.step(np.zeros((1, 6)))
        envs.close()


SERVER_FLAGS = ["--units", "deg", "--image-size", "16", "--server-timeout", "5", "--num-threads", "1", *SMALL.split()]


@pytest.mark.slow
def test_a_run_whose_server_dies_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    """In a rollout, and in an evaluation: weights, the best model included, are those of a run without the fault."""
    script = "ppo_residual_so101.py"
    with FakeServer() as server:
        whole = train(tmp_path / "whole", "--base-policy", server.spec, *SERVER_FLAGS)
        asked = len(server.questions)
    for share in (0.3, 0.52, 0.97):
        logs = tmp_path / f"logs{share}"
        with FakeServer(fault="dies", after=int(share * asked)) as server:
            flags = ["--base-policy", server.spec, "--log-dir", str(logs), *SERVER_FLAGS]
            message = error_of(monkeypatch, script, *flags)
        assert message.startswith(f"--base-policy {server.spec}: ") and "has gone away" in message
        resume = message.split("--resume ")[1].split()[0]
        assert resume.endswith("interrupted_model.pt") and message.endswith(f" --allow {server.spec}")
        broken = Path(resume).parent
        with FakeServer() as other:  # at another address
            resumed = train(logs, "--resume", resume, "--base-policy", other.spec)
        assert resumed != broken
        for name in ("final_model.pt", "best_model/best_model.pt"):
            one, two = (torch.load(run / name, weights_only=True) for run in (whole, resumed))
            assert one["global_step"] == two["global_step"] and one["recorder"] == two["recorder"]
            for key in one["agent"]:
                assert torch.equal(one["agent"][key], two["agent"][key]), (share, name, key)
            states = [each["ranks"][0]["envs"] for each in (one, two)]
            assert_same(states[0]["arms"], states[1]["arms"])
            assert torch.equal(states[0]["_obs"], states[1]["_obs"])
            memories = [state["base_memory"] for state in states]
            assert all(torch.equal(memories[0][key], memories[1][key]) for key in ("step", "targets"))


def test_evaluation_and_stacking_find_the_server_again(tmp_path, monkeypatch):
    """The checkpoint keeps all that the server needs but the address, which may be another one by then."""
    with FakeServer() as server:
        run = train(
            tmp_path, "--base-policy", server.spec, *SERVER_FLAGS, "--total-timesteps", "500", "--eval-every", "0"
        )
        model = str(run / "final_model.pt")
        stacked = load_policy(f"checkpoint:{model}", Server(trust=Trust((server.spec,))))
        assert stacked.cameras == ("top", "wrist") and stacked.image_size == (16, 16)
        stacked.base.close()
        asked = []
        stacked.base = SimpleNamespace(
            image_size=(96, 96), act=lambda obs, mask: asked.append(obs["residual"]) or np.zeros((2, 6))
        )
        both, obs, own = np.ones(2, bool), base_observation(np.zeros((2, 25), np.float32), np.zeros((2, 6))), []
        stacked.base.reset, stacked.base.memory = lambda mask: None, {"step": np.arange(2)}
        stacked.reset(both)
        for _ in range(2):
            own.append(stacked.act(obs.replace({RESIDUAL: np.full((2, 6), 0.1)}), both))
        np.testing.assert_allclose(asked, [np.full((2, 6), 0.1), 0.1 + own[0]])
        stacked.memory = {name: array.copy() for name, array in stacked.memory.items()}
        assert np.array_equal(stacked.residual, own[1]) and np.array_equal(stacked.base.memory["step"], np.arange(2))
    with FakeServer() as server:
        flags = ["--model", model, "--episodes", "2", "--json", str(tmp_path / "r.json")]
        done = run_script("eval_so101.py", *flags, "--base-policy", server.spec)
        assert done.returncode == 0, done.stderr
        assert "base alone (server)" in done.stdout
    with FakeServer(gain=0.02) as server:
        done = run_script("eval_so101.py", *flags, "--base-policy", server.spec)
    assert done.returncode == 2 and "put the old one back" in done.stderr and done.stderr.count("\n") == 1
    done = run_script("eval_so101.py", *flags, "--base-policy", "jacobian")
    assert done.returncode == 2 and "--base-policy jacobian: the model has its own" in done.stderr
    for given in (["--units", "norm"], ["--chunk-steps", "4"], ["--cameras", "top"]):
        assert f"{given[0]}: the model has its own" in error_of(monkeypatch, "eval_so101.py", *flags, *given)


TINY_POLICY = """
import sys, torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.{module} import {name}Config
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
shapes = {{"observation.state": ("STATE", (6,)), "observation.images.top": ("VISUAL", (3, 64, 64))}}
inputs = {{key: PolicyFeature(FeatureType[kind], shape) for key, (kind, shape) in shapes.items()}}
outputs = {{"action": PolicyFeature(FeatureType.ACTION, (6,))}}
config = {name}Config(input_features=inputs, output_features=outputs, device="cpu", {options})
torch.manual_seed(0)
policy = get_policy_class(config.type)(config)
ones = {{"mean": torch.zeros(6), "std": torch.ones(6), "min": -torch.ones(6), "max": torch.ones(6)}}
stats = {{"observation.state": ones, "action": ones}}
stats["observation.images.top"] = {{key: value[:3, None, None] for key, value in ones.items()}}
pre, post = make_pre_post_processors(config, dataset_stats=stats)
for each in (policy, pre, post):
    each.save_pretrained(sys.argv[1])
"""
ACT = (
    "dim_model=32, n_heads=2, dim_feedforward=64, n_encoder_layers=1, chunk_size=12, n_action_steps=12, use_vae=False, "
)
DIFFUSION = "n_obs_steps=2, horizon=16, n_action_steps=8, down_dims=(32, 64), num_inference_steps=2, crop_shape=None, "
SMOLVLA = "vlm_model_name=sys.argv[2], load_vlm_weights=False, resize_imgs_with_padding=(64, 64), num_vlm_layers=2, "
# SmolVLA looks for a vision-language model by name: one of a quarter of a million random weights
TINY_VLM = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
special = ["<unk>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
words = special + list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,\\n")
model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
names = dict(zip(("image_token", "fake_image_token", "global_image_token", "end_of_utterance_token"), special[2:]))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=names
)
layers = {"num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
text = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(words), "pad_token_id": 1}
vision = {"num_hidden_layers": 1, "image_size": 64, "patch_size": 16}
config = SmolVLMConfig(
    text_config={"model_type": "llama", **layers, **text}, vision_config={**layers, **vision}, image_token_id=2,
    scale_factor=2,
)
config.save_pretrained(sys.argv[1])
parts = {"image_processor": SmolVLMImageProcessor(), "video_processor": SmolVLMVideoProcessor()}
SmolVLMProcessor(tokenizer=tokenizer, chat_template="{{ messages }}", **parts).save_pretrained(sys.argv[1])
"""
TINY_POLICIES = [
    ("smolvla.configuration_smolvla", "SmolVLA", SMOLVLA + "chunk_size=16, n_action_steps=16, num_steps=4", 16, 1),
    ("act.configuration_act", "ACT", ACT + "pretrained_backbone_weights=None", 12, 1),
    ("diffusion.configuration_diffusion", "Diffusion", DIFFUSION + "pretrained_backbone_weights=None", 8, 2),
]


@pytest.mark.parametrize("module, name, options, horizon, steps", TINY_POLICIES)
def test_serve_lerobot(tmp_path, monkeypatch, module, name, options, horizon, steps):
    """With the Python of an environment that has LeRobot, pyzmq and msgpack in LEROBOT_PYTHON."""
    python = os.environ.get("LEROBOT_PYTHON") or pytest.skip("LEROBOT_PYTHON names no Python with LeRobot")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = [python, "-c", TINY_POLICY.format(module=module, name=name, options=options), str(tmp_path / "policy")]
    if name == "SmolVLA":
        if subprocess.run([python, "-c", "import transformers, num2words"], capture_output=True).returncode:
            pytest.skip("LEROBOT_PYTHON has no transformers and num2words")
        subprocess.run([python, "-c", TINY_VLM, str(tmp_path / "vlm")], check=True, capture_output=True)
        made.append(str(tmp_path / "vlm"))
    subprocess.run(made, check=True, capture_output=True)
    port, answers = 47000 + os.getpid() % 1000, []
    for _ in range(2):  # the second time after a restart
        command = [python, "-m", "so101.serve", "--model", str(tmp_path / "policy"), "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert "cameras top" in next(line for line in server.stdout if "steps a chunk" in line)
            envs = make_envs(f"server:127.0.0.1:{port}", Server(units="rad", image_size=(32,)))
            envs.reset(seed=1)
            with pytest.raises(SO101Error, match=r"video top must be .*--image-size 64 64"):
                envs.step(np.zeros((3, 6)))
            envs.close()
            envs = make_envs(f"server:127.0.0.1:{port}", Server(units="rad", image_size=(64,), chunk_steps=8))
            policy = envs.base_policy
            assert len(policy.client.modalities["action"].deltas) == horizon and len(policy.past) == steps - 1
            envs.reset(seed=1)
            for _ in range(9):
                envs.step(np.zeros((3, 6)))
            answers.append((policy.fingerprint, policy.memory["targets"]))
            envs.close()
        finally:
            server.terminate()
            server.wait()
    assert answers[0][0] == answers[1][0] and np.array_equal(answers[0][1], answers[1][1])
    assert len(np.unique(answers[0][1])) > len(JOINTS)
    shutil.rmtree(tmp_path / "policy")
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and "has no config.json" in refused.stderr and refused.stderr.count("\n") == 1


class Drifting:
    """In place of so101.serve.LeRobotPolicy: targets that drift from the joints, with the request's noise."""

    weights = "0" * 64

    def modality_config(self):
        kinds = {"video": (["top"], 1), "state": (list(JOINT_GROUPS), 1), "action": (list(JOINT_GROUPS), HORIZON)}
        kinds["language"] = (["annotation.human.task_description"], 1)
        return {
            kind: {
                "__ModalityConfig_class__": True,
                "as_json": {"modality_keys": keys, "delta_indices": [*range(count)]},
            }
            for kind, (keys, count) in kinds.items()
        }

    def get_action(self, observation, options):
        rng, steps = np.random.default_rng(options["seed"]), np.arange(HORIZON)[None, :, None]
        light = observation["video"]["top"].mean((1, 2, 3, 4))[:, None, None] / 100
        return {
            key: joints + 0.1 * steps + light + rng.normal(0, 0.01, (len(joints), HORIZON, joints.shape[2]))
            for key, joints in observation["state"].items()
        }


def test_a_policy_in_this_process_is_the_same_as_behind_a_server():
    """The same identity, so that a residual fits both, and the same targets to the bit."""
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def run():
        with pytest.raises(zmq.ContextTerminated):
            serve.serve(socket, Drifting())
        socket.close()

    thread = threading.Thread(target=run)
    thread.start()
    options, runs = Server(units="deg", image_size=(24, 32), chunk_steps=5), []
    for policy in (
        load_policy(f"server:127.0.0.1:{port}", options),
        ChunkPolicy("here", InProcess(Drifting()), options),
    ):
        envs = SO101ResidualVectorEnv(2, policy, num_threads=1, observe_base=True)
        observed = [envs.reset(seed=5)[0]]
        for step in range(12):
            observed.append(envs.step(np.full((2, 6), 0.1 * (step % 3)))[0])
        runs.append((policy.fingerprint, np.array(observed)))
        envs.close()
    context.term()
    thread.join()
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 64
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert np.abs(np.diff(runs[0][1][:, :, -6:], axis=0)).max() > 1e-3  # it acts


@pytest.mark.parametrize(
    "files, options, reason",
    [
        ((), DEG, "has no config.json"),
        (("config.json",), DEG, "has no model.safetensors"),
        (("config.json", "model.safetensors"), Server(), "--units"),
        (("config.json", "model.safetensors"), DEG, "needs lerobot"),
    ],
)
def test_a_directory_that_cannot_be_used_is_named(tmp_path, monkeypatch, files, options, reason):
    monkeypatch.setitem(sys.modules, "lerobot", None)
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SO101Error, match=f"base policy lerobot:{tmp_path}.*{reason}"):
        load_policy(f"lerobot:{tmp_path}", options)


def test_opencv_and_the_policy_below_it_get_pictures_of_their_own_sizes():
    pytest.importorskip("cv2")
    with FakeServer("n1.6", cameras=("top", "wrist")) as server:
        policy = load_policy(f"opencv:{server.spec}", DEG)
        envs = SO101ResidualVectorEnv(2, policy, num_threads=1)
        envs.reset(seed=7)
        envs.step(np.zeros((2, 6)))
        assert server.questions[-1]["video"]["top"].shape == (2, 1, 24, 32, 3)
        assert policy.image_size == (240, 320) and np.isfinite(policy.estimate).all()
        envs.close()


def test_serve_lerobot_needs_no_lerobot_to_say_so(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "lerobot.py").write_text("raise ImportError('no LeRobot')")  # hides an installed one
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run_script("so101.serve", "--model", str(tmp_path), "--port", "47999", PYTHONPATH=path)
    assert done.returncode == 2 and "run this in LeRobot's environment, see requirements-lerobot.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_serve_names_a_directory_that_lerobot_cannot_load(tmp_path):
    """A stand-in for LeRobot, which fails as LeRobot does on a config.json without a type."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    modules = {
        "configs/policies": "class PreTrainedConfig:\n    def from_pretrained(path):\n        raise KeyError('type')\n",
        "policies/factory": "get_policy_class = make_pre_post_processors = None\n",
    }
    for name, content in modules.items():
        module = tmp_path / "lerobot" / f"{name}.py"
        module.parent.mkdir(parents=True)
        module.write_text(content)
        (module.parent / "__init__.py").touch()
    (tmp_path / "lerobot" / "__init__.py").touch()
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run_script("so101.serve", "--model", str(tmp_path), "--port", "47999", PYTHONPATH=path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(f"error: --model {tmp_path}: LeRobot cannot load it (KeyError: 'type')\n")
