"""Names of GR00T's datasets and servers."""

JOINT_GROUPS = {"single_arm": slice(0, 5), "gripper": slice(5, 6)}  # of state and action, in the order of the joints
