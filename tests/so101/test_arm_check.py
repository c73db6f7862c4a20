"""The check of an arm, in virtual time on the simulated one: gain, joint offsets, directions, camera side, grip."""

import json

import mujoco
import numpy as np
import pytest
from test_drive import RecordingRobot

from so101.arm_check import (
    LOWEST_M,
    RAISED_OPEN_RAD,
    TOUCHES,
    ArmCheck,
    ArmProfile,
    Fingertip,
    Gain,
    Offsets,
    Place,
    camera_side,
    fit_offsets,
    servo_advice,
)
from so101.camera import NotSeen
from so101.drive import Loop
from so101.locator import SheetLocator
from so101.robot import Picture, RobotError, ServoFault
from so101.virtual_time import VirtualClock
from so101_env import TAPE_CENTER_M, load_model
from so101_sim.control import BACKLASH_RAD, JOINTS, LATENCY_S, Controller
from so101_sim.errors import SO101Error

SEED = 1_530_000_000
MORE_FLAWS = (((-5, -3), 0.5), ((0, 0), 1.0), ((3, -5), 2.0), ((-3, 3), 0.4))
FAR_M = (0.7, 0.3)  # where the sheet is out of the way


def make_check(
    seed: int = SEED, offset_deg: tuple = (0, 0), gain: float = 1.0, sheet: tuple | None = FAR_M
) -> ArmCheck:
    """A check of a simulated arm at home with these offsets, encoder minus true, of shoulder_lift and elbow_flex."""
    robot = RecordingRobot()
    arm, arms = robot.arm, robot.arm.arms
    arm.reset(seed)
    arms.joint_offset[0, 1:3] = np.deg2rad(offset_deg)
    arms.fields["actuator_gainprm"][0, :, 0] *= gain
    arms.fields["actuator_biasprm"][0, :, 1] *= gain
    if sheet is not None:
        arms.qpos[0, 6:8] = sheet
    arms.start(np.array([0]))
    arm.target_rad = arms.command[0].copy()
    controller = Controller(load_model(), 16, BACKLASH_RAD, LATENCY_S)
    return ArmCheck(Loop(robot, None, controller, VirtualClock(robot)))


def tip_m(check: ArmCheck) -> np.ndarray:
    """The true position (3,) of the fixed finger's lowest point."""
    return check.finger.point_m(arm_of(check).qpos[:6])


def arm_of(check: ArmCheck):
    return check.loop.robot.arm


def set_table_height(check: ArmCheck, height_m: float) -> None:
    """Let the arm feel the table at another height: a contact's margin is the distance at which it begins."""
    arm = arm_of(check)
    margins = arm.arms.batch.expand("pair_margin")
    for i in range(arm.model.npair):
        margins[0, i] = height_m if "_table" in arm.model.pair(i).name and "finger" in arm.model.pair(i).name else 0.0


def watch(check: ArmCheck, see) -> list:
    """Call see() after every control step, and collect what it returns."""
    seen, sleep = [], check.loop.clock.sleep

    def watched(seconds):
        sleep(seconds)
        seen.append(see())

    check.loop.clock.sleep = watched
    return seen


def test_a_servo_fault_while_the_tip_presses_stops_the_arm():
    """Lifting the tip is for the way out, which knows what has happened."""
    check, sent = make_check(), []
    robot = check.loop.robot

    def watch():
        if tip_m(check)[2] < 0.03:
            robot.write = sent.append
            raise ServoFault("overload")

    check.hover(TOUCHES[0])
    robot.watch = watch
    with pytest.raises(ServoFault, match="overload"):
        check.touch(TOUCHES[0])
    assert robot.write == sent.append and sent == []


@pytest.mark.parametrize(
    "offset_deg, gain",
    [((-3, 0), 0.6), ((5, 5), 1.4), *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_FLAWS)],
)
def test_gain_and_joint_offsets(offset_deg, gain):
    """Whatever is wrong at once: each follows to a few tenths of a degree, and the gain to 2 %."""
    check = make_check(SEED + 1, offset_deg, gain)
    arms = arm_of(check).arms
    measured, offsets = check.measure_servos()
    true_rad, nominal = arms.joint_offset[0], arms.model.actuator_gainprm[1:3, 0]
    np.testing.assert_allclose(offsets.offset_rad[1:3], true_rad[1:3], atol=np.deg2rad(0.5))
    assert (np.abs(offsets.offset_rad - true_rad)[1:4] < 3 * offsets.error_rad[1:4]).all()
    np.testing.assert_allclose(measured.joints, arms.gain[0, 1:3] / nominal, rtol=0.02)
    np.testing.assert_allclose(measured.backlash_rad, np.deg2rad(1.0), atol=np.deg2rad(0.15))
    assert measured.factor == pytest.approx(np.mean(measured.joints))
    assert check.gain_factor == measured.factor and (check.loop.offset_rad == offsets.offset_rad).all()
    # what a policy needs: where the arm believes its tip to be
    joints = arm_of(check).qpos[:6]
    believed = check.finger.point_m(joints + true_rad - offsets.offset_rad)
    assert abs(believed[2] - check.finger.point_m(joints)[2]) < 0.001


def press_n(check: ArmCheck) -> float:
    """Normal force of the table on the fingers, N."""
    arm = arm_of(check)
    model, arms = arm.model, arm.arms
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:], data.ctrl[:] = arms.qpos[0], arms.qvel[0], arms._ctrl[0]
    nominal = model.actuator_gainprm.copy(), model.actuator_biasprm.copy()
    model.actuator_gainprm[:], model.actuator_biasprm[:] = (
        arms.fields[name][0] for name in ("actuator_gainprm", "actuator_biasprm")
    )
    mujoco.mj_forward(model, data)
    model.actuator_gainprm[:], model.actuator_biasprm[:] = nominal
    force, total = np.zeros(6), 0.0
    for i in range(data.ncon):
        if model.geom("fixed_finger_col").id in (data.contact[i].geom1, data.contact[i].geom2):
            mujoco.mj_contactForce(model, data, i, force)
            total += force[0]
    return total


@pytest.mark.parametrize("gain, place", [(0.8, TOUCHES[0]), (1.25, TOUCHES[2])])
def test_a_touch_is_gentle(gain, place):
    """With a gain that is 20 % off: the tip presses by about 1 N for a tenth of a second, and is lifted afterwards."""
    check, forces = make_check(gain=gain), []
    arm = arm_of(check)
    check.hover(place)
    step = arm.step

    def watched():
        step()
        if tip_m(check)[2] < 0.002:
            forces.append(press_n(check))

    arm.step = watched
    joints = check.touch(place)
    pressed = np.convolve(forces, np.full(24, 1 / 24))  # the simulated contact chatters: mean over 0.1 s
    assert 0.5 < pressed.max() < 2.2
    assert abs(check.finger.point_m(joints - arm.arms.joint_offset[0])[2]) < 0.0005
    assert tip_m(check)[2] > 0.03


def test_where_there_is_no_table_it_stops_and_can_fold():
    check = make_check()
    set_table_height(check, -0.2)
    check.hover(TOUCHES[1])
    heights = watch(check, lambda: tip_m(check)[2])
    with pytest.raises(RobotError, match="no table was felt"):
        check.touch(TOUCHES[1])
    assert LOWEST_M - 0.02 < min(heights) < LOWEST_M + 0.01
    check.loop.rest()  # what Loop.leave does
    assert tip_m(check)[2] > 0.005


def test_offsets_of_touches_by_kinematics():
    """Of exact touches: lift and elbow by themselves, with the wrist kept near zero; without offsets, none."""
    finger, offset = Fingertip(), np.zeros(6)
    touched = [finger.joints_at(place, 0.0) for place in TOUCHES]
    np.testing.assert_allclose(fit_offsets(finger, touched).offset_rad, 0.0, atol=1e-4)
    offset[1:3] = np.deg2rad([4.0, -4.0])
    found = fit_offsets(finger, [each + offset for each in touched])
    np.testing.assert_allclose(np.rad2deg(found.offset_rad), np.rad2deg(offset), atol=0.35)
    assert found.misfit_m < 0.0005
    # three touches at one reach cannot tell lift from elbow, and say so by their error
    same = [finger.joints_at(Place(0.2, pan, -0.5), 0.0) for pan in (-0.5, 0.0, 0.5)]
    assert fit_offsets(finger, same).error_rad[2] > 3 * found.error_rad[2]


def test_postures_of_the_fingertip():
    finger = Fingertip()
    for place in (*TOUCHES, Place(0.2, 0.0, 0.0)):
        joints = finger.joints_at(place, 0.02)
        out = finger.point_m(joints)[:2] - (0.0388353, 0.0)
        bearing = np.array([np.cos(place.pan_rad), -np.sin(place.pan_rad)])
        assert out @ bearing == pytest.approx(place.reach_m, abs=1e-5)
        assert finger.point_m(joints)[2] == pytest.approx(0.02, abs=1e-5)
        delta = np.eye(6) * 1e-6
        numeric = np.array([(finger.point_m(joints + each) - finger.point_m(joints - each)) / 2e-6 for each in delta])
        np.testing.assert_allclose(finger.jacobian(joints), numeric.T, atol=1e-6)
    with pytest.raises(SO101Error, match="cannot be held 600 mm ahead"):
        finger.joints_at(Place(0.6, 0.0, 0.0), 0.0)


def test_advice():
    gain = Gain(1.0, 0.02, (1.0, 1.0), (0.01, np.deg2rad(2.5)))
    offsets = Offsets(np.zeros(6), np.zeros(6), 0.0002)
    assert servo_advice(gain._replace(backlash_rad=(0.017, 0.017)), offsets) == []
    assert servo_advice(gain, offsets) == ["elbow_flex has 2.5 degrees of backlash: tighten its horn and screws"]
    assert "miss a level table by 3.0 mm" in servo_advice(gain, offsets._replace(misfit_m=0.003))[1]


# ---------------------------------------------------------------------------------------------------------------------
# directions


def test_joints_move_by_five_degrees():
    """Each moves by itself, in its positive direction; with half the gain, and backlash."""
    check = make_check(gain=0.5)
    for joint, name in enumerate(JOINTS):
        moves = watch(check, lambda: arm_of(check).qpos[:6])
        nudge = check.nudge(joint)
        assert np.max(moves, axis=0)[joint] - moves[-1][joint] > np.deg2rad(2.5)
        assert np.rad2deg(nudge.moved_rad) == pytest.approx(5.0, abs=0.6) and nudge.question.startswith(name)


def test_what_a_person_is_asked_is_what_happens():
    """The directions in the questions, by the model's kinematics, from the pose in which they are asked."""
    check = make_check()
    model, data = load_model(), mujoco.MjData(load_model())

    def scene(joints):
        data.qpos[:6] = joints
        mujoco.mj_forward(model, data)
        geoms = {name: data.geom(f"{name}_col").xpos.copy() for name in ("fixed_finger", "moving_finger", "wrist")}
        return geoms["fixed_finger"], geoms["moving_finger"], geoms["wrist"]

    def moved(joint):
        return [
            after - before
            for before, after in zip(scene(RAISED_OPEN_RAD), scene(RAISED_OPEN_RAD + 0.087 * np.eye(6)[joint]))
        ]

    questions = [check.nudge(joint).question for joint in range(6)]
    assert "to its right" in questions[0] and moved(0)[0][1] < -0.005  # y points to the left
    assert "lean forwards" in questions[1] and moved(1)[2][0] > 0.005
    assert "forearm go down" in questions[2] and moved(2)[2][2] < -0.005
    assert "down and back" in questions[3] and moved(3)[0][0] < -0.005 and moved(3)[2] == pytest.approx(0, abs=3e-3)
    fixed, moving, _ = scene(RAISED_OPEN_RAD)
    across = (moving - fixed)[:2]
    turned = across + (moved(4)[1] - moved(4)[0])[:2]
    assert "counterclockwise" in questions[4] and across[0] * turned[1] - across[1] * turned[0] > 0
    assert "gripper open" in questions[5] and moved(5)[1][0] > 0.003


def test_swapped_and_stuck_servos_are_named():
    check = make_check()
    robot, swap = check.loop.robot, [0, 2, 1, 3, 4, 5]
    write = robot.write
    read = robot.read
    check.go(RAISED_OPEN_RAD)
    base = robot.read()[0]
    robot.write = lambda target: write(base + (target - base)[swap])
    with pytest.raises(RobotError, match="elbow_flex moved by [45] degrees when shoulder_lift should: .* swapped"):
        check.nudge(1)
    robot.write = write
    check.go(RAISED_OPEN_RAD)
    held = read()[0]
    robot.read = lambda: (np.where(np.arange(6) == 3, held, read()[0]), robot.time_s)
    with pytest.raises(RobotError, match="wrist_flex moved by 0.0 degrees instead of 5"):
        check.nudge(3)


# ---------------------------------------------------------------------------------------------------------------------
# the camera's side


def turn_camera(check: ArmCheck) -> None:
    """Put the camera on the arm's side: half a turn about the vertical axis through the tape's centre."""
    look = arm_of(check).look
    number, turned = arm_of(check).model.camera("top").id, np.zeros(4)
    position = look.fields["cam_pos"][number]
    position[:2] = 2 * TAPE_CENTER_M - position[:2]
    mujoco.mju_mulQuat(turned, np.array([0.0, 0.0, 0.0, 1.0]), look.fields["cam_quat"][number])
    look.fields["cam_quat"][number] = turned


@pytest.mark.parametrize("turned", [False, True])
def test_the_side_of_the_camera(turned):
    check = make_check(SEED + 2, sheet=None)
    if turned:
        turn_camera(check)
    side = check.find_side(SheetLocator())
    assert side.turned is turned and abs(side.along) > 0.85 and abs(side.shift_m) > 0.1


def test_a_camera_that_cannot_tell_is_refused():
    check = make_check(SEED + 2, sheet=None)
    robot, locator = check.loop.robot, SheetLocator()
    frozen, render = robot.picture().image, robot.picture
    robot.picture = lambda: Picture(frozen, 0.0)
    with pytest.raises(RobotError, match="has taken no picture in 2 s"):
        check.look(0.0)
    robot.picture = lambda: Picture(frozen, robot.time_s)
    with pytest.raises(NotSeen, match="does not see the arm move"):
        check.find_side(locator)
    rng = np.random.default_rng(0)

    def disturbed():
        image = render().image.copy()
        row, column = rng.integers(0, 120), rng.integers(0, 160)
        image[row : row + 100, column : column + 100] = 200
        return Picture(image, robot.time_s)

    robot.picture = disturbed
    with pytest.raises(NotSeen, match="changes while the arm is still"):
        check.find_side(locator)
    # something that moves towards and away from the camera's far side, not along the tape's long sides
    to_picture = locator.find_tape(frozen)
    pictures = [frozen.copy() for _ in range(3)]
    pictures[0][20:60, 100:140], pictures[2][180:220, 140:180] = 250, 250
    with pytest.raises(NotSeen, match="along the long sides"):
        camera_side(*pictures, to_picture)


# ---------------------------------------------------------------------------------------------------------------------
# friction of the fingertip


@pytest.mark.parametrize(
    "friction, grips, sheet", [(0.2, False, TAPE_CENTER_M), (0.8, True, TAPE_CENTER_M), (0.8, True, (0.21, 0.06))]
)
def test_a_fingertip_that_slips_is_told(friction, grips, sheet):
    """Also of a sheet that is not pressed in its middle, and turns."""
    check = make_check(SEED + 3, sheet=tuple(sheet))
    arm = arm_of(check)
    for finger in ("fixed", "moving"):
        arm.arms.fields["pair_friction"][0, arm.model.pair(f"{finger}_finger_sheet").id, :2] = friction
    before = arm.truth()["sheet"]
    grip = check.measure_grip(SheetLocator())
    moved = np.linalg.norm(arm.truth()["sheet"][:2] - before[:2])
    assert moved > 0.01 if grips else moved < 0.003
    assert grip.tip_m == pytest.approx(0.02, abs=0.003)
    assert (grip.share > 0.8) is grips and grip.share < 1.1 and ("rubber band" in grip.advice) is not grips


def test_a_sheet_out_of_reach_is_not_dragged():
    check = make_check(SEED + 3, sheet=(0.43, 0.0))
    with pytest.raises(RobotError, match="lay it into the middle of the tape"):
        check.measure_grip(SheetLocator())


# ---------------------------------------------------------------------------------------------------------------------
# the file


def test_corrected_coordinates():
    loop, offset = make_check().loop, np.array([0.0, 0.1, -0.2, 0.0, 0.0, 0.0])
    loop.controller.reset()
    loop.offset_rad = offset
    loop.measure()
    np.testing.assert_allclose(loop.controller.joints_rad, loop.robot.read()[0] - offset)
    loop.move(np.zeros(6))
    np.testing.assert_allclose(loop.robot.sent[-1], loop.controller.command_rad + offset)


def test_new_beliefs_do_not_move_the_arm():
    """Other offsets change the coordinates, not the targets that the servos get."""
    check = make_check()
    check.go(RAISED_OPEN_RAD)
    sent = check.loop.robot.sent[-1]
    check.believe(1.05, np.array([0.0, 0.08, -0.05, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(check.loop.controller.joints_rad[1], RAISED_OPEN_RAD[1] - 0.08, atol=0.02)
    check.loop.move(np.zeros(6))
    np.testing.assert_allclose(check.loop.robot.sent[-1], sent, atol=0.006)
    np.testing.assert_allclose(check.loop.controller.gain[1], 1.05 * 8.9, rtol=1e-6)


def test_a_profile_is_kept(tmp_path):
    path = tmp_path / "arm.json"
    profile = ArmProfile("mine").with_step("directions", {"moved_deg": [5.0, 4.5]})
    offset_rad = (0.0, -0.05, 0.01, 0.0, 0.0, 0.0)
    profile = profile.with_step("servos", {"misfit_mm": 0.1}, offset_rad=offset_rad, gain_factor=0.6)
    profile = profile.with_step("camera", {"along": -1.0}, camera_turned=True)
    profile.save(path)
    again = ArmProfile.load(path, "mine")
    assert again == profile and again.offset_rad == (0.0, -0.05, 0.01, 0.0, 0.0, 0.0)
    assert again.gain_factor == 0.6 and again.camera_turned and [*again.steps] == ["directions", "servos", "camera"]
    assert again.steps["directions"]["moved_deg"] == [5.0, 4.5] and again.steps["servos"]["date"].endswith("UTC")
    with pytest.raises(SO101Error, match="is the profile of 'mine', not of 'other'"):
        ArmProfile.load(path, "other")
    with pytest.raises(SO101Error, match=r"none.json: cannot be read .*; run the check first"):
        ArmProfile.load(tmp_path / "none.json", "mine")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"version": 2}, "version 2"),
        ({"offset_rad": [0.0] * 5}, "offset_rad is impossible"),
        ({"offset_rad": [0.0] * 5 + [0.5]}, "offset_rad is impossible"),
        ({"offset_rad": [0.0] * 5 + [None]}, "offset_rad is impossible"),
        ({"gain_factor": float("nan")}, "contains NaN"),
        ({"gain_factor": True}, "gain_factor is impossible"),
        ({"camera_turned": 1}, "camera_turned is impossible"),
        ({"steps": {"servos": {}}}, "steps is impossible"),
        ({"extra": 1}, "unexpected keyword argument"),
        ({"steps": None}, "steps is impossible"),
        ({"robot_id": ...}, "robot_id"),
        ({"gain_factor": ...}, "gain_factor is missing"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, change, reason):
    path = tmp_path / "arm.json"
    ArmProfile("mine").save(path)
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    with pytest.raises(SO101Error, match=reason) as caught:
        ArmProfile.load(path, "mine")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, "\xff\xfe"])
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "arm.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SO101Error, match="is no arm profile"):
        ArmProfile.load(path, "mine")
