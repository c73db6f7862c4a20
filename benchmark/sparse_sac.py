"""SAC with a sparse reward: 10 for success, 0.01 lost per step, nothing else. All flags are those of so101.sac.

python benchmark/sparse_sac.py --total-timesteps 5000 --no-shaping
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101 import sac
from so101.cli import run_script
from so101_env import Scene, SO101ResidualVectorEnv


class SparseEnv(SO101ResidualVectorEnv):
    """The task with this reward. The evaluation uses the task's own, which only its mean return depends on."""

    def reward_terms(
        self, scene: Scene, residual: np.ndarray, success: np.ndarray, failure: np.ndarray
    ) -> dict[str, np.ndarray]:
        """See SO101ResidualVectorEnv."""
        return {"time": np.full(self.num_envs, -0.01), "success": 10.0 * success}


if __name__ == "__main__":
    sac.SO101ResidualVectorEnv = SparseEnv
    sys.exit(run_script(sac.main))
