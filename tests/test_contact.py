"""Contact physics: a press does not sink, a drag does not slip, nothing tunnels, flies or diverges."""

import dataclasses

import mujoco
import numpy as np
import pytest
from conftest import press_force_n

from so101.base import flat_observation
from so101.pusher import TipPolicy
from so101_env import (
    ACT_DIM,
    COMMAND,
    HOME_RAD,
    OBS,
    SHEET_HALF_THICKNESS_M,
    TAPE_CENTER_M,
    BaseObservation,
    DomainRandomization,
    SO101ResidualVectorEnv,
    load_model,
)
from so101_sim.scene import CONTROL_HZ

FINGER_RADIUS_M = 0.008


class Presser:
    """The arm under Cartesian servo control on its own Jacobian, pressing with a wanted force."""

    def __init__(self):
        self.model = load_model()
        self.data = mujoco.MjData(self.model)
        self.data.qpos[:] = [*HOME_RAD, *TAPE_CENTER_M, SHEET_HALF_THICKNESS_M, 0.0]
        mujoco.mj_forward(self.model, self.data)
        self.data.ctrl[:] = HOME_RAD + self.data.qfrc_bias[:ACT_DIM] / self.model.actuator_gainprm[:, 0]
        self.site = self.model.site("gripperframe").id
        self.fingers = [self.model.geom(name).id for name in ("fixed_finger_col", "moving_finger_col")]

    def press_force_n(self) -> float:
        """Normal force between fingertips and sheet."""
        return press_force_n(self.model, self.data)

    def sink_m(self) -> float:
        """How deep the lower fingertip lies in the sheet's upper surface."""
        lowest = min(self.data.geom_xpos[finger][2] for finger in self.fingers) - FINGER_RADIUS_M
        return self.data.qpos[8] + SHEET_HALF_THICKNESS_M - lowest

    def control_step(self, velocity_m_s: np.ndarray, force_n: float) -> None:
        """Move the tip sideways at a velocity, upright, and its height towards the force, for one control step."""
        jacp, jacr = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, jacp, jacr, self.site)
        jacobian = np.vstack([jacp, 0.05 * jacr])[:, :5]
        error = np.zeros(6)
        error[:2] = velocity_m_s / CONTROL_HZ
        error[2] = np.clip(5e-4 * (self.press_force_n() - force_n), -3e-3, 1e-3)
        self.data.ctrl[:5] += jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-6 * np.eye(6), error)
        for _ in range(8):
            mujoco.mj_step(self.model, self.data)


@pytest.fixture
def pressed():
    presser = Presser()
    for _ in range(2 * CONTROL_HZ):
        presser.control_step(np.zeros(2), force_n=1.0)
    return presser


def test_a_press_of_1_n_does_not_sink(pressed):
    assert pressed.press_force_n() == pytest.approx(1.0, abs=0.05)
    assert pressed.sink_m() < 5e-4
    assert pressed.data.qpos[8] + SHEET_HALF_THICKNESS_M > 0.0005  # nor is the sheet pushed into the table


@pytest.mark.parametrize("direction", [(0.0, 1.0), (0.0, -1.0), (-1.0, 0.0)])
def test_a_drag_of_1_n_at_30_mm_s_does_not_slip(pressed, direction):
    tip, sheet = pressed.data.site_xpos[pressed.site].copy(), pressed.data.qpos[6:8].copy()
    for _ in range(int(1.5 * CONTROL_HZ)):
        pressed.control_step(0.03 * np.array(direction), force_n=1.0)
    tip_way = (pressed.data.site_xpos[pressed.site] - tip)[:2] @ direction
    sheet_way = (pressed.data.qpos[6:8] - sheet) @ direction
    assert tip_way > 0.03
    assert abs(tip_way - sheet_way) < 0.1 * tip_way


@pytest.mark.parametrize("kind", ["random", "saturated"])
def test_physics_stays_sane_for_10000_steps(kind):
    envs = SO101ResidualVectorEnv(8)
    finger_height = envs.arms.geom_xpos_m[:, envs.model.geom("fixed_finger_col").id, 2]
    envs.reset(seed=3)
    rng = np.random.default_rng(0)
    actions = np.zeros((8, ACT_DIM))
    moved = 0.0
    for step in range(10_000 // 8):
        if kind == "random":
            actions = rng.uniform(-1, 1, (8, ACT_DIM))
        elif step % 50 == 0:  # full deflection, held long enough to press, fold and sweep at full strength
            actions = rng.choice([-1.0, 1.0], (8, ACT_DIM))
        before = envs.qpos[:, 6:8]
        _, reward, terminated, truncated, info = envs.step(actions)
        assert not info["non_finite"].any() and np.isfinite(reward).all()
        running = ~(terminated | truncated)
        if not running.any():
            continue
        assert np.abs(envs.qpos[:, 8] - SHEET_HALF_THICKNESS_M)[running].max() < 2e-3  # neither tunnels nor lifts
        speed = np.linalg.norm(envs.qpos[:, 6:8] - before, axis=1)[running].max() * CONTROL_HZ
        assert speed < 1.0, f"the sheet flies at {speed:.2f} m/s"
        moved = max(moved, speed)
        assert finger_height[running].min() > FINGER_RADIUS_M - 2e-3  # the finger stays above the table
    assert moved > 0.01  # the test did touch the sheet


def table_forces(envs: SO101ResidualVectorEnv) -> tuple[float, np.ndarray]:
    """Force with which the table carries the sheet, N, and its centre of pressure (2,), m."""
    data, wrench = envs.arms.batch.get_data(0, mujoco.MjData(envs.model)), np.zeros(6)
    model, points, forces = envs.model, [], []
    sheet = [i for i in range(model.ngeom) if model.geom(i).name in ("sheet_col", "fixed_spot_col", "moving_spot_col")]
    model.geom_pos[:] = envs.arms.fields["geom_pos"][0] if "geom_pos" in envs.arms.fields else model.geom_pos
    mujoco.mj_forward(model, data)
    table = model.geom("table").id
    for i, contact in enumerate(data.contact[: data.ncon]):
        if table in (contact.geom1, contact.geom2) and {contact.geom1, contact.geom2} & {*sheet}:
            mujoco.mj_contactForce(model, data, i, wrench)
            points.append(contact.pos[:2])
            forces.append(wrench[0])
    return sum(forces), np.average(points, axis=0, weights=forces)


class Press(TipPolicy):
    """Presses on what is below the tip, and turns the wrist."""

    def __init__(self, turn_rad: float = 0.0):
        super().__init__()
        self.turn_rad = turn_rad

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        flat = flat_observation(obs).astype(np.float64)
        pressing = flat[:, OBS["tip_pos"]][:, 2] < self.CONTACT_M
        rise = np.where(pressing, 0.0, -self.SINK_M)
        delta = self.move_tip(flat, obs[COMMAND], self.tip_jacobian(flat), np.zeros((1, 2)), rise, pressing)
        delta[:, 4] += self.turn_rad * pressing
        return delta


def press(limp: bool, sheet_xy_m: np.ndarray, turn_rad: float = 0.0) -> SO101ResidualVectorEnv:
    """An environment in which the tip has pressed from home for two seconds."""
    randomization = dataclasses.replace(DomainRandomization.nominal(), limp_sheet=limp)
    envs = SO101ResidualVectorEnv(1, Press(turn_rad), tape_margin=0.001, randomization=randomization, num_threads=1)
    envs.reset(seed=0, options={"qpos": np.array([[*HOME_RAD, *sheet_xy_m, SHEET_HALF_THICKNESS_M, 0.0]])})
    for _ in range(2 * CONTROL_HZ):
        envs.step(np.zeros((1, ACT_DIM)))
    return envs


@pytest.mark.parametrize("limp", [False, True])
def test_where_the_table_carries_a_press(limp):
    """Below the fingertip that presses if the sheet is limp, else at the sheet's centre, wherever the fingertip is."""
    envs = press(limp, TAPE_CENTER_M + (0.03, 0.06))
    force, center = table_forces(envs)
    fingers = [envs.model.geom(f"{name}_finger_col").id for name in ("fixed", "moving")]
    tips = envs.arms.geom_xpos_m[0, fingers]
    finger, sheet = tips[tips[:, 2].argmin(), :2], envs.qpos[0, 6:8]
    assert 0.4 < force < 1.0 and np.linalg.norm(finger - sheet) > 0.05
    assert np.linalg.norm(center - (finger if limp else sheet)) < 0.003


def test_a_turning_fingertip_turns_a_limp_sheet():
    """By torsion. Without torsion, a point contact that turns does not turn the sheet."""
    turned = {limp: press(limp, TAPE_CENTER_M + (0.002, 0.0), turn_rad=0.004) for limp in (False, True)}
    wrist = {limp: envs.qpos[0, 4] - HOME_RAD[4] for limp, envs in turned.items()}
    sheet = {limp: envs.qpos[0, 9] for limp, envs in turned.items()}
    assert min(wrist.values()) > 0.15 and abs(sheet[False]) < 0.02
    assert 0.05 < sheet[True] < wrist[True]
