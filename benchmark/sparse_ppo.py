"""PPO with a sparse reward: 10 for success, 0.01 lost per step, nothing else. All flags are those of the trainer.

python benchmark/sparse_ppo.py --total-timesteps 50000 --no-shaping
"""

import sys

from sparse_sac import SparseEnv  # also puts the root on the path

import ppo_residual_so101 as ppo
from so101.cli import run_script

if __name__ == "__main__":
    ppo.SO101ResidualVectorEnv = SparseEnv
    sys.exit(run_script(ppo.main))
