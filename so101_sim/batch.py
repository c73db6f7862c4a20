"""Physics of N arms, each in its own copy of a scene, stepped together on MuJoCo's thread pool."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import mujoco
import mujoco.batch
import numpy as np

from so101_sim.control import ACT_DIM, BACKLASH_RAD, FIRMWARE_P, LEARNED_GAIN_FLOOR, Controller, clamp
from so101_sim.errors import SO101Error, check_arrays
from so101_sim.scene import CONTROL_HZ

SETTLE_STEPS = 100  # physics steps in which objects come to rest at the start
# makes positions and gravity torques current after a step
STAGE = mujoco.mjtStage.mjSTAGE_VEL.value


@dataclasses.dataclass(frozen=True)
class ArmRandomization:
    """What is resampled every episode of an arm. A fraction f means uniform in nominal x [1 - f, 1 + f]."""

    servo_gain: float = 0.0
    """fraction, proportional gain, sampled per joint"""
    servo_damping: float = 0.0
    """fraction, joint damping, sampled per joint"""
    latency_steps: int = 0
    """a command takes effect 0 to this many control steps late (integer, fixed within an episode)"""
    joint_offset_rad: float = 0.0
    """calibration error of the joint encoders, sampled per joint, uniform in +- this"""
    backlash_rad: tuple[float, float] = (0.0, 0.0)
    """play before the servo reacts; sampled per joint, uniformly between these bounds"""
    supply_gain: tuple[float, float] = (1.0, 1.0)
    """factor of the gain of all servos of an arm, log-uniform between these: servo variant and supply voltage"""
    known_gain_error: tuple[float, float] = (1.0, 1.0)
    """factor by which what the command law knows of that gain is off, log-uniform: it is measured, see `learn_gain`"""
    table_height_m: tuple[float, float] = (0.0, 0.0)
    """height of the table above the plane that the arm is mounted on, uniform between these"""


# ranges of an arm that is the model's but for wear and tolerances, and of arms that somebody has built from a kit
FULL_ARM: dict[str, Any] = {
    "servo_gain": 0.15, "servo_damping": 0.15, "latency_steps": 2, "joint_offset_rad": float(np.deg2rad(1.0)),
    "backlash_rad": (0.0, BACKLASH_RAD),
}  # fmt: skip
KIT_ARM: dict[str, Any] = FULL_ARM | {
    "supply_gain": (0.5, 1.6), "known_gain_error": (0.85, 1.18), "table_height_m": (-0.005, 0.005),
    "joint_offset_rad": float(np.deg2rad(3.0)), "backlash_rad": (0.0, 2 * BACKLASH_RAD),
}  # fmt: skip


def log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A factor between two bounds, uniform on a logarithmic scale. Equal bounds draw nothing from the generator."""
    low, high = bounds
    return low if low == high else float(np.exp(rng.uniform(np.log(low), np.log(high))))


class Arms:
    """N arms at the same task. Joints come first in qpos; the task's own positions follow.

    Args:
        model: the scene, from here on owned by this object.
        home_qpos: (nq,) a state near rest; an episode starts with the joints at home_qpos[:6].
        num_arms: N.
        ranges: what `resample` draws.
        firmware_p: P coefficient of the servos, to which their gain is proportional.
        resampled: further fields of the model that differ between the arms; the task writes them in `fields`.
        num_threads: physics threads; None uses every core, at most one per arm. No result depends on it.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        home_qpos: np.ndarray,
        num_arms: int,
        ranges: ArmRandomization | None = None,
        firmware_p: int = FIRMWARE_P,
        resampled: tuple[str, ...] = (),
        num_threads: int | None = None,
    ):
        self.model, self.num_arms, self.ranges = model, num_arms, ranges or ArmRandomization()
        ranges = self.ranges
        # it gets what is known of a real arm: bounds on backlash and latency, not what is drawn for an episode; and it
        # assumes no more than typical backlash, because the window, and with it a finger's force, grows with it
        latency_s, backlash_rad = ranges.latency_steps / CONTROL_HZ, min(ranges.backlash_rad[1], BACKLASH_RAD)
        self.controller = Controller(model, firmware_p, backlash_rad, latency_s)
        for parameter in (model.actuator_gainprm[:, 0], model.actuator_biasprm[:, 1]):
            parameter *= firmware_p / FIRMWARE_P
        threads = min(num_threads or os.cpu_count() or 1, num_arms)
        # one state row per arm (warm start included) and per-arm copies of the fields below; persistent: a step goes on
        # from the quantities that were made current after the last one
        self.batch = mujoco.batch.Batch(model, nsim=num_arms, nthread=threads, persistent=True)
        self.substeps = round(1 / CONTROL_HZ / model.opt.timestep)
        self.qpos, self.qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))  # views
        self.geom_xpos_m = self.batch.bind("geom_xpos")  # (N, ngeom, 3)
        self.tip_m = self.batch.bind("site_xpos")[:, model.site("gripperframe").id]  # (N, 3)
        self.gravity_n_m = self.batch.bind("qfrc_bias")[:, :ACT_DIM]  # torque that holds the joints at rest, (N, 6)
        self.joint_pos, self.joint_vel = self.qpos[:, :ACT_DIM], self.qvel[:, :ACT_DIM]  # true, rad and rad/s
        self.home = self._settle(np.asarray(home_qpos, np.float64))
        names = list(resampled)
        gains = ranges.servo_gain or ranges.supply_gain != (1.0, 1.0)
        names += ["actuator_gainprm", "actuator_biasprm"] if gains else []
        names += ["body_pos"] if any(ranges.table_height_m) else []
        names += ["dof_damping"] if ranges.servo_damping else []
        self.fields = {name: self.batch.expand(name) for name in names}
        nominal_gain = np.broadcast_to(model.actuator_gainprm[:, 0], (num_arms, ACT_DIM))
        # (N, 6), N m/rad; a view where it is resampled
        self.gain = self.fields["actuator_gainprm"][:, :, 0] if gains else nominal_gain
        # with the state rows and the resampled fields, these arrays are the whole state: see get_state
        self._state = {
            "command": np.zeros((num_arms, ACT_DIM)),  # last commanded joint targets, rad, in encoder coordinates
            "delayed": np.zeros((num_arms, ranges.latency_steps + 1, ACT_DIM)),  # last commands, newest first
            "latency": np.zeros(num_arms, np.int64),  # control steps
            "joint_offset": np.zeros((num_arms, ACT_DIM)),  # encoder minus true position, rad
            "backlash": np.zeros((num_arms, ACT_DIM)),  # rad
            "known_gain": np.ones((num_arms, 1)),  # factor of the servo gain, as far as the command law knows it
            "table_height": np.zeros(num_arms),  # m, above the plane that the arm is mounted on
        }
        self.command, self._delayed, self._latency, self.joint_offset, self._backlash, *_ = self._state.values()
        if ranges.supply_gain[0] != ranges.supply_gain[1]:
            self.controller.gain_factor = self._state["known_gain"]
            self.controller.gain_floor = LEARNED_GAIN_FLOOR

    def _settle(self, home_qpos: np.ndarray) -> dict[str, np.ndarray]:
        """Nominal resting state: joints at home, servo targets raised by gravity sag, objects settled on the table."""
        data, home_rad = mujoco.MjData(self.model), home_qpos[:ACT_DIM]
        data.qpos[:] = home_qpos
        mujoco.mj_forward(self.model, data)
        data.ctrl[:] = home_rad + data.qfrc_bias[:ACT_DIM] / self.model.actuator_gainprm[:, 0]
        for _ in range(SETTLE_STEPS):
            mujoco.mj_step(self.model, data)
        data.qpos[:ACT_DIM] = home_rad
        return {
            "qpos": data.qpos.copy(), "warmstart": data.qacc_warmstart.copy(), "torque": data.qfrc_bias[:ACT_DIM].copy()
        }  # fmt: skip

    @property
    def joints_rad(self) -> np.ndarray:
        """Joint positions (N, 6), rad, as the encoders measure them."""
        return self.joint_pos + self.joint_offset

    @property
    def measured_tip_m(self) -> np.ndarray:
        """Gripper tips (N, 3) float32, m, as an arm computes them from its encoders, as if the table were at height 0.

        To first order, the Jacobian carries the encoders' errors over.
        """
        tip = self.tip_m.astype(np.float32)
        if self.ranges.joint_offset_rad:
            jacobian, _ = self.batch.jac(int(self.model.site("gripperframe").bodyid[0]), self.tip_m)
            tip += np.einsum("nij,nj->ni", jacobian[:, :, :ACT_DIM], self.joint_offset)
        if any(self.ranges.table_height_m):
            tip[:, 2] += self._state["table_height"]
        return tip

    @property
    def load(self) -> np.ndarray:
        """Load (N, 6) float32 on each joint, rad, as far as an arm knows it, see Controller.load."""
        return self.controller.load(self.command, self.joints_rad, self.joint_vel, self.gravity_n_m)

    def limit(self, target_rad: np.ndarray) -> np.ndarray:
        """Wanted joint targets (N, 6), rad in encoder coordinates, clipped by the command law."""
        return self.controller.limit(target_rad, self.joints_rad, self.joint_vel, self.gravity_n_m)

    def resample(self, i: int, rng: np.random.Generator) -> None:
        """Draw what ArmRandomization describes for arm i."""
        ranges, model = self.ranges, self.model
        if "actuator_gainprm" in self.fields:
            gain = model.actuator_gainprm[:, 0] * (1.0 + ranges.servo_gain * rng.uniform(-1.0, 1.0, ACT_DIM))
            self.fields["actuator_gainprm"][i, :, 0] = gain
            self.fields["actuator_biasprm"][i, :, 1] = -gain
        if "dof_damping" in self.fields:
            factor = 1.0 + ranges.servo_damping * rng.uniform(-1.0, 1.0, ACT_DIM)
            self.fields["dof_damping"][i, :ACT_DIM] = model.dof_damping[:ACT_DIM] * factor
        self._latency[i] = rng.integers(ranges.latency_steps + 1) if ranges.latency_steps else 0
        if ranges.joint_offset_rad:
            self.joint_offset[i] = ranges.joint_offset_rad * rng.uniform(-1.0, 1.0, ACT_DIM)
        if ranges.backlash_rad[1]:
            self._backlash[i] = rng.uniform(*ranges.backlash_rad, ACT_DIM)
        if ranges.supply_gain != (1.0, 1.0):
            factor = log_uniform(rng, ranges.supply_gain)
            self.fields["actuator_gainprm"][i, :, 0] *= factor
            self.fields["actuator_biasprm"][i, :, 1] *= factor
            self._state["known_gain"][i] = factor * log_uniform(rng, ranges.known_gain_error)
        if any(ranges.table_height_m):  # the arm is shifted instead of the table
            height_m, base = rng.uniform(*ranges.table_height_m), model.body("base").id
            self.fields["body_pos"][i, base, 2] = model.body_pos[base, 2] - height_m
            self._state["table_height"][i] = height_m

    def start(self, ids: np.ndarray, at_home: bool = True) -> None:
        """Put the arms ids at rest at their qpos, which have been written before.

        With at_home the joints are at home_qpos[:6]; servo targets are then those of the settled resting state.
        """
        if at_home:
            self._ctrl[ids] = self.home["qpos"][:ACT_DIM] + self.home["torque"] / self.gain[ids]
        if "body_mass" in self.fields:
            self.batch.set_const(ids)
        self.qvel[ids] = 0.0
        self.batch.bind("time")[ids] = 0.0
        self.batch.bind("qacc_warmstart")[ids] = self.home["warmstart"]
        self.batch.forward(ids, stage=STAGE)
        if not at_home:
            self._ctrl[ids] = self.joint_pos[ids] + self.gravity_n_m[ids] / self.gain[ids]
        self.command[ids] = self._ctrl[ids] + self.joint_offset[ids]
        self._delayed[ids] = self.command[ids][:, None]

    def step(self, command_rad: np.ndarray, active: np.ndarray) -> np.ndarray:
        """One control step of the arms in active, (N,) bool: their servos track command_rad (N, 6).

        Returns which arms diverged, (N,) bool. A diverged arm is put back to rest at home, as by `start`.
        """
        rows, ids = _rows_and_ids(active)
        self.command[rows] = command_rad[rows]
        if self.ranges.latency_steps:
            self._delayed[rows] = np.concatenate([command_rad[:, None], self._delayed[:, :-1]], axis=1)[rows]
            command_rad = self._delayed[np.arange(self.num_arms), self._latency]
        if self.ranges.backlash_rad[1]:
            for _ in range(self.substeps):
                self.substep(command_rad, active)
        else:
            self._ctrl[rows] = (command_rad - self.joint_offset)[rows]
            self.batch.step(ids, nstep=self.substeps, stage=STAGE)
        broken = active & ~np.isfinite(self.batch.state).all(1)
        if broken.any():
            self.qpos[broken] = self.home["qpos"]
            self.start(np.flatnonzero(broken))
        return broken

    def substep(
        self,
        command_rad: np.ndarray,
        active: np.ndarray,
        strength: np.ndarray | None = None,
        max_torque_n_m: np.ndarray | None = None,
    ) -> None:
        """One physics step with backlash: servos of the arms in active, (N,) bool, track command_rad (N, 6).

        A servo does not react to the part of its error that is within the backlash. No latency is simulated here.

        Args:
            command_rad: in encoder coordinates.
            active: the arms that are stepped.
            strength: factor on the servo gain, (N, 6); a servo with 0 is limp. None: 1.
            max_torque_n_m: limit on the torque of each servo, (N, 6), below that of the model. None: none.
        """
        rows, ids = _rows_and_ids(active)
        error = command_rad - self.joint_offset - self.joint_pos
        felt = error - clamp(error, -self._backlash / 2, self._backlash / 2)
        if strength is not None:
            felt = felt * strength
        if max_torque_n_m is not None:
            largest = max_torque_n_m / self.gain
            felt = clamp(felt, -largest, largest)
        self._ctrl[rows] = (self.joint_pos + felt)[rows]
        self.batch.step(ids, nstep=1, stage=STAGE)

    # -- saving and restoring

    def get_state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as arrays."""
        return {
            "batch": self.batch.state.copy(),
            "fields": {name: array.copy() for name, array in self.fields.items()},
            **{name: array.copy() for name, array in self._state.items()},
        }

    def check_state(self, state: Any) -> None:
        """Raise SO101Error if a state does not fit these arms."""
        if not isinstance(state, Mapping) or not isinstance(state.get("fields"), Mapping):
            raise SO101Error("state of the environments: arms or their fields are missing")
        if state.keys() != {"batch", "fields", *self._state} or state["fields"].keys() != self.fields.keys():
            raise SO101Error("state of the environments: arms or their fields have other names")
        check_arrays({"batch": self.batch.state, **self._state}, state)
        check_arrays(self.fields, state["fields"])
        if (state["known_gain"] <= 0).any() or (state["backlash"] < 0).any():
            raise SO101Error("state of the environments: known_gain or backlash has impossible numbers")
        if state["latency"].max() > self.ranges.latency_steps:
            raise SO101Error("state of the environments: a latency is longer than any that is drawn")

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where get_state was called, from a state that check_state accepts."""
        self.batch.state[...] = state["batch"]
        for name, array in self._state.items():
            array[...] = state[name]
        for name, array in self.fields.items():
            array[:] = state["fields"][name]
        if "body_mass" in self.fields:
            self.batch.set_const()
        self.batch.forward(stage=STAGE)


def is_like(given: Any, own: np.ndarray) -> bool:
    """Whether a value is an array of the same shape, and of the same kind of numbers, as the own one."""
    return isinstance(given, np.ndarray) and given.shape == own.shape and given.dtype.kind == own.dtype.kind


def _rows_and_ids(active: np.ndarray) -> tuple[Any, np.ndarray | None]:
    """Index of the rows, and ids for mujoco.batch, of the arms in active, (N,) bool; both are cheaper if it is all."""
    return (slice(None), None) if active.all() else (active, np.flatnonzero(active))
