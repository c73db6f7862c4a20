"""The scripted scene reset, in virtual time on simulated arms, with the sheet located in the camera's pictures."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

from so101.opencv import OpenCVPolicy
from so101.scene_reset import GOAL_M, HandNeeded, SceneReset, press_point
from so101.simulated_arm import Flaws, SimulatedArm
from so101.virtual_time import VirtualRobot, virtual_loop
from so101_env import (
    ENVIRONMENT,
    HOME_RAD,
    SHEET_COLUMNS,
    SHEET_HALF_M,
    TAPE_CENTER_M,
    Task,
    sheet_inside,
)
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error
from so101_sim.geometry import wrap_angle

cv2 = pytest.importorskip("cv2")
sys.path.insert(0, str(ROOT / "benchmark"))
import resets  # noqa: E402

SEED = 1_600_000_000
TASK = Task(firmware_p=16)
INSIDE = (*TAPE_CENTER_M, 0.05)


def make_reset(flaws: Flaws | None = None, sheet: tuple[float, float, float] = INSIDE, seed: int = SEED) -> SceneReset:
    """The reset of an arm at home, whose sheet lies at x, y (m), yaw (rad), after an episode that has seen the tape."""
    robot, mask = VirtualRobot(TASK, flaws), np.ones(1, bool)
    robot.reset(seed)
    loop = virtual_loop(robot, OpenCVPolicy(None), TASK)
    lay(robot, INSIDE)
    loop.measure()
    loop.home()
    loop.policy.reset(mask)
    loop.act(mask)
    lay(robot, sheet)
    return SceneReset(loop, TASK, loop.policy.locator)


def lay(robot: VirtualRobot, sheet: tuple[float, float, float]) -> None:
    """Put the sheet at x, y (m), yaw (rad)."""
    robot.arm.arms.qpos[0, [6, 7, 9]] = sheet


@pytest.mark.parametrize("flaws", [None, Flaws(joint_offset_deg=(0, -3.0, 0, 0, 0, 0)), Flaws(backlash_deg=3.0)])
def test_a_sheet_in_the_tape_is_brought_to_a_start(flaws, monkeypatch):
    """Near a drawn one, outside of the tape, where it is seen; and the arm is home, without a rest on the way."""
    reset, rng = make_reset(flaws), np.random.default_rng(SEED)
    monkeypatch.setattr(reset.loop.controller, "learn_gain", None)  # the first way home has done that
    for _ in range(2):
        done = reset.run(rng)
        sheet = reset.loop.robot.truth()["sheet"]
        assert done.tries >= 1 and 60 < done.ticks < 900
        assert np.linalg.norm(sheet[:2] - done.pose[:2]) < 0.005 and abs(wrap_angle(sheet[2] - done.pose[2])) < 0.03
        assert not sheet_inside(sheet[None, :2], sheet[2:], TASK.tape_margin)[0] and abs(sheet[2]) < 0.36
        assert np.linalg.norm(done.pose[:2] - done.goal[:2]) <= (GOAL_M if flaws is None else 2 * GOAL_M)
        assert np.abs(reset.loop.controller.joints_rad - HOME_RAD).max() < np.deg2rad(5.0)
        lay(reset.loop.robot, INSIDE)
    reset.loop.robot.close()


@pytest.mark.parametrize("offset_deg, higher", [(0.0, False), (-5.0, True)])
def test_a_tip_that_touches_the_sheet_on_its_way_travels_higher(offset_deg, higher):
    """With shoulder_lift off by -5 degrees the tip is 26 mm lower than it seems, and takes the sheet along."""
    reset, rng = make_reset(Flaws(joint_offset_deg=(0, offset_deg, 0, 0, 0, 0))), np.random.default_rng(SEED)
    for _ in range(2):
        assert reset.run(rng).tries >= 1
        lay(reset.loop.robot, INSIDE)
    assert (reset.drag.clear[0] > 0) == higher
    reset.loop.robot.close()


def test_a_sheet_at_a_start_is_not_moved():
    reset = make_reset(sheet=(0.34, 0.05, 0.1))
    done = reset.run(np.random.default_rng(SEED))
    assert done.tries == 0
    np.testing.assert_allclose(reset.loop.robot.truth()["sheet"], (0.34, 0.05, 0.1), atol=0.002)
    reset.loop.robot.close()


def test_a_turned_sheet_is_turned_back():
    """One that a failed episode has turned by 0.6 rad, far beyond the starts of the task."""
    reset = make_reset(sheet=(0.33, 0.06, 0.6))
    reset.run(np.random.default_rng(SEED))
    assert abs(reset.loop.robot.truth()["sheet"][2]) < 0.36
    reset.loop.robot.close()


def test_a_sheet_out_of_reach_needs_a_hand(tmp_path):
    """The arm does not try, and the picture shows where the sheet is seen."""
    reset = make_reset(sheet=(0.47, 0.02, 0.0))
    with pytest.raises(HandNeeded, match="out of the arm's reach: lay it by hand"):
        reset.run(np.random.default_rng(SEED))
    reset.save_picture(tmp_path / "hand.png", "lay the sheet")
    picture = cv2.imread(str(tmp_path / "hand.png")).astype(int)
    plain = cv2.resize(reset.loop.robot.picture().image, None, fx=2, fy=2)[..., ::-1].astype(int)
    assert picture.shape == plain.shape
    green = (picture[..., 1] > 150) & (picture[..., ::2].max(2) < 60) & (np.abs(picture - plain).max(2) > 60)
    assert green.sum() > 200  # the sheet's outline
    reset.loop.robot.close()


def test_a_sheet_that_does_not_follow_needs_a_hand():
    """Fingertips without grip: the press grows before the arm gives up."""
    reset = make_reset(Flaws(finger_friction=0.05))
    with pytest.raises(HandNeeded, match="after 6 drags"):
        reset.run(np.random.default_rng(SEED))
    assert reset.drag.press[0] > 1.5
    reset.loop.robot.close()


def test_the_true_state_is_not_used(monkeypatch):
    """Without it the same reset: all that is observed of the sheet before the locator has seen it is NaN."""
    done = []
    for hidden in (False, True):
        reset = make_reset()
        if hidden:
            monkeypatch.setattr(VirtualRobot, "truth", None)
            monkeypatch.setattr(SimulatedArm, "truth", None)
            see = reset.loop.observe

            def observe(picture, see=see):
                obs = see(picture)
                obs[ENVIRONMENT][:, SHEET_COLUMNS.start - ACT_DIM : SHEET_COLUMNS.stop - ACT_DIM] = np.nan
                return obs

            reset.loop.observe = observe
        done.append(reset.run(np.random.default_rng(SEED)))
        reset.loop.robot.close()
    np.testing.assert_array_equal(done[0].pose, done[1].pose)
    assert done[0].ticks == done[1].ticks


def test_where_to_press():
    """At the centre if the gripper reaches it, otherwise where it does at both ends of the drag."""
    near, far = np.array([*TAPE_CENTER_M, 0.0]), np.array([0.39, 0.0, 0.3])
    point, beyond_m = press_point(near, np.array([0.22, 0.05, 0.2]))
    np.testing.assert_allclose(point, 0.0, atol=1e-9)
    assert beyond_m == 0.0
    point, beyond_m = press_point(near, far)
    assert point[0] < -0.03 and (np.abs(point) < SHEET_HALF_M).all() and beyond_m < 0.01
    assert press_point(np.array([0.5, 0.0, 0.0]), near)[1] > 0.05


def test_the_benchmark_counts_hands_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    """One reset with a tip that grips; one with a tip that slips, where the arm gives up at once."""
    monkeypatch.setitem(resets.ROWS, "slips", (TASK.tape_margin, Flaws(finger_friction=0.05)))
    monkeypatch.setattr("so101.scene_reset.MAX_TRIES", 1)
    path = tmp_path / "resets.json"
    command = ["resets.py", "--rows", "nothing", "slips", "--resets", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    assert resets.main() == 0
    (good,), (slips,) = json.loads(path.read_text()).values()
    sheet = np.array([good["start"]])
    assert good["hand"] == "" and not sheet_inside(sheet[:, :2], sheet[:, 2], TASK.tape_margin)[0]
    assert "after 1 drags" in slips["hand"] and slips["grip"] < 1 < good["grip"]
    printed = capsys.readouterr().out
    assert f"| nothing | 1 | 0 | {good['steps'] / 30:.1f} |" in printed and "| slips | 1 | 1 | nan |" in printed
    monkeypatch.setattr(sys, "argv", ["resets.py", "--rows", "unheard"])
    with pytest.raises(SO101Error, match="--rows unheard: not one of nothing, "):
        resets.main()
