"""Simulation of SO-101 arms in MuJoCo: scenes, servos, the command law, batched physics, Gymnasium environments.

Nothing here knows a task: so101_env.py and examples/push_cube_env.py are two tasks that are built on it.
"""
