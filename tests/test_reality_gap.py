"""benchmark/reality_gap.py: its flaws are in force, its episodes repeat, and its command writes what it prints."""

import json
import sys

import mujoco
import numpy as np
import pytest
from conftest import ROOT

from so101.base import BasePolicy
from so101.loop import HOME_NEAR_RAD, HOME_TOUCH_RAD, Loop
from so101.opencv import OpenCVPolicy
from so101.policies import load_policy
from so101.robot import RobotError
from so101.simulated_arm import Flaws, SimulatedArm
from so101.virtual_time import VirtualClock, virtual_loop
from so101_env import HOME_RAD, TAPE_CENTER_M, Task, load_model
from so101_sim.errors import SO101Error

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

SEED = 1_530_000_000
TASK = Task(firmware_p=16)
GAIN_N_M_RAD = 8.9  # of a servo at P = 16
sys.path.insert(0, str(ROOT / "benchmark"))
import reality_gap as gap  # noqa: E402


def settled(flaws: Flaws, command_rad: np.ndarray | None = None) -> SimulatedArm:
    """An arm that has had a second to follow a command, its own start without one."""
    arm = SimulatedArm(TASK, flaws)
    arm.reset(SEED)
    if command_rad is not None:
        arm.command(command_rad)
    for _ in range(240):
        arm.step()
    return arm


def test_a_weak_servo_sags_farther():
    """Held at the same targets, an arm with half the gain hangs lower by about twice its sag."""
    raised = HOME_RAD - np.array([0, 0.5, 0, 0, 0, 0])
    whole, half = (settled(Flaws(gain=gain, backlash_deg=0.0), raised) for gain in (1.0, 0.5))
    sag = [each.target_rad[1] - each.joints_rad[1] for each in (whole, half)]
    assert abs(sag[0]) > 0.03 and sag[1] / sag[0] == pytest.approx(2.0, rel=0.15)


def test_an_encoder_that_is_off_shifts_the_tip():
    """3.5 mm of height per degree of shoulder_lift, where the encoders read home."""
    flaws = Flaws(joint_offset_deg=(0, -3.0, 0, 0, 0, 0))
    usual, off = SimulatedArm(TASK), SimulatedArm(TASK, flaws)
    for arm in (usual, off):
        arm.reset(SEED)
    read = off.joints_rad - usual.joints_rad
    np.testing.assert_allclose(np.rad2deg(read), [0, -3, 0, 0, 0, 0], atol=0.1)  # the resolution of an encoder
    heights = []
    for arm in (usual, off):
        arm.arms.qpos[0, :6] = HOME_RAD - arm.arms.joint_offset[0]
        arm.arms.start(np.array([0]), at_home=False)
        heights.append(float(arm.arms.tip_m[0, 2]))
    assert 1000 * (heights[1] - heights[0]) == pytest.approx(-3.5 * 3, rel=0.05)


def loop_of(row: gap.Row, policy: BasePolicy | None = None) -> Loop:
    """A control loop on an arm, before its first episode."""
    robot = gap.RowRobot(TASK, row, pictures=False)
    robot.reset(SEED)
    loop = virtual_loop(robot, policy or OpenCVPolicy(None), TASK)
    loop.measure()
    return loop


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_the_loop_learns_the_gain_in_the_air(gain):
    """Within a quarter of that of the servos that carry the arm; and a weak arm gets home."""
    loop = loop_of(gap.Row(Flaws(gain=gain)))
    loop.home()
    arms = loop.robot.arm.arms
    true = (arms.gain[0] / arms.model.actuator_gainprm[:, 0])[1:3].mean()
    assert loop.controller.gain_factor == pytest.approx(true, rel=0.25)
    np.testing.assert_allclose(loop.controller.joints_rad, HOME_RAD, atol=HOME_NEAR_RAD)


def test_an_arm_that_meets_the_table_before_home_has_arrived():
    """Its zero is off by 5 degrees. Another joint that stays as far away is an error."""
    loop = loop_of(gap.Row(Flaws(joint_offset_deg=(0, -5.0, 0, 0, 0, 0))))
    loop.home()
    short = np.abs(loop.controller.joints_rad - HOME_RAD).max()
    assert HOME_NEAR_RAD < short < HOME_TOUCH_RAD
    loop.robot.write = lambda target: None
    with pytest.raises(RobotError, match="stays 6 degrees short"):
        loop.go(loop.controller.joints_rad + np.deg2rad([0, 0, 0, 0, 6, 0]))


def test_on_an_arm_the_included_policy_observes_the_load():
    """In every step, by hand: last target minus newest reading, less the lag under gravity and damping."""
    policy = gap.TruePosePolicy(load_policy(f"onnx:{ROOT / 'assets' / 'arm.onnx'}"))
    loop, seen, expected, readings, sent = loop_of(gap.Row(Flaws(gain=0.7)), policy), [], [], [], []
    robot = policy.robot = loop.robot
    loop.home()
    model, known, session = load_model(), loop.controller.gain_factor, policy.base.residuals
    data, read, write, act = mujoco.MjData(model), robot.read, robot.write, policy.act
    robot.read = lambda: readings.append(read()[0]) or read()
    robot.write = lambda target: sent.append(target) or write(target)
    policy.base.residuals = lambda flat: seen.append(flat[0, 25:]) or session(flat)

    def expect(obs, mask):
        if len(sent) > 1:
            data.qpos[:6] = readings[-1]
            mujoco.mj_forward(model, data)
            lag = (data.qfrc_bias[:6] + 0.6 * 30 * (readings[-1] - readings[-2])) / GAIN_N_M_RAD
            expected.append(known * (sent[-1] - readings[-1]) - lag)
        return act(obs, mask)

    policy.act = expect
    loop.episode(30, TASK.tape_margin)
    assert len(expected) >= 15 and np.abs(expected).max() > 0.01
    np.testing.assert_allclose(seen[-len(expected) :], expected, atol=1e-6)


def test_friction_height_backlash_and_delay_are_in_force():
    usual, wrong = (
        SimulatedArm(TASK),
        SimulatedArm(
            TASK,
            Flaws(finger_friction=0.3, table_friction=0.6, table_height_m=0.005, backlash_deg=3.0, latency_s=0.15),
        ),
    )
    for arm in (usual, wrong):
        arm.reset(SEED)
    for pair, factor in (("moving_finger_sheet", 0.25), ("sheet_table", 2.0)):
        friction = [arm.arms.batch.get_model(0).pair(pair).friction[0] for arm in (usual, wrong)]
        assert friction[1] / friction[0] == pytest.approx(factor)
    np.testing.assert_array_equal(usual.qpos, wrong.qpos)  # the same start
    assert usual.arms.tip_m[0, 2] - wrong.arms.tip_m[0, 2] == pytest.approx(0.005)
    assert wrong.latency_s - usual.latency_s == pytest.approx(0.15)
    wrong.command(wrong.target_rad + [0, 0, 0, 0, 0.02, 0])  # within the play of the wrist
    for _ in range(240):
        wrong.step()
    assert wrong.qpos[4] == pytest.approx(usual.qpos[4], abs=2e-3)


def test_tape_pictures_and_views():
    """A tape that is off shifts what is seen; late pictures are old; views are lost for half a second."""
    row = gap.Row(tape_shift_m=(0.02, 0.01), tape_turn_rad=float(np.deg2rad(90)))
    robot = gap.RowRobot(TASK, row, pictures=False)
    qpos = np.zeros(10)
    qpos[6:8], qpos[9] = TAPE_CENTER_M + (0.02, 0.04), np.deg2rad(80)  # 30 mm to the left of the tape's centre
    np.testing.assert_allclose(robot.sheet(qpos), [TAPE_CENTER_M[0] + 0.03, 0.0, np.deg2rad(-10)], atol=1e-9)

    robot = gap.RowRobot(TASK, gap.Row(picture_delay_s=0.2), pictures=False)
    robot.reset(SEED)
    clock, ages = VirtualClock(robot), []
    for _ in range(20):
        robot.look()
        ages.append(robot.time_s - robot.views[0][0])
        clock.sleep(1 / 30)
    assert ages[0] == 0 and all(0.2 - 1e-6 <= age < 0.2 + 1 / 30 for age in ages[8:])

    robot = gap.RowRobot(TASK, gap.Row(dropout=True), pictures=False)
    robot.reset(SEED)
    clock, seen = VirtualClock(robot), []
    for _ in range(900):
        robot.look()
        seen.append(robot.in_view)
        clock.sleep(1 / 30)
    ends = np.flatnonzero(np.diff(np.array(seen).astype(int)))
    gaps = np.diff(ends)[::2]  # steps without a view
    assert len(gaps) > 5 and gaps.min() >= 15 and np.median(gaps) <= 16


def test_the_command_measures_rows_and_goes_on(tmp_path, monkeypatch, capsys):
    """Twice the same numbers; rows that a file has are not run again, and their settings must be the same."""
    path, flags = tmp_path / "gap.json", ["--rows", "nothing", "--pose", "true", "--episodes", "2"]
    for run in range(2):
        monkeypatch.setattr(sys, "argv", ["reality_gap.py", *flags, "--json", str(tmp_path / f"gap{run}.json")])
        assert gap.main() == 0
    assert "| nothing | 1.00 |" in capsys.readouterr().out
    results = [json.loads((tmp_path / f"gap{run}.json").read_text()) for run in range(2)]
    assert results[0] == results[1]
    episodes = results[0]["rows"]["nothing"]["episode_list"]
    assert [each["seed"] for each in episodes] == [gap.SEED, gap.SEED + 1] and all(
        0 < e["steps"] < 400 for e in episodes
    )

    results[0]["rows"]["nothing"]["success_rate"] = 0.123
    path.write_text(json.dumps(results[0]))
    monkeypatch.setattr(sys, "argv", ["reality_gap.py", *flags, "--json", str(path)])
    assert gap.main() == 0 and "| nothing | 0.12 |" in capsys.readouterr().out
    for words, message in (
        ([*flags[:-1], "3", "--json", str(path)], "rows with another episodes"),
        (["--rows", "unheard"], "--rows unheard: no row has this in its name"),
    ):
        monkeypatch.setattr(sys, "argv", ["reality_gap.py", *words])
        with pytest.raises(SO101Error, match=message):
            gap.main()
