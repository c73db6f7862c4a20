"""Practice on an arm: rewards, learner, files, and what ends a run; in virtual time."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal_training_state, assert_same, error_of, load, run_script
from PIL import Image

from so101 import drive, practice, sac
from so101.checkpoints import save_tensors
from so101.cli import Stop
from so101.files import DiskError
from so101.learner import MODEL, Episode, Judge, Learner, LearnerProcess, Lesson, LocalLearner, Run, Worker
from so101.loop import ASIDE_RAD, RAISED_RAD, REST_RAD, Loop
from so101.onnx import OnnxPolicy
from so101.robot import RobotError
from so101.settings import restore_settings
from so101.simulated_arm import Flaws, SimulatedArm
from so101.virtual_time import VirtualRobot, virtual_loop
from so101_env import HOME_RAD, SO101ResidualVectorEnv, Task

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

TASK = Task(firmware_p=16, observe_load=True)
SETTINGS = sac.Args(
    seed=3, sac=sac.SAC(num_envs=1, learning_starts=30, batch_size=32, updates_per_step=2), task=TASK,
    base=sac.Base("jacobian", observe_base=True), networks=sac.Networks(hidden_size=16),
)  # fmt: skip
# a run of half a minute of arm time
SMALL = (
    "--virtual-time --minutes 0.5 --seed 3 --train-episode-steps 25 --learning-starts 25 --hidden-size 16 "
    "--batch-size 32 --base-policy jacobian"
)


def make_lesson(number: int, steps: int = 20) -> Lesson:
    rng = np.random.default_rng(number)
    obs = rng.normal(0, 0.1, (steps + 1, 37)).astype(np.float32)
    obs[:, 9] = 1.0  # w of the quaternion
    actions, rewards = rng.uniform(-1, 1, (steps, 6)).astype(np.float32), rng.normal(size=steps).astype(np.float32)
    record = dict.fromkeys(("arm_time_s", "return", "residual_magnitude", "reset_ticks", "hands", "missed"), 1.0)
    record |= {"waited_s": 0.0, "success": bool(number % 2), "steps": steps}
    return Lesson(Episode(obs, actions, rewards, bool(number % 2)), record, {"arm_time_s": 1.0}, [])


def practise(monkeypatch, log_dir, *flags: str) -> int:
    """Run the script in this process, as a user does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["practice.py", "--log-dir", str(log_dir), *SMALL.split(), *flags])
    return practice.run_script(practice.main)


@pytest.fixture(scope="module")
def practised(tmp_path_factory):
    """The directory of a small finished run, with the learner in a process of its own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        log_dir = tmp_path_factory.mktemp("logs")
        monkeypatch.setattr(practice, "FILMED", 2)  # the first episode begins without a reset, the third with one
        assert practise(monkeypatch, log_dir) == 0
    return next(log_dir.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# rewards


@pytest.mark.parametrize("gamma", [None, 0.98])
def test_rewards_of_what_is_seen_are_those_of_the_task(gamma):
    """On observations without errors they are the environment's own, shaped and with success."""
    envs = SO101ResidualVectorEnv(1, "jacobian", randomize=False, shaping_gamma=gamma)
    judge = Judge(SO101ResidualVectorEnv(1, task=envs.task), gamma)
    obs, info = envs.reset(seed=5)
    rows, actions, rewards, done = [obs[0]], [], [], False
    rng = np.random.default_rng(0)
    while not done:
        action = 0.3 * rng.uniform(-1, 1, (1, 6)).astype(np.float32)
        obs, reward, terminated, truncated, info = envs.step(action)
        done = bool(terminated[0] | truncated[0])
        rows.append(info["final_obs"][0] if "final_obs" in info else obs[0])
        actions.append(action[0])
        rewards.append(reward[0])
    assert terminated[0]  # by success
    seen = judge.rewards(np.array(rows), np.array(actions), success=True)
    np.testing.assert_allclose(seen, rewards, atol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the learner


def test_episodes_enter_the_buffer_as_they_were():
    learner = Learner(SETTINGS, 100)
    for number in (0, 1):
        learner.learn(make_lesson(number).episode)
    buffer, lesson = learner.buffer, make_lesson(1).episode
    assert buffer.rows == 40 and learner.first_rows == 40  # both episodes began within learning_starts
    assert torch.equal(buffer.data["actions"][20:40, 0], torch.from_numpy(lesson.actions))
    assert torch.equal(buffer.data["next_x"][20:39], buffer.data["x"][21:40])
    assert buffer.data["dones"][:40].flatten().nonzero().flatten().tolist() == [19, 39]
    assert buffer.data["terminations"][:40].flatten().nonzero().flatten().tolist() == [39]
    assert torch.equal(buffer.data["next_x"][39], learner.agent.features(lesson.obs[-1:])[:, 0])


def test_as_many_updates_as_the_steps_are_worth(monkeypatch):
    done, update = [], sac.update
    monkeypatch.setattr(sac, "update", lambda *args: (done.append(args[4]), update(*args))[1])
    learner = Learner(SETTINGS, 1000)
    assert learner.learn(make_lesson(0).episode) == {}  # learning_starts has not come
    metrics = learner.learn(make_lesson(1, 25).episode)
    assert sum(done) == 50 and max(done) == 16 and {"critic_loss", "entropy"} <= metrics.keys()
    assert learner.learn(Episode(np.zeros((1, 37), np.float32), np.zeros((0, 6)), np.zeros(0), False)) == {}


def test_the_learner_is_the_same_in_this_process_and_in_its_own(tmp_path):
    """Weights, buffer and files, to the bit; and a resumed one goes on as if it had not been stopped."""
    runs = {}
    for kind, learner_class in (("local", LocalLearner), ("process", LearnerProcess)):
        (directory := tmp_path / kind).mkdir()
        learner = learner_class(Run(SETTINGS, 200, directory, ""))
        answers = [learner.take()]
        learner.study([make_lesson(number, 40).episode for number in (7, 8)])
        answers.append(learner.take())
        for number in range(4):
            learner.give(make_lesson(number))
            answers.append(learner.take())
            if number == 2 and kind == "local":
                shutil.copy(directory / MODEL, tmp_path / "third.pt")
        learner.close()
        runs[kind] = answers
    for one, other in zip(*runs.values()):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert any(not np.array_equal(runs["local"][0][name], runs["local"][-1][name]) for name in runs["local"][0])
    assert_equal_training_state(tmp_path / "local" / MODEL, tmp_path / "process" / MODEL)
    (directory := tmp_path / "resumed").mkdir()
    worker = Worker(Run(SETTINGS, 200, directory, "", tmp_path / "third.pt"))
    worker.work(make_lesson(3))
    worker.close()
    assert_equal_training_state(tmp_path / "local" / MODEL, directory / MODEL)


@pytest.mark.parametrize("learner_class", [LocalLearner, LearnerProcess])
def test_a_directory_that_is_removed_meanwhile_is_one_line_and_what_was_learned_is_kept(tmp_path, capfd, learner_class):
    learner = learner_class(Run(SETTINGS, 200, tmp_path / "run", ""))
    learner.take()
    learner.give(make_lesson(0))
    learner.take()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(practice.SO101Error, match="cannot be written"):
        for number in range(1, 4):  # the curves are written by a thread
            learner.give(make_lesson(number))
            learner.take()
    assert load(tmp_path / "run" / MODEL)["global_step"] >= 40 and "Traceback" not in capfd.readouterr().err
    if learner_class is LearnerProcess:
        learner.close()


def test_a_directory_that_is_removed_while_a_lesson_is_learned_costs_no_model(tmp_path, monkeypatch):
    def log(worker, *_):
        shutil.rmtree(tmp_path / "run")
        raise DiskError("film.mp4: cannot be written")

    monkeypatch.setattr(Worker, "_log", log)
    learner = LocalLearner(Run(SETTINGS, 200, tmp_path / "run", ""))
    learner.give(make_lesson(0))
    with pytest.raises(DiskError, match="film.mp4"):
        learner.take()
    assert load(tmp_path / "run" / MODEL)["global_step"] == 20


def test_a_lesson_that_was_given_is_learned_although_the_run_ends(tmp_path):
    learner = LearnerProcess(Run(SETTINGS, 200, tmp_path, ""))
    learner.take()
    learner.give(make_lesson(0))
    learner.close()
    assert load(tmp_path / MODEL)["global_step"] == 20


@pytest.mark.parametrize("end, words", [("kill", r"has ended \(exit code -9\)"), ("disk", "cannot be written")])
def test_a_lesson_that_is_lost_when_the_run_ends_is_reported(tmp_path, capfd, end, words):
    """Whatever has ended the run: what became of the learner would otherwise be unread."""
    learner = LearnerProcess(Run(SETTINGS, 200, tmp_path / "run", ""))
    learner.take()
    if end == "disk":
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("no directory")
    else:
        learner.process.kill()
        learner.process.join()
    raised = ""
    try:
        learner.give(make_lesson(0))
    except practice.SO101Error as error:  # it ends the run
        raised = str(error)
    learner.close()
    printed = capfd.readouterr().err
    assert learner.lost == 1 and "Traceback" not in printed and printed.splitlines()[-1] == "the last episode is lost"
    assert re.search(words, raised + printed)


def test_ctrl_c_while_the_last_lesson_is_learned_drops_it_and_says_so(tmp_path, capfd, monkeypatch):
    learner = LearnerProcess(Run(SETTINGS, 200, tmp_path, ""))
    learner.take()
    os.kill(learner.process.pid, signal.SIGSTOP)  # a learner that takes long
    learner.give(make_lesson(0))
    lines = []

    def say(line):
        lines.append(line)
        if "Ctrl+C drops it" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr("so101.learner.say", say)
    with pytest.raises(KeyboardInterrupt):
        learner.close()
    learner.process.join(10)
    assert not learner.process.is_alive() and lines[-1] == "the last episode is lost"


def test_the_lines_of_a_resumed_run_are_those_of_its_checkpoint(practised, tmp_path):
    """The power failed while a line was written, or the checkpoint was copied without them."""
    shutil.copytree(practised, copied := tmp_path / "copied")
    lines = (copied / "episodes.jsonl").read_text()
    for damaged in (lines + lines[:40], lines[: len(lines) // 2], lines + lines):
        (copied / "episodes.jsonl").write_text(damaged)
        saved = load(copied / MODEL)
        args = restore_settings(sac.Args, saved["args"], copied)
        Worker(Run(args, 10**4, copied, saved["base_fingerprint"], str(copied / MODEL))).close()
        assert (copied / "episodes.jsonl").read_text() == lines


def test_a_learner_that_cannot_begin_says_so_before_the_arm_moves(practised, tmp_path, monkeypatch, capsys):
    shutil.copytree(practised, copied := tmp_path / "copied")
    shutil.rmtree(copied / "tensorboard")
    (copied / "tensorboard").write_text("no directory")
    monkeypatch.setattr(practice, "open_arm", lambda args, task: pytest.fail("the arm was opened"))
    flags = ["--virtual-time", "--minutes", "1", "--resume", str(copied / MODEL)]
    line = error_of(monkeypatch, "so101.practice", *flags)
    assert f"{copied / 'tensorboard'}" in line and "cannot be written" in line


def test_a_lesson_that_was_interrupted_is_not_learned_twice(tmp_path, monkeypatch):
    """Ctrl+C between its steps: what is in the buffer already must not come again."""
    learner, learn = LocalLearner(Run(SETTINGS, 200, tmp_path, "")), Learner.learn

    def interrupted(own, episode, idle):
        learn(own, episode)
        raise Stop(signal.SIGINT)

    monkeypatch.setattr(Learner, "learn", interrupted)
    learner.give(make_lesson(0))
    with pytest.raises(Stop):
        learner.take()
    learner.close()
    assert learner.worker.learner.buffer.rows == 20


def test_a_learner_that_hangs_is_given_up_and_the_arm_is_watched_meanwhile(tmp_path):
    learner, watched = LearnerProcess(Run(SETTINGS, 200, tmp_path, "")), []
    learner.take()
    os.kill(learner.process.pid, signal.SIGSTOP)
    learner.give(make_lesson(0))
    learner.limit_s = 0.3
    with pytest.raises(practice.SO101Error, match="the learner has not answered for 0 s"):
        learner.take(lambda: watched.append(1))
    assert 1 <= len(watched) <= 12
    learner.close()


def test_ctrl_c_while_demonstrations_are_learned_ends_the_learner_at_once(tmp_path, monkeypatch):
    """Nothing of it is kept, so nobody waits for it."""
    learner, done = LearnerProcess(Run(SETTINGS, 200, tmp_path, "")), []
    learner.take()
    os.kill(learner.process.pid, signal.SIGSTOP)

    def interrupt():
        raise Stop(signal.SIGINT)

    with pytest.raises(Stop):
        learner.study([make_lesson(0).episode], interrupt)
    for name in ("kill", "join"):
        call = getattr(learner.process, name)
        monkeypatch.setattr(learner.process, name, lambda *args, n=name, c=call: (done.append(n), c(*args)))
    learner.close()
    assert done[:2] == ["kill", "join"] and not learner.process.is_alive()


def test_a_loss_that_is_not_finite_ends_the_learner_with_a_reason(tmp_path):
    learner = LearnerProcess(Run(SETTINGS, 200, tmp_path, ""))
    learner.take()
    lesson = make_lesson(0, 40)
    lesson.episode.rewards[:] = np.inf
    learner.give(lesson)
    with pytest.raises(practice.SO101Error, match="NaN or Inf in the loss: a new run needs a lower --learning-rate"):
        learner.take()
    learner.close()
    assert not (tmp_path / MODEL).exists()


# ---------------------------------------------------------------------------------------------------------------------
# runs


def test_a_run_leaves_a_checkpoint_for_all_commands(practised, tmp_path):
    saved = load(practised / MODEL)
    lines = [json.loads(line) for line in (practised / "episodes.jsonl").read_text().splitlines()]
    assert saved["global_step"] == sum(line["steps"] for line in lines) == len(saved["ranks"][0]["buffer"]["x"])
    assert lines == saved["recorder"]["recent_episodes"] and lines[-1]["arm_time_s"] >= 30
    assert not lines[0]["exploring"] and lines[-1]["exploring"]
    assert saved["ranks"][0]["buffer"]["actions"][: saved["ranks"][0]["first_rows"]].abs().max() == 0
    done = run_script("eval_so101.py", "--model", str(practised / MODEL), "--episodes", "2")
    assert done.returncode == 0, done.stderr
    policy, task = drive.make_policy(drive.Args(model=str(practised / MODEL)))
    robot = VirtualRobot(task)
    robot.reset(1)
    loop = virtual_loop(robot, policy, task)
    loop.measure()
    assert loop.episode(3, task.tape_margin)["ticks"] == 3 and np.abs(policy.base.residual).max() > 0


PRIOR = (
    "--total-timesteps 302 --num-envs 2 --learning-starts 30 --batch-size 32 --hidden-size 16 --train-episode-steps 25 "
    "--base-policy jacobian --observe-base --eval-every 0 --final-eval-episodes 0 --firmware-p 16"
).split()


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A checkpoint of the learning in simulation with which practice can begin."""
    log_dir = tmp_path_factory.mktemp("prior")
    done = run_script("so101.sac", "--log-dir", str(log_dir), *PRIOR)
    assert done.returncode == 0, done.stderr
    return next(log_dir.iterdir()) / "final_model.pt"


def test_practice_begins_with_networks_and_steps_of_a_prior(prior, monkeypatch, tmp_path):
    then = load(prior)
    first = LocalLearner(Run(restored(prior), 1000, tmp_path, "", prior=str(prior))).take()
    assert first.keys() == then["agent"].keys()
    assert all(np.array_equal(first[name], then["agent"][name].numpy()) for name in first)
    flags = ["--virtual-time", "--minutes", "0.3", "--log-dir", str(tmp_path / "logs"), "--run-name", "begun"]
    monkeypatch.setattr(sys, "argv", ["practice.py", *flags, "--prior", str(prior)])
    assert practice.run_script(practice.main) == 0
    own = (saved := load(tmp_path / "logs" / "begun" / MODEL))["ranks"][0]
    old = then["ranks"][0]["buffer"]
    assert saved["args"]["sac"]["base_batch"] == practice.PRIOR_BATCH != then["args"]["sac"]["base_batch"]
    assert own["first_rows"] == 302 and saved["global_step"] == 302 + own["arm"]["steps"] > 302
    for column in (0, 1):  # one environment after the other
        rows = own["buffer"]["x"][151 * column : 151 * (column + 1), 0]
        assert torch.equal(rows, old["x"][:, column])
        assert own["buffer"]["dones"][151 * (column + 1) - 1]
    assert torch.equal(own["buffer"]["terminations"][151:302, 0], old["terminations"][:, 1])
    records = saved["recorder"]["recent_episodes"]
    assert records[0]["exploring"]  # demonstrations are there
    model = tmp_path / "logs" / "begun" / MODEL
    monkeypatch.setattr(sys, "argv", ["practice.py", "--virtual-time", "--minutes", "0.5", "--resume", str(model)])
    assert practice.run_script(practice.main) == 0
    again = load(model)
    assert again["global_step"] > saved["global_step"] and again["ranks"][0]["first_rows"] == 302
    assert again["recorder"]["recent_episodes"][len(records)]["exploring"]


def restored(path) -> sac.Args:
    args = restore_settings(sac.Args, load(path)["args"], path)
    args.sac.num_envs = 1
    return args


def test_a_prior_of_something_else_is_refused(prior, practised, monkeypatch, tmp_path, capsys):
    done = run_script("so101.sac", "--log-dir", str(tmp_path), "--run-name", "blind", "--no-observe-load", *PRIOR)
    assert done.returncode == 0, done.stderr
    blind = str(tmp_path / "blind" / "final_model.pt")
    saved = load(prior)
    saved["args"]["base"] |= {"base_policy": "zero", "observe_base": False}
    save_tensors(tmp_path / "scratch.pt", saved)
    prior, scratch = str(prior), str(tmp_path / "scratch.pt")
    for flags, reason in (
        (["--prior", blind], f"--prior {blind}: was trained with --observe-load False; practice needs True"),
        (["--prior", prior, "--base-policy", "onnx:assets/arm.onnx"], f"{prior}: trained on base policy onnx:assets"),
        (["--prior", scratch], f"--prior {scratch}: was trained from scratch"),
        (["--prior", prior, "--learning-starts", "100"], "--learning-starts 100"),
        (["--prior", prior, "--alpha", "0.5"], "--alpha 0.5"),
        (["--prior", prior, "--gamma", "0.9"], "--gamma 0.9"),
        (["--prior", prior, "--hidden-size", "32"], "--hidden-size 32"),
        (["--prior", prior, "--resume", str(practised / MODEL)], "--prior: a resumed run has begun already"),
        (["--prior", "assets/pretrained.pt"], "--prior assets/pretrained.pt: not of so101.sac"),
        (["--prior", "none.pt"], "none.pt: no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["practice.py", "--log-dir", str(tmp_path / "logs"), *flags])
        assert practice.run_script(practice.main) == 2
        assert reason in capsys.readouterr().err, flags
    assert not (tmp_path / "logs").exists()


def test_every_episode_has_a_new_start(practised):
    """Also after a failure, when the sheet lies at a fair start already: it is moved from where the episode left it."""
    saved = load(practised / MODEL)
    buffer = saved["ranks"][0]["buffer"]
    ends = buffer["dones"][:-1, 0].nonzero().flatten()
    left, begun = (0.1 * buffer[name][rows, 0, 12:14] for name, rows in (("next_x", ends), ("x", ends + 1)))  # m
    assert len(ends) > 2 and not all(record["success"] for record in saved["recorder"]["recent_episodes"])
    assert (begun - left).norm(dim=1).min() > 0.01


def test_a_folded_arm_goes_home_before_it_does_anything_else(monkeypatch, tmp_path):
    seen, act = [], Loop.act
    monkeypatch.setattr(VirtualRobot, "reset", lambda robot, seed: robot.arm.reset(seed, REST_RAD))
    monkeypatch.setattr(Loop, "act", lambda loop, mask: seen.append(loop.controller.joints_rad) or act(loop, mask))
    assert practise(monkeypatch, tmp_path, "--minutes", "0.1") == 0
    np.testing.assert_allclose(seen[0], HOME_RAD, atol=0.05)


def test_the_film_of_reset_and_episode_is_a_gif_for_tensorboard(practised):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (practised / "tensorboard").iterdir()
    accumulator = EventAccumulator(str(events)).Reload()
    film = accumulator.Images("last_episode")[-1]
    assert film.width == 160 and film.height == 120 and film.encoded_image_string.startswith(b"GIF89a")
    assert Image.open(io.BytesIO(film.encoded_image_string)).n_frames > 20  # an episode alone has at most nine
    assert "Success/practice" in accumulator.Tags()["scalars"]


def test_a_resumed_run_replaces_no_other_model(practised, tmp_path, monkeypatch):
    """As the one that has gone further than the copy that is resumed."""
    shutil.copytree(practised, copied := tmp_path / "copied")
    saved = load(copied / MODEL)
    save_tensors(copied / "older.pt", saved)
    before = (copied / MODEL).read_bytes()
    flags = ["--virtual-time", "--minutes", "0.6", "--resume", str(copied / "older.pt")]
    assert f"the run would replace {copied / MODEL}; copy" in error_of(monkeypatch, "so101.practice", *flags)
    assert (copied / MODEL).read_bytes() == before


def test_a_resumed_run_is_the_run_that_was_never_stopped(practised, tmp_path, monkeypatch, capsys):
    """Between two episodes or within one: the arm goes on where it was, and every number is the same."""
    model = tmp_path / "run" / MODEL

    def resume(minutes: str) -> int:
        flags = ["--virtual-time", "--no-learner-process", "--resume", str(model), "--minutes", minutes]
        monkeypatch.setattr(sys, "argv", ["practice.py", *flags])
        return practice.run_script(practice.main)

    assert practise(monkeypatch, tmp_path, "--minutes", "0.2", "--run-name", "run") == 0
    assert resume("0.1") == 2 and "already; name more" in capsys.readouterr().err
    with monkeypatch.context() as stopping:
        write, left = VirtualRobot.write, [100]

        def writing(self, target_rad):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            write(self, target_rad)

        stopping.setattr(VirtualRobot, "write", writing)
        assert resume("0.5") == 128 + signal.SIGINT
    between = len(load(model)["recorder"]["recent_episodes"])
    assert resume("0.5") == 0
    straight, stopped = load(practised / MODEL), load(model)
    assert 1 < between < len(stopped["recorder"]["recent_episodes"])
    for saved in (straight, stopped):
        for record in saved["recorder"]["recent_episodes"]:
            del record["waited_s"]  # wall time
    for key in ("agent", "optimizer", "ranks", "global_step", "recorder"):
        assert_same(straight[key], stopped[key], key)


def test_the_learner_gets_nothing_that_an_arm_does_not_have(practised, tmp_path, monkeypatch):
    """With every source of true states poisoned, and the learner in this process, the run is the same to the bit."""

    def poisoned(*args):
        raise AssertionError("the truth was asked for")

    class Poisoned(SO101ResidualVectorEnv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.arms.qpos[:] = np.nan

        scene = observe = step = reset = poisoned

    monkeypatch.setattr(SimulatedArm, "truth", poisoned)
    monkeypatch.setattr(VirtualRobot, "truth", poisoned)
    monkeypatch.setattr(practice, "SO101ResidualVectorEnv", Poisoned)
    assert practise(monkeypatch, tmp_path, "--no-learner-process") == 0
    (own,) = tmp_path.iterdir()
    files = [load(each / MODEL) for each in (practised, own)]
    for saved in files:
        for record in saved["recorder"]["recent_episodes"]:
            record["waited_s"] = 0.0
    for path, saved in zip((tmp_path / "one.pt", tmp_path / "other.pt"), files):
        torch.save(saved, path)
    assert_equal_training_state(tmp_path / "one.pt", tmp_path / "other.pt")


class TorqueRobot(VirtualRobot):
    """Under torque; notes how it is left."""

    left: list = []

    def __init__(self, task, flaws):
        super().__init__(task, flaws)
        self.enabled, self.pictures_left = True, 10**9

    def relax(self):
        self.left.append(self.arm.joints_rad)
        self.enabled = False
        return []

    def picture(self):
        self.pictures_left -= 1
        if self.pictures_left < 0:
            raise RobotError("the camera is lost")
        return super().picture()


def end_after(monkeypatch, tmp_path, capsys, end, episodes: int, code: int = 2) -> tuple[dict, str, str]:
    """A run whose `end(practice)` is called after some episodes; the checkpoint, the last line on stderr, stdout."""
    run = practice.Practice.run

    def ending(self):
        for number, record in enumerate(run(self)):
            yield record
            if number == episodes - 1:
                end(self)

    TorqueRobot.left.clear()
    monkeypatch.setattr(practice, "VirtualRobot", TorqueRobot)
    monkeypatch.setattr(practice.Practice, "run", ending)
    assert practise(monkeypatch, tmp_path) == code
    (joints,) = TorqueRobot.left
    assert joints[1] < -1.5 and joints[2] > 1.3  # folded
    (run_dir,) = tmp_path.iterdir()
    output = capsys.readouterr()
    return load(run_dir / MODEL), output.err.strip().splitlines()[-1], output.out


def test_a_learner_that_dies_costs_one_episode(monkeypatch, tmp_path, capsys):
    saved, line, _ = end_after(monkeypatch, tmp_path, capsys, lambda run: run.learner.process.kill(), 3)
    assert len(saved["recorder"]["recent_episodes"]) in (2, 3)
    assert "the learner's process has ended (exit code -9); resume with --resume" in line


def test_a_camera_that_is_lost_costs_one_episode(monkeypatch, tmp_path, capsys):
    def lose(run):
        run.loop.robot.pictures_left = 0

    saved, line, _ = end_after(monkeypatch, tmp_path, capsys, lose, 3)
    assert len(saved["recorder"]["recent_episodes"]) == 3
    assert "the camera is lost; resume with --resume" in line


def test_ctrl_c_in_an_episode_costs_that_episode(monkeypatch, tmp_path, capsys):
    def press_later(run):
        move, left = run.loop.move, [5]

        def moving(delta):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            move(delta)

        run.loop.move = moving  # only episodes move by it, resets have a loop of their own

    saved, _, out = end_after(monkeypatch, tmp_path, capsys, press_later, 2, code=128 + signal.SIGINT)
    assert len(saved["recorder"]["recent_episodes"]) == 2
    assert "2 episodes in" in out and "go on: " in out


def test_a_sheet_that_cannot_be_reset_needs_a_hand_and_shows_a_picture(monkeypatch, tmp_path):
    """A sheet out of reach is laid anew, and counted."""
    run = practice.Practice.start

    def start(self):
        run(self)
        self.loop.robot.arm.lay_sheet(None)  # out of reach

    monkeypatch.setattr(practice.Practice, "start", start)
    assert practise(monkeypatch, tmp_path, "--minutes", "0.3") == 0
    (run_dir,) = tmp_path.iterdir()
    assert load(run_dir / MODEL)["ranks"][0]["arm"]["hands"] >= 1 and (run_dir / "hand.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--base-policy", "zero"], "--base-policy zero: an arm needs a policy"),
        (["--base-policy", "opencv:jacobian"], "drop opencv:"),
        (["--minutes", "0"], "--minutes"),
        (["--robot", "arm"], "--robot arm: give sim, or lerobot:PORT"),
        (["--robot", "lerobot:/nowhere", "--gain", "0.7"], "--gain: only the simulated arm"),
        (["--robot", "lerobot:/nowhere", "--virtual-time"], "--virtual-time: --robot lerobot:/nowhere runs in real"),
        (["--gain", "9"], "--gain"),
        (
            ["--joint-offset-deg", "0", "nan", "0", "0", "0", "0"],
            "--joint-offset-deg must be in [-45.0, 45.0], got nan",
        ),
        (["--minutes", "0.1", "--virtual-time"], "--learning-starts 500: nothing is learned in 0.1 minutes"),
        (["--num-envs", "2"], "--num-envs"),
        (["--gamma", "2"], "--gamma"),
        (["--alpha", "2"], "--alpha"),
        (["--resume", "none.pt"], "none.pt: no such file"),
        (["--resume", "none.pt", "--run-name", "x"], "--run-name"),
        (["--resume", "none.pt", "--log-dir", "x"], "--log-dir: a resumed run goes on in its own directory"),
        (["--picture-latency-s", "0.2"], "--picture-latency-s: only the camera of so101.virtual_arm"),
    ],
)
def test_flags_that_cannot_be_used(monkeypatch, capsys, flags, reason):
    monkeypatch.setattr(sys, "argv", ["practice.py", *flags])
    assert practice.run_script(practice.main) == 2
    assert reason in capsys.readouterr().err


def test_what_was_learned_cannot_change(practised, monkeypatch, capsys):
    for flag, value in (
        ("--gamma", "0.9"), ("--alpha", "0.5"), ("--gain", "0.7"), ("--max-speed", "1.5"), ("--marks", "tags"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["practice.py", "--resume", str(practised / MODEL), flag, value])
        assert practice.run_script(practice.main) == 2
        assert f"{flag} " in (line := capsys.readouterr().err) and "was trained with" in line


def test_the_base_policy_of_a_checkpoint_may_lie_elsewhere_but_must_be_the_same(
    practised, tmp_path, monkeypatch, capsys
):
    shutil.copytree(practised, copied := tmp_path / "copied")
    saved = load(copied / MODEL)
    for name in ("a", "b"):
        shutil.copy(ROOT / "assets" / "arm.onnx", tmp_path / f"{name}.onnx")
    policy = OnnxPolicy(str(tmp_path / "a.onnx"))
    saved["args"]["base"]["base_policy"], saved["base_fingerprint"] = f"onnx:{tmp_path / 'a.onnx'}", policy.fingerprint
    save_tensors(copied / MODEL, saved)
    flags = ["--virtual-time", "--minutes", "0.1", "--resume", str(copied / MODEL)]
    other = ["--base-policy", "jacobian"]
    assert "trained on base policy" in error_of(monkeypatch, "so101.practice", *flags, *other)
    (tmp_path / "a.onnx").unlink()
    minutes = saved["ranks"][0]["arm"]["ticks"] / 30 / 60
    for more, words in (
        ([], "a.onnx: no such file"), (other, "a.onnx: no such file"),
        (["--base-policy", f"onnx:{tmp_path / 'b.onnx'}"], f"has {minutes:.1f} already"),  # the check that comes next
    ):  # fmt: skip
        assert words in error_of(monkeypatch, "so101.practice", *flags, *more)


@pytest.mark.parametrize(
    "key, value",
    [
        ("ticks", "5"), ("ticks", -1), ("max_speed", None), ("marks", "x"), ("hands", True), ("scene", {}),
        ("scene", "x"), ("steps", 2.5), ("demonstrations", -3), ("virtual_time", "yes"), ("flaws", {}), ("robot", 3),
        ("flaws", dataclasses.asdict(Flaws(joint_offset_deg=(1.0,)))), ("magic", 1), ("rng", {}), ("generator", "x"),
        ("first_rows", "many"), ("first_rows", 10**9), ("first_rows", 2.5), ("global_step", 0), ("record", {}),
        ("record", {"success": True, "steps": 3, "missed": 0}),
    ],
)  # fmt: skip
def test_what_a_checkpoint_says_about_its_arm_is_checked(practised, tmp_path, monkeypatch, capsys, key, value):
    (own,) = (saved := load(practised / MODEL))["ranks"]
    changes = {"first_rows": {"ranks": [{**own, key: value}]}, "global_step": {key: value}}
    changes["record"] = {"recorder": {**saved["recorder"], "recent_episodes": [value]}}
    model = tmp_path / MODEL
    save_tensors(model, {**saved, **changes.get(key, {"ranks": [{**own, "arm": {**own["arm"], key: value}}]})})
    flags = ["--virtual-time", "--minutes", "1", "--no-learner-process", "--resume", str(model)]
    monkeypatch.setattr(sys, "argv", ["practice.py", *flags])
    assert practice.run_script(practice.main) == 2
    assert str(model) in capsys.readouterr().err.splitlines()[-1]


def test_a_resumed_run_is_on_the_same_arm(practised, tmp_path, monkeypatch, capsys):
    """Its steps must not be mixed with those of another arm, and no port or camera is taken from a file."""
    saved = load(practised / MODEL)
    assert saved["ranks"][0]["arm"]["flaws"]["gain"] == 1.0

    def resume(*flags, **arm):
        saved["ranks"][0]["arm"] |= arm
        save_tensors(tmp_path / MODEL, saved)
        monkeypatch.setattr(sys, "argv", ["practice.py", "--resume", str(tmp_path / MODEL), *flags])
        return practice.parse_args()[0]

    flaws = dataclasses.asdict(Flaws(gain=0.7))
    args = resume(flaws=flaws, virtual_time=True)
    assert args.flaws == Flaws(gain=0.7) and args.virtual_time and args.robot == "sim"
    for flags, arm, reason in (
        (["--robot", "lerobot:/nowhere"], {}, "practised on a simulated arm; begin a new run"),
        ([], {"robot": "lerobot", "robot_id": "mine"}, "practised on the arm mine; name its --robot and --camera"),
        (["--robot", "lerobot:/nowhere", "--robot-id", "yours"], {}, "practised on the arm mine"),
    ):
        with pytest.raises(practice.SO101Error, match=reason):
            resume(*flags, **arm)
    named = ("--robot", "lerobot:/nowhere", "--robot-id", "mine", "--camera", "http://127.0.0.1:8090/video")
    args = resume(*named)
    assert (args.robot, args.robot_id, args.virtual_time) == ("lerobot:/nowhere", "mine", False)
    assert practice.arm_flags(args) == " " + " ".join(named)
    arm = dict(saved["ranks"][0]["arm"])
    for key in ("robot", "flaws"):
        saved["ranks"][0]["arm"] = {name: value for name, value in arm.items() if name != key}
        with pytest.raises(practice.SO101Error, match=str(tmp_path / MODEL)):
            resume(*named)


@pytest.mark.parametrize("turned", [False, True])
def test_the_locator_knows_on_which_side_the_simulated_camera_stands(turned):
    args = practice.Args(base_policy="jacobian", flaws=Flaws(camera_turned=turned))
    base, task = practice.load_base(args)
    policy = practice.make_policy(args, sac.Agent(practice.learner_args(args, task, 100)), base, task)
    robot = VirtualRobot(task, args.flaws)
    robot.arm.reset(5, RAISED_RAD + ASIDE_RAD)  # out of the view
    image = robot.picture().image
    seen = policy.locator.locate(image, policy.locator.find_tape(image))
    np.testing.assert_allclose(seen[:2], robot.truth()["sheet"][:2], atol=0.01)
    robot.close()


def test_steps_from_aside_and_after_the_view_is_lost_do_not_count():
    policy = practice.PractisingPolicy(drive.load_policy("jacobian"), TASK, None, True, 1)
    policy.rows = [(np.full(37, i, np.float32), np.full(6, i, np.float32)) for i in range(5)]  # two from aside
    obs, actions = policy.steps(moves=2, complete=True)
    assert obs[:, 0].tolist() == [2, 3, 4] and actions[:, 0].tolist() == [2, 3]
    obs, actions = policy.steps(moves=3, complete=False)
    assert obs[:, 0].tolist() == [2, 3, 4] and actions[:, 0].tolist() == [2, 3]
    obs, actions = policy.steps(moves=0, complete=False)
    assert len(obs) == 1 and len(actions) == 0
    assert Judge(SO101ResidualVectorEnv(1, task=TASK), 0.98).rewards(obs, actions, success=False).shape == (0,)
