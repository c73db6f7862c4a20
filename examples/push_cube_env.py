"""Push a cube: an SO-101 arm pushes a 30 mm cube over the table to a marked spot. An example of a task of your own.

docs/own_task.md walks through it. Frame: x straight ahead of the arm, y to the left, z up from the table. SI units.
"""

import dataclasses
from pathlib import Path

import numpy as np

from so101_sim.batch import Arms
from so101_sim.control import JOINTS
from so101_sim.errors import check_ranges, require
from so101_sim.scene import load_spec
from so101_sim.vector import ArmVectorEnv, Part

MAX_EPISODE_STEPS = 400
SPOT_M = np.array([0.27, 0.0, 0.015])  # where the cube's centre should be
SUCCESS_M, SUCCESS_STEPS = 0.015, 5  # success: this close to the spot in so many control steps in a row
START_M = (0.05, 0.10)  # distance of the cube from the spot at the start, in any direction
PAN_AXIS_M, REACH_M = np.array([0.0388353, 0.0]), 0.39  # no finger gets behind a cube farther from the pan axis
PAIRS, FRICTION = ("cube_table", "fixed_finger_cube", "moving_finger_cube"), 0.2  # randomised by this fraction
# gripper down and closed, both fingers in the arm's plane of symmetry, their tips over the spot and 12 mm up
HOME_RAD = np.array([0.0, 0.372, -0.079, 1.242, 0.047, -0.1])
PUSH_M, PUSH_HEIGHT_M = 0.042, 0.019  # the tip pushes from this far behind the cube's centre, and at this height
SHAPING_PER_M = 100.0  # potential per m that tip and cube still have to go

# names of the components; mean and scale for the networks; signs in the left-right mirror image
JOINT_MIRROR, XYZ_MIRROR = (-1, 1, 1, 1, -1, 1), (1, -1, 1)
OBSERVATION = {
    "joint_pos": Part(tuple(f"{joint}.pos" for joint in JOINTS), HOME_RAD, 0.3, JOINT_MIRROR),  # rad
    "joint_vel": Part(tuple(f"{joint}.vel" for joint in JOINTS), 0.0, 0.5, JOINT_MIRROR),  # rad/s
    "tip": Part(("tip.x", "tip.y", "tip.z"), SPOT_M, (0.1, 0.1, 0.02), XYZ_MIRROR),  # m, midway between the fingertips
    "cube": Part(("cube.x", "cube.y", "cube.z"), SPOT_M, (0.1, 0.1, 0.02), XYZ_MIRROR),  # m
    "spot_minus_cube": Part(("spot_minus_cube.x", "spot_minus_cube.y"), 0.0, 0.1, (1, -1)),  # m
    # where the tip is around the cube: distance, m, and angle, 0 if the cube is between tip and spot
    "around": Part(("around.distance", "around.cos", "around.sin"), (PUSH_M, 0, 0), (0.02, 1, 1), (1, 1, -1)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The settings of the task: arguments of the environment, and flags of the trainer."""

    step_rad: float = 0.03
    """joint delta in rad per control step of an action of 1"""
    randomize: bool = True
    """randomise the friction of table and fingers in every episode"""

    RANGES = {"step_rad": (1e-6, 1.0)}  # no type hint: not a field, so not a flag


class PushCubeVectorEnv(ArmVectorEnv):
    """N arms at the task. The arguments are those that the trainer passes, and options of ArmVectorEnv."""

    parts, metrics, base_policy = OBSERVATION, ("distance_m",), None
    goal_xy_m, goal_half_m = SPOT_M[:2], (SUCCESS_M, SUCCESS_M)
    _STATE = (*ArmVectorEnv._STATE, "_streak", "_return", "_norms", "_phi")

    def __init__(
        self, num_envs=8, base_policy=None, task=None, max_episode_steps=MAX_EPISODE_STEPS, shaping_gamma=None,
        observe_base=False, num_threads=None, **options,
    ):  # fmt: skip
        require(base_policy is None, "base_policy", type(base_policy).__name__, "zero: no other knows this task")
        self.task, self.shaping_gamma = task or Task(), shaping_gamma
        check_ranges(self.task, self.task.RANGES)
        spec = load_spec(Path(__file__).with_name("push_cube.xml").read_text())
        spec.geom("spot").pos = [*SPOT_M[:2], 0.0002]
        model, home_qpos = spec.compile(), [*HOME_RAD, *SPOT_M + [0.0, 0.1, 0.0], 1.0, 0.0, 0.0, 0.0]
        arms = Arms(model, home_qpos, num_envs, resampled=("pair_friction",), num_threads=num_threads)
        super().__init__(arms, max_episode_steps, **options)
        self._tips = [model.geom(name).id for name in ("fixed_finger_col", "moving_finger_col")]
        self._pairs = [model.pair(name).id for name in PAIRS]  # by name: the compiler sorts them
        # consecutive steps at the spot, return and sum of action norms of the episode so far; potential of the state
        self._streak, self._return, self._norms, self._phi = np.zeros((4, num_envs))

    def draw_qpos(self, rng):
        """Start positions (13,): the cube at a random place around the spot, turned by a random angle."""
        distance, (direction, yaw) = rng.uniform(*START_M), rng.uniform(-np.pi, np.pi, 2)
        x, y, z = SPOT_M + distance * np.array([np.cos(direction), np.sin(direction), 0.0])
        return [*HOME_RAD, x, y, z, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]

    def resample(self, i, rng):
        """Draw the friction of environment i."""
        factors = 1 + self.task.randomize * FRICTION * rng.uniform(-1, 1, (len(PAIRS), 1))
        self.arms.fields["pair_friction"][i, self._pairs, :2] = self.model.pair_friction[self._pairs, :2] * factors

    def scene(self):
        """The true state now, (N, ...) each: the parts of the observation, and how far tip and cube have to go."""
        arms, cube = self.arms, self.arms.qpos[:, 6:9]
        tip = arms.geom_xpos_m[:, self._tips].mean(1)
        away, behind = (each[:, 0] + 1j * each[:, 1] for each in (tip - cube, cube - SPOT_M))  # as complex numbers
        distance, angle = np.abs(away), np.angle(away * behind.conj())
        around = [distance - PUSH_M, PUSH_M * angle, np.maximum(tip[:, 2] - PUSH_HEIGHT_M, 0.0)]
        return {
            "joint_pos": arms.joints_rad, "joint_vel": arms.joint_vel, "tip": tip, "cube": cube,
            "spot_minus_cube": (SPOT_M - cube)[:, :2],
            "around": np.column_stack([distance, np.cos(angle), np.sin(angle)]),
            "way_m": np.abs(around).sum(0), "distance_m": np.linalg.norm(cube - SPOT_M, axis=1),
        }  # fmt: skip

    def observe(self, mask, scene):
        """Observations (N, 23)."""
        return np.column_stack([scene[part] for part in OBSERVATION])

    def joint_targets(self, action, active):
        """Joint targets (N, 6), rad: the last ones plus a step, within the limits of the command law."""
        return self.arms.limit(self.arms.command + self.task.step_rad * action)

    def reward_terms(self, scene, success, failure):
        """The terms of the reward by name, (N,) each, without the shaping."""
        terms = {"distance": -2.0 * scene["distance_m"], "way": -scene["way_m"]}
        # a failure costs as much as waiting for the time-out: pushing the cube away never pays
        waiting = sum(terms.values()) * (self.max_episode_steps - self._steps)
        return terms | {"success": 10.0 * success, "failure": failure * waiting}

    def potential(self, scene):
        """Shaping potential (N,): the less way tip and cube have to go, the higher; at most 0."""
        return -SHAPING_PER_M * (scene["way_m"] + scene["distance_m"])

    def judge(self, scene, action, active, broken):
        """Reward (N,), terminated (N,), and the info of a step."""
        self._streak = (self._streak + active) * ((scene["distance_m"] < SUCCESS_M) & ~broken)
        far = np.linalg.norm(scene["cube"][:, :2] - PAN_AXIS_M, axis=1) > REACH_M
        success, failure = active & (self._streak >= SUCCESS_STEPS), active & (broken | far)
        terms, terminated = self.reward_terms(scene, success, failure), success | failure
        self._return += sum(terms.values()) * active
        self._norms += np.linalg.norm(action, axis=1) * active
        before, self._phi = self._phi, self.potential(scene)
        if self.shaping_gamma is not None:  # zero at terminal states: only then is the optimal policy unchanged
            terms["shaping"] = self.shaping_gamma * self._phi * ~terminated - before
        terms = {name: term * active for name, term in terms.items()}
        results = {"is_success": success, "non_finite": broken, "out_of_reach": failure & ~broken}
        return sum(terms.values()), terminated, results | {"reward_terms": terms}

    def blank_results(self):
        """The info of `judge` for episodes that have no steps yet."""
        nobody = np.zeros(self.num_envs, bool)
        return self.judge(self.scene(), np.zeros((self.num_envs, len(JOINTS))), nobody, nobody)[2]

    def describe(self, scene):
        """The info that describes the state and the episode so far."""
        summary = {"return": self._return.copy(), "length": self.steps}
        summary |= {"residual_magnitude": self._norms / np.maximum(self._steps, 1)}
        return {"distance_m": scene["distance_m"], "episode_summary": summary}

    def begin(self, ids, scene):
        """Forget the last episodes of the environments ids."""
        self._streak[ids] = self._return[ids] = self._norms[ids] = 0.0
        self._phi[ids] = self.potential(scene)[ids]
