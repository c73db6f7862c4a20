"""Paper in square for LeRobot's environment hub: make_env("NAME/REPOSITORY", trust_remote_code=True).

The environment itself is in the installed plug-in, whose version decides about physics and observations.
"""

import gymnasium as gym
from lerobot_env_so101_residual import PaperInSquareConfig


def make_env(
    n_envs: int = 1, use_async_envs: bool = False, cfg: object = None
) -> dict[str, dict[int, gym.vector.VectorEnv]]:
    """Vector environments as LeRobot expects them: by name of the suite, and number of the task.

    Args:
        n_envs: number of arms.
        use_async_envs: one process for each arm.
        cfg: LeRobot's configuration of an environment from the hub, which has no setting of this one.
    """
    from lerobot.envs.factory import make_env as make

    return make(PaperInSquareConfig(), n_envs=n_envs, use_async_envs=use_async_envs)
