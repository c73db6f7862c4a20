"""Physics of a batch of arms: control steps, joint limits, latency, backlash, joint offsets, resampled servos."""

import numpy as np
import pytest
from small_task import HOME_QPOS, HOME_RAD, load_model

from so101_sim.batch import ArmRandomization, Arms
from so101_sim.control import ACT_DIM, BACKLASH_RAD

GAIN, FRICTION = 17.8, 0.052  # N m/rad and N m, of the servos in so101.xml


def make_arms(n: int = 1, **ranges) -> Arms:
    """Arms at home, at rest, with drawn physics."""
    arms = Arms(load_model(), HOME_QPOS, n, ArmRandomization(**ranges))
    rng = np.random.default_rng(0)
    for i in range(n):
        arms.qpos[i] = arms.home["qpos"]
        arms.resample(i, rng)
    arms.start(np.arange(n))
    return arms


def move(arms: Arms, delta_rad: np.ndarray, steps: int) -> None:
    """Add a delta (N, 6) to the joint targets in each of some control steps, within the command law."""
    for _ in range(steps):
        arms.step(arms.limit(arms.command + delta_rad), np.ones(arms.num_arms, bool))


def test_a_control_step_is_a_thirtieth_of_a_second():
    arms = make_arms()
    move(arms, np.zeros((1, ACT_DIM)), 30)
    assert arms.batch.bind("time")[0] == pytest.approx(1.0, abs=1e-9)


def test_inactive_arms_are_not_simulated():
    """With and without backlash, which steps the physics in another way."""
    for ranges in ({}, {"backlash_rad": (0.0, 0.02)}):
        arms = make_arms(3, **ranges)
        before, command = arms.batch.state.copy(), arms.command.copy()
        arms.step(arms.command + 0.01, np.array([True, False, True]))
        np.testing.assert_array_equal(arms.batch.state[1], before[1])
        np.testing.assert_array_equal(arms.command[1], command[1])
        assert (arms.batch.state[[0, 2]] != before[[0, 2]]).any(1).all()
        np.testing.assert_allclose(arms.command[[0, 2]], command[[0, 2]] + 0.01)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_targets_stay_within_the_joint_limits(direction):
    """However long a joint is pushed: each joint by itself, the others at rest."""
    arms, reached = make_arms(ACT_DIM), np.zeros(ACT_DIM)
    for _ in range(400):
        move(arms, 0.07 * direction * np.eye(ACT_DIM), 1)
        reached = np.maximum(reached, direction * np.diag(arms.command))
    limit = direction * arms.model.actuator_ctrlrange[:, int(direction > 0)]
    assert (reached <= limit + 1e-12).all()
    free = [0, 4, 5] if direction > 0 else [0, 4]  # the table, and the other jaw, stop the others before
    np.testing.assert_allclose(reached[free], limit[free], atol=1e-12)


def test_a_diverged_arm_is_reported_and_put_back():
    arms, untouched = make_arms(2), make_arms(2)
    for speed in (np.inf, np.nan):
        arms.qvel[1, 3] = speed
        moved = arms.command + 0.1
        broken = arms.step(moved, np.ones(2, bool))
        assert broken.tolist() == [False, True]
        assert all(np.isfinite(array).all() for array in (arms.qpos, arms.qvel, arms.tip_m, arms.gravity_n_m))
        np.testing.assert_array_equal(arms.joint_pos[1], HOME_RAD)
        untouched.qpos[1] = untouched.home["qpos"]
        untouched.start(np.array([1]))
        assert np.abs(arms.command[1] - moved[1]).max() > 0.05
        for name, array in arms._state.items():
            np.testing.assert_array_equal(array[1], untouched._state[name][1], err_msg=name)
        np.testing.assert_array_equal(arms.batch.state[1], untouched.batch.state[1])
        arms.start(np.array([1]))  # the next episode
    for each in (arms, untouched):
        each.qpos[:] = each.home["qpos"]
        each.start(np.arange(2))
        for _ in range(10):
            assert not each.step(each.limit(each.command + 0.01), np.ones(2, bool)).any()
    assert np.abs(arms.joint_pos[1] - HOME_RAD).max() > 0.05
    np.testing.assert_array_equal(arms.joint_pos, untouched.joint_pos)


@pytest.mark.parametrize("firmware_p", [8, 32, 64])
def test_the_servo_gain_is_proportional_to_the_firmware_p(firmware_p):
    """And an arm starts at rest with any of them."""
    arms = Arms(load_model(), HOME_QPOS, 1, firmware_p=firmware_p)
    np.testing.assert_allclose(arms.model.actuator_gainprm[:, 0], GAIN * firmware_p / 32)
    np.testing.assert_allclose(arms.model.actuator_biasprm[:, 1], -GAIN * firmware_p / 32)
    np.testing.assert_allclose(arms.controller.gain, GAIN * firmware_p / 32)
    arms.qpos[:] = arms.home["qpos"]
    arms.start(np.array([0]))
    move(arms, np.zeros((1, ACT_DIM)), 60)
    np.testing.assert_allclose(arms.joint_pos[0], HOME_RAD, atol=2e-3)


def test_arms_start_at_rest_anywhere():
    """Away from home, with drawn servos, offsets and backlash."""
    arms = make_arms(4, servo_gain=0.15, joint_offset_rad=0.02, backlash_rad=(0.0, 0.02), latency_steps=2)
    pose = HOME_RAD + np.array([0.3, -0.4, 0.2, 0.3, -0.5, 0.4])
    arms.qpos[:, :ACT_DIM] = pose
    arms.start(np.arange(4), at_home=False)
    move(arms, np.zeros((4, ACT_DIM)), 60)
    np.testing.assert_allclose(arms.joint_pos, np.tile(pose, (4, 1)), atol=0.01 + 2e-3)  # half of the backlash


def test_ranges():
    """Each range is filled, per joint, and the model of the controller stays nominal."""
    arms = make_arms(300, servo_gain=0.15, servo_damping=0.1, latency_steps=2, joint_offset_rad=0.02,
                     backlash_rad=(0.01, 0.03))  # fmt: skip
    models = [arms.batch.get_model(i) for i in range(300)]
    for get, fraction in ((lambda m: m.actuator_gainprm[:, 0], 0.15), (lambda m: m.dof_damping[:6], 0.1)):
        ratio = np.array([get(m) for m in models]) / get(arms.model)
        assert 1 - fraction <= ratio.min() and ratio.max() <= 1 + fraction
        assert (ratio.min(0) < 1 - 0.9 * fraction).all() and (ratio.max(0) > 1 + 0.9 * fraction).all()
        assert np.abs(np.corrcoef(ratio.T) - np.eye(ACT_DIM)).max() < 0.25
    assert all((m.actuator_biasprm[:, 1] == -m.actuator_gainprm[:, 0]).all() for m in models)
    assert set(arms._latency) == {0, 1, 2}
    assert 0.019 < np.abs(arms.joint_offset).max() <= 0.02 and np.abs(arms.joint_offset.mean(0)).max() < 0.003
    assert 0.01 <= arms._backlash.min() < 0.0105 and 0.0295 < arms._backlash.max() <= 0.03
    np.testing.assert_allclose(arms.joints_rad - arms.joint_pos, arms.joint_offset, atol=1e-12)
    # bounds, not what was drawn; of the backlash no more than is typical
    np.testing.assert_allclose(arms.controller.gain, GAIN)
    assert arms.controller.latency_s == 2 / 30 and arms.controller.window_rad == pytest.approx(0.012 + BACKLASH_RAD / 2)


def test_other_servo_variants_and_tables():
    """One factor for all servos of an arm, known to the command law with an error; an arm is lower on a high table."""
    ranges = {"supply_gain": (0.5, 1.6), "known_gain_error": (0.8, 1.25), "table_height_m": (-0.005, 0.003)}
    arms = make_arms(400, **ranges)
    ratio = np.array([arms.batch.get_model(i).actuator_gainprm[:, 0] for i in range(400)]) / GAIN
    assert (np.ptp(ratio, axis=1) < 1e-12).all()
    assert 0.5 <= ratio.min() < 0.51 and 1.57 < ratio.max() <= 1.6
    assert np.median(ratio) == pytest.approx(np.sqrt(0.5 * 1.6), abs=0.06)  # log-uniform
    error = arms.controller.gain_factor[:, 0] / ratio[:, 0]
    assert 0.8 <= error.min() < 0.81 and 1.23 < error.max() <= 1.25
    np.testing.assert_allclose(arms.controller.gain, GAIN * ratio * error[:, None])

    height = make_arms(1).tip_m[0, 2] - arms.tip_m[:, 2]
    assert -0.005 <= height.min() < -0.0048 and 0.0028 < height.max() <= 0.003
    np.testing.assert_allclose(arms.measured_tip_m[:, 2], arms.tip_m[:, 2] + height, atol=1e-6)


@pytest.mark.parametrize("factor, floor, rises", [(0.5, 1.0, True), (1.0, 0.5, True), (1.0, 1.0, False)])
def test_a_weak_arm_is_raised(factor, floor, rises):
    """With half the gain: if the command law knows it, or allows for it; otherwise the arm sinks."""
    arms = make_arms(supply_gain=(0.5, 0.500001))
    arms.controller.gain_factor, arms.controller.gain_floor = factor, floor
    delta = np.zeros((1, ACT_DIM))
    delta[0, 1] = -0.01  # up
    move(arms, delta, 30)
    assert (arms.joint_pos[0, 1] < HOME_RAD[1] - 0.2) == rises


def test_latency_delays_the_command():
    def joints_after(latency: int, steps: int) -> np.ndarray:
        arms = make_arms(latency_steps=2)
        arms._latency[:] = latency
        delta = np.full((1, ACT_DIM), 0.0014)  # slow enough that no command meets the window around the measured joint
        delta[0, 1] *= -1  # up
        move(arms, delta, steps)
        return arms.joint_pos[0] - HOME_RAD

    np.testing.assert_allclose(joints_after(2, 8), joints_after(0, 6), atol=1e-4)
    assert np.abs(joints_after(0, 8) - joints_after(0, 6)).max() > 0.002


def test_a_servo_does_not_react_within_its_backlash():
    """The wrist, turned forth and back: it follows with half of the backlash on either side."""
    backlash = 0.06
    arms = make_arms(backlash_rad=(backlash, backlash))
    start, tolerance = arms.joint_pos[0, 4].copy(), FRICTION / GAIN + 1e-3
    arms.step(arms.command + np.eye(6)[4] * 0.4 * backlash, np.ones(1, bool))
    move(arms, np.zeros((1, ACT_DIM)), 30)
    assert arms.joint_pos[0, 4] == pytest.approx(start, abs=1e-4)
    positions = []
    for delta in (0.002, -0.002):  # slowly: a fast joint would run through the play
        for _ in range(abs(round(0.2 / delta)) * (1 if delta > 0 else 2)):
            arms.step(arms.command + np.eye(6)[4] * delta, np.ones(1, bool))
        positions.append(arms.joint_pos[0, 4] - arms.command[0, 4])
    lag = backlash / 2 + 0.6 * 0.06 / GAIN  # play, and damping at this speed
    assert positions == [pytest.approx(-lag, abs=tolerance), pytest.approx(lag, abs=tolerance)]


def test_a_joint_with_an_offset_moves_to_where_the_encoder_reads_the_target():
    arms = make_arms(joint_offset_rad=0.05)
    arms.joint_offset[:] = 0.05
    arms.start(np.array([0]))
    start = arms.joint_pos[0, 4].copy()
    move(arms, np.eye(6)[[4]] * 0.01, 20)
    move(arms, np.zeros((1, ACT_DIM)), 30)
    assert arms.joint_pos[0, 4] - start == pytest.approx(0.2, abs=FRICTION / GAIN + 1e-3)
    assert arms.joints_rad[0, 4] == pytest.approx(arms.command[0, 4], abs=FRICTION / GAIN + 1e-3)


def test_a_free_joint_is_as_fast_with_latency_and_with_another_servo():
    """The window around the measured joints bounds the force on an obstacle, not the speed of a moving joint."""

    def travel_rad(joint: int, direction: float, latency: int = 0, gain: float = 1.0) -> float:
        arms = make_arms(latency_steps=2, servo_gain=0.15)
        # as if this had been drawn
        arms._latency[:] = latency
        arms.fields["actuator_gainprm"][:, :, 0] = GAIN * gain
        arms.fields["actuator_biasprm"][:, :, 1] = -GAIN * gain
        arms.start(np.array([0]))
        move(arms, 0.014 * direction * np.eye(6)[[joint]], 30 + latency)
        return direction * (arms.joint_pos[0, joint] - HOME_RAD[joint])

    assert travel_rad(0, 1.0) > 0.3 and travel_rad(0, -1.0) > 0.3
    assert travel_rad(0, 1.0, latency=2) > 0.7 * travel_rad(0, 1.0)
    # upwards, against gravity; a weak servo is slower, but not stuck
    assert travel_rad(1, -1.0, gain=0.85) > 0.7 * travel_rad(1, -1.0)
