"""What a file of another person can and cannot do: the tests that docs/security.md names."""

import dataclasses
import json
import os
import re
import socket
import sys

import pytest
from conftest import ROOT, error_of, load, run_script

from so101 import serve
from so101.checkpoints import STUDENT, save_tensors
from so101.distill import Args as StudentArgs
from so101.policies import load_policy
from so101.server import Server, ServerPolicy
from so101.trust import Trust
from so101_env import SO101Error, Task
from so101_sim.scene import ASSETS

CODE = """
import pathlib
pathlib.Path("ran").touch()
from ppo_residual_so101 import *
from so101.pusher import JacobianPolicy as Base
"""


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A working directory with a harmless-looking helper.py, which leaves a file called ran when it is executed."""
    (tmp_path / "helper.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    yield tmp_path
    sys.modules.pop("helper", None)


def checkpoint(victim, small_run, spec="zero", script="ppo_residual_so101.py", **server) -> str:
    """A stranger's checkpoint that names a base policy, a script, and options of a server."""
    saved = load(small_run / "final_model.pt")
    base = {**saved["args"]["base"], "base_policy": spec, "server": {**saved["args"]["base"]["server"], **server}}
    save_tensors(victim / "stranger.pt", {**saved, "script": script, "args": {**saved["args"], "base": base}})
    return "stranger.pt"


def student(victim, spec) -> str:
    base = {"base_policy": spec, "server": dataclasses.asdict(Server())}
    content = {
        "format": STUDENT, "script": "distill.py", "args": dataclasses.asdict(StudentArgs()), "base": base,
        "task": dataclasses.asdict(Task()), "base_fingerprint": "", "teacher_fingerprint": "", "teacher_success": 1.0,
        "global_step": 0, "agent": {}, "training": None,
        "recorder": {"recent_episodes": [], "finalists": [], "evaluation_due": False},
    }  # fmt: skip
    save_tensors(victim / "student.pt", content)
    return "student.pt"


def exported(victim, spec) -> str:
    onnx, to_onnx = pytest.importorskip("onnx"), pytest.importorskip("so101.onnx_export")
    model = onnx.load(ASSETS / "arm.onnx")
    metadata = {**json.loads(model.metadata_props[0].value), "base_policy": spec}
    (victim / "stranger.onnx").write_bytes(to_onnx.serialize(model, metadata))
    return "stranger.onnx"


SPECS = (
    "helper:Base",
    "helper:Base:x",
    "opencv:helper:Base",
    "os:system:touch ran",
    "server:127.0.0.1:1",
    "lerobot:act",
)


@pytest.mark.parametrize("spec", SPECS)
def test_code_and_servers_that_only_a_file_names_are_not_used(victim, small_run, monkeypatch, spec):
    for file in (checkpoint(victim, small_run, spec), exported(victim, spec), student(victim, spec)):
        kind = "onnx" if file.endswith(".onnx") else "checkpoint"
        commands = [["eval_so101.py", "--model", file], ["so101.record", "--dataset", "d", "--model", file]]
        commands += [[name, "--base-policy", f"{kind}:{file}"] for name in ("eval_so101.py", "ppo_residual_so101.py")]
        if file == "stranger.pt":
            commands += [["ppo_residual_so101.py", "--resume", file], ["so101.distill", "--model", file]]
            commands += [["eval_so101.py", "--model", file, "--export", "p.onnx"]]
        commands += [["so101.drive", "--model", file]]
        for name, *flags in commands:
            line = error_of(monkeypatch, name, *flags)
            assert file in line and f"--allow '{spec}'".replace("'", "'" * (" " in spec)) in line or "opencv" in spec, (
                line
            )
    assert not (victim / "ran").exists() and not (victim / "d").exists() and not (victim / "logs").exists()


def test_a_chain_of_files_is_checked_to_its_end(victim, small_run, monkeypatch):
    os.replace(checkpoint(victim, small_run, "helper:Base"), "inner.pt")
    outer = checkpoint(victim, small_run, "checkpoint:inner.pt")
    assert "inner.pt: its base policy is the code helper:Base" in error_of(
        monkeypatch, "eval_so101.py", "--model", outer
    )
    assert not (victim / "ran").exists()


@pytest.mark.parametrize("flags", [["--allow", "helper:Base"], ["--base-policy", "helper:Base"]])
def test_code_that_the_person_names_too_is_used(victim, small_run, flags):
    saved = load(victim / checkpoint(victim, small_run, "helper:Base"))
    save_tensors(victim / "stranger.pt", {**saved, "base_fingerprint": "pusher 1"})
    done = run_script("eval_so101.py", "--model", "stranger.pt", "--episodes", "1", "--no-base", *flags)
    assert done.returncode == 0 and (victim / "ran").exists(), done.stderr


def test_a_script_runs_only_if_it_is_ours_or_named(victim, small_run, monkeypatch):
    file = checkpoint(victim, small_run, script="helper.py")
    for flags in (["--model", file], ["--base-policy", f"checkpoint:{file}"]):
        line = error_of(monkeypatch, "eval_so101.py", *flags)
        assert line == f"{file}: was written by the script helper.py; if you trust it, add --allow helper.py"
    assert not (victim / "ran").exists()
    done = run_script("eval_so101.py", "--model", file, "--episodes", "1", "--allow", "helper.py")
    assert done.returncode == 0 and (victim / "ran").exists(), done.stderr


def test_a_script_of_ours_is_not_replaced_by_one_in_the_working_directory(victim, small_run):
    (victim / "ppo_residual_so101.py").write_text(CODE)
    (victim / "distill.py").write_text(CODE)
    done = run_script("eval_so101.py", "--model", checkpoint(victim, small_run), "--episodes", "1")
    assert done.returncode == 0 and not (victim / "ran").exists(), done.stderr
    with pytest.raises(SO101Error, match="another kind|not fit|lacks|base policy is"):
        load_policy(f"checkpoint:{student(victim, 'helper:Base')}")
    assert not (victim / "ran").exists()


def test_a_file_cannot_say_whom_to_contact_nor_with_what(victim, small_run, monkeypatch):
    """Its address is not contacted; that of the command line is, and permissions are those of the command line."""
    pytest.importorskip("zmq")
    monkeypatch.setenv("SO101_API_TOKEN", "secret")
    trust = {"allow": ("server:127.0.0.1:1", "helper:Base"), "allow_remote": True, "send_token": True}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        spec = f"server:127.0.0.1:{listener.getsockname()[1]}"
        file = checkpoint(victim, small_run, spec, units="deg", trust=trust)
        assert f"add --allow {spec}" in error_of(monkeypatch, "eval_so101.py", "--model", file)
        for flags in (["--allow", "server:127.0.0.1:1"], ["--base-policy", "server:127.0.0.1:1"]):
            assert "server:127.0.0.1:1: nothing answers" in error_of(
                monkeypatch, "eval_so101.py", "--model", file, *flags
            )
        remote = ["--allow", "server:192.0.2.1:5555"]
        assert "pass --allow-remote" in error_of(monkeypatch, "eval_so101.py", "--model", file, *remote)
        line = error_of(monkeypatch, "ppo_residual_so101.py", "--resume", file, *remote, "--allow-remote")
        assert "SO101_API_TOKEN would leave this machine" in line
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_token_leaves_this_machine_only_with_a_flag(monkeypatch):
    pytest.importorskip("zmq")
    from so101 import wire

    sent = []

    def client(host, port, timeout_s, api_token):
        sent.append((host, api_token))
        raise wire.PolicyError("stop here")

    monkeypatch.setattr(wire, "PolicyClient", client)
    monkeypatch.setenv("SO101_API_TOKEN", "secret")
    here, there = "127.0.0.1:5555", "192.0.2.1:5555"
    for address, trust, words in (
        (here, Trust(), "stop here"),
        (there, Trust(), "--allow-remote"),
        (there, Trust(send_token=True), "--allow-remote"),
        (there, Trust(allow_remote=True), "--send-token"),
        (there, Trust(allow_remote=True, send_token=True), "stop here"),
    ):
        with pytest.raises(SO101Error, match=words):
            ServerPolicy(address, Server(units="deg", trust=trust))
    assert sent == [("127.0.0.1", "secret"), ("192.0.2.1", "secret")]


class Opens:
    """Its pickle creates a file when it is loaded."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_nothing_in_a_policy_file_is_executed(victim, small_run, monkeypatch):
    saved = load(small_run / "final_model.pt")
    for content in ({**saved, "agent": Opens()}, Opens(), {**saved, "recorder": [Opens()]}):
        save_tensors(victim / "stranger.pt", content)
        for kind in ("checkpoint", "bc"):
            assert "stranger.pt" in error_of(monkeypatch, "eval_so101.py", "--base-policy", f"{kind}:stranger.pt")
        assert "stranger.pt" in error_of(monkeypatch, "ppo_residual_so101.py", "--resume", "stranger.pt")
    assert not (victim / "ran").exists()


def test_a_file_does_not_choose_where_a_run_writes(victim, small_run):
    """Its log directory, run name, tracking and video are those of the command line, or the defaults."""
    saved = load(small_run / "checkpoints" / "ppo_residual_1024_steps.pt")
    run = {**saved["args"]["run"], "log_dir": "/nowhere", "run_name": "out", "track": True, "capture_video": True}
    (victim / "files").mkdir()
    save_tensors(victim / "files" / "stranger.pt", {**saved, "args": {**saved["args"], "run": run}})
    done = run_script("ppo_residual_so101.py", "--resume", "files/stranger.pt")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in victim.iterdir()} == {"helper.py", "files", "logs"}, done.stdout
    (own,) = (victim / "logs").iterdir()
    assert own.name != "out" and not list(own.glob("eval_results/*.mp4"))
    save_tensors(
        victim / "files" / "stranger.pt", {**saved, "args": {**saved["args"], "run": {**run, "run_name": ".."}}}
    )
    assert "--run-name" in run_script("ppo_residual_so101.py", "--resume", "files/stranger.pt").stderr


def test_a_message_is_one_printable_line(victim, small_run):
    file = checkpoint(victim, small_run, "evil\n\x1b[2J\x1b]0;title\x07:Base")
    done = run_script("eval_so101.py", "--model", file)
    assert done.returncode == 2 and done.stderr.endswith("\n") and done.stderr[:-1].isprintable(), done.stderr


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json", "other.json"])
def test_a_directory_of_lerobot_cannot_name_code(victim, name):
    """LeRobot itself would call subprocess.Popen here."""
    (victim / "config.json").write_text(json.dumps({"type": "act"}))
    (victim / "model.safetensors").write_bytes(b"")
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", "ran"]}}
    for steps, refused in (([{"registry_name": "device_processor"}], False), ([{}, step], True)):
        (victim / name).write_text(json.dumps({"name": "p", "steps": steps}))
        if not refused:
            serve.check_processors(victim)
            continue
        with pytest.raises(serve.RequestError, match=f"{name} names the code 'subprocess.Popen'"):
            serve.LeRobotPolicy(victim, "cpu")
    assert not (victim / "ran").exists()


def test_every_sentence_of_the_page_has_its_test():
    """Each row of the tables of docs/security.md ends with the name of a test that exists."""
    rows = [line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(test_\w+)`", row.split("|")[-2]) for row in rows if not row.endswith("| test |")]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10
    for names in named:
        assert names and all(f"def {name}(" in tests for name in names), names
