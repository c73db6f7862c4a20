"""A task of a few lines on so101_sim: raise the fingertip next to a puck. For tests of the simulation alone."""

from typing import Any

import mujoco
import numpy as np

from so101_sim.batch import ArmRandomization, Arms
from so101_sim.scene import load_spec
from so101_sim.vector import ArmEnv, ArmVectorEnv, Part

# gripper down, its tip 17 mm above the table
HOME_RAD = np.array([0.0, 0.4759, -0.2335, 1.3284, 0.0470, 0.0])
HOME_QPOS = np.array([*HOME_RAD, 0.35, 0.1])
RAISED_M = 0.025  # height of the tip at which an episode succeeds
MAX_DELTA_RAD = 0.014
SCENE = """
<mujoco>
  <include file="so101.xml"/>
  <include file="table.xml"/>
  <worldbody>
    <body name="puck" pos="0 0 .01">
      <joint name="puck_x" type="slide" axis="1 0 0"/>
      <joint name="puck_y" type="slide" axis="0 1 0"/>
      <geom name="puck" type="cylinder" size=".02 .01" mass=".02" rgba="1 0 0 1" group="0"/>
    </body>
  </worldbody>
</mujoco>
"""


def load_model() -> mujoco.MjModel:
    return load_spec(SCENE).compile()


class SmallVectorEnv(ArmVectorEnv):
    parts = {
        "joint_pos": Part(tuple("abcdef"), HOME_RAD, 0.3, 1),
        "puck": Part(("puck.x", "puck.y"), 0.0, 0.1, 1),
        "tip_z": Part(("tip.z",), 0.0, 0.1, 1),
    }

    def __init__(
        self,
        num_envs: int = 1,
        ranges: ArmRandomization | None = None,
        max_episode_steps: int = 25,
        num_threads: int | None = None,
        **options: Any,
    ):
        arms = Arms(load_model(), HOME_QPOS, num_envs, ranges, num_threads=num_threads)
        super().__init__(arms, max_episode_steps, measured=("joint_pos", "tip_z"), **options)

    def draw_qpos(self, rng):
        qpos = self.arms.home["qpos"].copy()
        qpos[6:8] += rng.uniform(-0.05, 0.05, 2)
        return qpos

    def scene(self):
        return self.arms.tip_m[:, 2].copy()

    def observe(self, mask, scene):
        return np.column_stack([self.arms.joints_rad, self.arms.qpos[:, 6:8], scene])

    def joint_targets(self, action, active):
        return self.arms.limit(self.arms.command + MAX_DELTA_RAD * action)

    def judge(self, scene, action, active, broken):
        success = active & (scene > RAISED_M)
        return (scene - RAISED_M) * active, success | broken, {"is_success": success, "non_finite": broken}

    def describe(self, scene):
        return {"height_m": scene, "summary": {"length": self.steps}}

    def blank_results(self):
        return {name: np.zeros(self.num_envs, bool) for name in ("is_success", "non_finite")}


class SmallEnv(ArmEnv):
    vector_env = SmallVectorEnv
