"""The package that LeRobot discovers. Importing it registers the environment and the robot."""

from lerobot_env_so101_residual import PaperInSquareConfig, SO101ResidualSim, SO101ResidualSimConfig

__all__ = ["PaperInSquareConfig", "SO101ResidualSim", "SO101ResidualSimConfig"]
