"""A policy on an arm: in virtual time on the simulated one, on a LeRobot that is faked, and what stops it."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, error_of

from so101 import drive, simulated_arm
from so101.base import BasePolicy
from so101.camera import NotSeen
from so101.locator import SheetLocator
from so101.loop import ASIDE_RAD, POSE_ERROR_M, RAISED_RAD, Blind, Loop, count_inside, resize
from so101.opencv import OpenCVPolicy
from so101.policies import load_policy
from so101.robot import Picture, RobotError
from so101.simulated_arm import SimulatedRobot
from so101.virtual_time import VirtualClock, VirtualRobot
from so101_env import HOME_RAD, TAPE_CENTER_M, Task, load_model, sheet_inside
from so101_sim.control import BACKLASH_RAD, LATENCY_S, Controller
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ, Renderer

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

SEED = 1_520_000_000
HIDDEN_SEED = SEED + 96  # of an episode whose sheet lies half below the arm at home
TASK = Task(firmware_p=16)


class RecordingRobot(VirtualRobot):
    """Keeps the targets that were sent; its pictures can be dark."""

    def __init__(self, task: Task = TASK):
        super().__init__(task)
        self.time_s, self.sent, self.dark = 100.0, [], False
        self.reset(SEED)

    def write(self, target_rad):
        self.sent.append(target_rad)
        super().write(target_rad)

    def picture(self):
        image, time_s = super().picture()
        return Picture(image * (not self.dark), time_s)


def make_loop(policy: BasePolicy | None = None, dry_run: bool = False) -> Loop:
    robot = RecordingRobot()
    controller = Controller(load_model(), firmware_p=16, backlash_rad=BACKLASH_RAD, latency_s=LATENCY_S)
    policy = policy or OpenCVPolicy(load_policy(f"onnx:{ROOT / 'assets' / 'arm.onnx'}"))
    return Loop(robot, policy, controller, VirtualClock(robot), dry_run)


def test_the_policy_that_comes_along_succeeds_on_the_simulated_arm():
    """Pose from the camera, backlash, encoders that are off, latency and half the gain: in 8 of 10 episodes."""
    loop, inside = make_loop(), []
    for number in range(10):
        loop.robot.arm.reset(SEED + number)
        loop.controller.reset()
        loop.go(HOME_RAD)
        seen = loop.episode(400, TASK.tape_margin)["seen_inside"]
        inside.append(loop.robot.arm.truth()["inside"])
        assert not seen or inside[-1] or abs(loop.policy.estimate[0, 0] - loop.robot.arm.truth()["sheet"][0]) < 0.01
    assert sum(inside) >= 8, inside
    assert loop.clock.missed == 0  # in virtual time nothing takes any


def test_the_script_with_another_tape(monkeypatch, tmp_path):
    """On the precise task's tape, the sheet is seen where it is, and success is that of the simulation."""
    robots = []

    def make_robot(args, task):
        robots.append(RecordingRobot(task))
        return robots[0]

    monkeypatch.setattr(drive, "make_robot", make_robot)
    monkeypatch.setattr(drive, "Clock", lambda: VirtualClock(robots[0]))
    path = tmp_path / "result.json"
    flags = ["--tape-margin", "0.02", "--episodes", "3", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["so101.drive", *flags])
    assert drive.main() == 0
    result = json.loads(path.read_text())
    assert robots[0].arm.task.tape_margin == 0.02
    assert result["episodes"] == 3 and result["missed_deadlines"] == 0
    for episode in result["episode_list"]:
        assert episode["error_mm"] < 5
        assert episode["success"] == episode["seen_inside"]


def test_only_pictures_that_show_the_sheet_make_a_success(monkeypatch):
    """One does, then the view is lost: the pose that is remembered lies inside, wherever the sheet is by now."""
    loop, locate, inside = make_loop(), SheetLocator.locate, []
    loop.robot.arm.reset(SEED)

    def once(locator, *args):
        if inside:
            raise NotSeen("a hand is in the way")
        pose = locate(locator, *args)
        inside.extend([1] * bool(sheet_inside(pose[None, :2], pose[None, 2], TASK.tape_margin - POSE_ERROR_M)[0]))
        return pose

    monkeypatch.setattr(SheetLocator, "locate", once)
    with pytest.raises(Blind, match="a hand is in the way"):
        loop.episode(400, TASK.tape_margin)
    assert inside


def test_pictures_in_which_sheets_are_inside_are_counted():
    """For each of three sheets: inside, outside, and inside an earlier picture."""
    policy, (x, y), off = BasePolicy(), TAPE_CENTER_M, TASK.tape_margin - 0.001
    policy.estimate = np.array([[x, y, 0.0], [x + off, y, 0.0], [x, y, 0.0]])
    policy.sees = np.array([True, True, False])
    assert count_inside(np.array([2, 2, 2]), policy, TASK.tape_margin).tolist() == [3, 0, 2]
    policy.sees, policy.estimate[2] = None, np.nan
    assert count_inside(np.array([0, 4, 4]), policy, TASK.tape_margin).tolist() == [1, 0, 4]
    policy.estimate = None
    assert count_inside(np.array([4, 4, 4]), policy, TASK.tape_margin).tolist() == [0, 0, 0]


def test_an_episode_that_ends_without_a_view_counts_its_steps(monkeypatch, tmp_path):
    robots, acts, act = [], [], OpenCVPolicy.act

    def make_robot(args, task):
        robots.append(RecordingRobot(task))
        return robots[0]

    def lost(policy, obs, mask):
        delta = act(policy, obs, mask)
        acts.append(delta)
        if len(acts) > 10:
            policy.trouble, policy.estimate = "the lens is covered", np.full((1, 3), np.nan)
        return delta

    monkeypatch.setattr(drive, "make_robot", make_robot)
    monkeypatch.setattr(drive, "Clock", lambda: VirtualClock(robots[0]))
    monkeypatch.setattr(OpenCVPolicy, "act", lost)
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["so101.drive", "--episodes", "1", "--json", str(path)])
    assert drive.main() == 0
    (episode,) = json.loads(path.read_text(), parse_constant=pytest.fail)["episode_list"]
    assert episode["trouble"] == "the lens is covered" and episode["error_mm"] is None
    assert episode["ticks"] == 10


def test_an_arm_whose_commands_end_comes_to_rest():
    """The last target is never far ahead: without another, every joint rests within 100 ms of its taking effect."""
    loop = make_loop()
    arm = loop.robot.arm
    loop.episode(12, TASK.tape_margin)
    before = arm.qpos[:6]
    loop.clock.sleep(1 / CONTROL_HZ)
    assert np.abs(arm.qpos[:6] - before).max() * CONTROL_HZ > 0.1  # it was moving
    loop.clock.sleep(arm.latency_s + 0.1)
    rest = arm.qpos[:6]
    loop.clock.sleep(1.0)
    assert np.abs(arm.qpos[:6] - rest).max() < np.deg2rad(1.0)


def test_a_dry_run_prints_and_sends_nothing(capsys):
    loop = make_loop(dry_run=True)
    loop.episode(3, TASK.tape_margin)
    lines = capsys.readouterr().out.splitlines()
    assert loop.robot.sent == [] and len(lines) == 3 and all("would send  shoulder_pan" in line for line in lines)


@pytest.mark.parametrize("own_view", [True, False])
@pytest.mark.parametrize(
    "answer, words",
    [
        (np.full((1, 6), np.nan), "must return finite (1, 6), got NaN or Inf"),
        (np.full((1, 6), np.inf), "must return finite (1, 6), got NaN or Inf"),
        (np.zeros((1, 5)), "must return finite (1, 6), got (1, 5)"),
        (None, "must return finite (1, 6), got ()"),
        ([["x"] * 6], "must return numbers (1, 6)"),
        (np.full((1, 6), 57.0), "57.0 rad in one step, at most 6.3 is within reach; are its actions in degrees?"),
    ],
    ids=["nan", "inf", "shape", "none", "texts", "degrees"],
)
def test_a_policy_that_fails_stops_the_arm(answer, words, own_view):
    """As in the simulation, whether it sees the camera itself or through OpenCV."""

    class Failing(BasePolicy):
        cameras, calls = ("top",) * own_view, 0

        def act(self, obs, mask):
            self.calls += 1
            return answer if self.calls > 5 else np.zeros((1, 6))

    loop = make_loop(Failing() if own_view else OpenCVPolicy(Failing()))
    with pytest.raises(SO101Error, match=re.escape("base policy Failing: ")) as error:
        loop.episode(30, TASK.tape_margin)
    assert words in str(error.value)
    assert len(loop.robot.sent) == 5 and np.isfinite(loop.robot.sent).all()


def test_where_the_arm_hides_the_sheet_it_looks_from_aside():
    loop, mask = make_loop(), np.ones(1, bool)
    loop.robot.arm.reset(HIDDEN_SEED)
    loop.policy.reset(mask)
    loop.measure()
    with pytest.raises(Blind, match="the sheet cannot be made out"):
        loop.act(mask)
    assert loop.episode(1, TASK.tape_margin)["ticks"] == 1
    np.testing.assert_allclose(loop.controller.joints_rad, HOME_RAD, atol=0.05)
    np.testing.assert_allclose(loop.policy.estimate[0, :2], loop.robot.arm.truth()["sheet"][:2], atol=0.005)


def test_without_a_view_it_does_not_act():
    """It looks from aside, to both sides, and gives up there; in a dry run it stays."""
    loop = make_loop()
    loop.robot.dark = loop.dry_run = True
    with pytest.raises(Blind, match="red tape"):
        loop.episode(10, TASK.tape_margin)
    assert loop.robot.sent == []
    loop.dry_run = False
    with pytest.raises(Blind, match="red tape"):
        loop.episode(10, TASK.tape_margin)
    pan = np.array(loop.robot.sent)[:, 0]
    assert pan.max() > 0.85 and pan[-1] < -0.85
    np.testing.assert_allclose(loop.controller.joints_rad, RAISED_RAD - ASIDE_RAD, atol=0.05)
    loop.robot.dark, old = False, loop.robot.picture
    loop.robot.picture = lambda: Picture(old().image, loop.robot.time_s - 0.3)
    with pytest.raises(RobotError, match="newest picture is 300 ms old"):
        loop.episode(10, TASK.tape_margin)


@pytest.mark.parametrize("size", [(96, 96), (120, 160)])
def test_a_policy_sees_what_it_was_trained_on(size):
    """The middle of a wide picture, and not all of it squeezed."""
    robot = RecordingRobot()
    painter = Renderer(robot.arm.model, size, fast=True)
    expected = painter.render(robot.arm.qpos, "top", robot.arm.look).astype(float)
    painter.close()
    assert np.abs(resize(robot.picture().image, size) - expected).mean() < 2  # squeezed, the square one is off by 4


def test_something_in_the_way_is_told():
    loop = make_loop()
    loop.robot.write = lambda target: None  # the arm does not move
    with pytest.raises(RobotError, match="shoulder_lift stays 20 degrees short"):
        loop.go(HOME_RAD - np.array([0, np.deg2rad(20), 0, 0, 0, 0]))


def test_a_simulated_robot_begins_anew_and_is_unplugged(monkeypatch):
    """After a reset, no picture of the episode before. When its process dies, the next read says so."""
    monkeypatch.setattr(simulated_arm, "ANSWER_S", 30.0)  # on a machine that is busy with other tests
    expected, robot = RecordingRobot(), SimulatedRobot(TASK)
    try:
        for number in range(4):
            robot.reset(SEED + number)
            expected.arm.reset(SEED + number)
            off = np.abs(robot.picture().image.astype(float) - expected.picture().image).mean()
            assert off < 12, off  # noise, and an arm that sags; another look differs by 30 and more
        joints, at = robot.read()
        assert joints.shape == (6,) and at <= time.monotonic()
        robot.process.kill()
        robot.process.join()
        with pytest.raises(RobotError, match="unplugged"):
            for _ in range(3):  # a first write may still fit into the pipe
                robot.write(joints)
                robot.read()
    finally:
        robot.close()
        expected.close()


def test_the_simulated_arm_does_not_import_the_main_program(tmp_path):
    """LeRobot's commands take half a minute to import, and the arm's process would import them again."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "print('imported as', __name__, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    from so101.simulated_arm import SimulatedRobot\n"
        "    from so101_env import Task\n"
        "    robot = SimulatedRobot(Task(), size=(24, 32), answer_s=60.0)\n"
        "    print(len(robot.read()[0]), 'joints', sys.modules['__main__'].__file__)\n"
        "    robot.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=250, env=environment)
    assert done.stdout == f"imported as __main__\n6 joints {program}\n", done.stderr


def test_refusals(monkeypatch):
    monkeypatch.setitem(sys.modules, "lerobot.robots.so_follower", None)  # as in an environment without it
    for flags, text in (
        (["--robot", "lerobot"], "give sim, or lerobot:PORT"),
        (["--model", "none.onnx"], "none.onnx: no such file"),
        (["--max-speed", "9"], "--max-speed must be in"),
        (["--robot", "lerobot:/dev/none"], "needs LeRobot's environment"),
    ):
        assert text in error_of(monkeypatch, "so101.drive", *flags)
    with pytest.raises(SO101Error, match="unknown base policy"):
        load_policy("opencv")
