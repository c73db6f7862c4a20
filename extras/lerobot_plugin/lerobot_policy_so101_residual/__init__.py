"""The package that LeRobot discovers. Importing it registers the policy, the environment and the robot."""

from lerobot_env_so101_residual import PaperInSquareConfig, SO101ResidualSim, SO101ResidualSimConfig

from lerobot_policy_so101_residual.configuration_so101_residual import SO101ResidualConfig

__all__ = ["PaperInSquareConfig", "SO101ResidualConfig", "SO101ResidualSim", "SO101ResidualSimConfig"]
