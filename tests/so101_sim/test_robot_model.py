"""The arm's model against the official SO-101 model's kinematics, masses and gravity torques."""

import mujoco
import numpy as np
import pytest
from conftest import ROOT
from small_task import load_model

from so101_sim.control import ACT_DIM, JOINTS

REFERENCE = ROOT / "tests" / "data" / "so101_fk_reference.npz"  # its array "source" names the official file


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_joint_names_order_and_limits(model, reference):
    assert [model.joint(i).name for i in range(ACT_DIM)] == list(reference["joint_names"]) == list(JOINTS)
    assert [model.actuator(i).name for i in range(model.nu)] == list(JOINTS)
    # the spec rounds the limits to five digits
    np.testing.assert_allclose(model.jnt_range[:ACT_DIM, 0], reference["joint_lower_rad"], atol=1e-5)
    np.testing.assert_allclose(model.jnt_range[:ACT_DIM, 1], reference["joint_upper_rad"], atol=1e-5)
    np.testing.assert_allclose(model.actuator_ctrlrange, model.jnt_range[:ACT_DIM])


def test_masses(model, reference):
    masses = [model.body(str(name)).mass[0] for name in reference["body_names"]]
    np.testing.assert_allclose(masses, reference["body_mass_kg"], rtol=1e-9)


def test_poses_and_gravity_torques(model, reference):
    data = mujoco.MjData(model)
    bodies = [model.body(str(name)).id for name in reference["body_names"]]
    for i, qpos in enumerate(reference["qpos_rad"]):
        data.qpos[:] = 0.0
        data.qpos[:ACT_DIM] = qpos
        mujoco.mj_forward(model, data)
        tip = data.site("gripperframe")
        assert np.abs(tip.xpos - reference["gripperframe_pos_base_m"][i]).max() < 1e-4
        assert np.abs(tip.xmat.reshape(3, 3) - reference["gripperframe_rot_base"][i]).max() < 1e-4
        assert np.abs(data.xpos[bodies] - reference["body_pos_base_m"][i]).max() < 1e-4
        assert np.abs(data.xmat[bodies].reshape(-1, 3, 3) - reference["body_rot_base"][i]).max() < 1e-4
        assert np.abs(data.qfrc_bias[:ACT_DIM] - reference["gravity_torque_nm"][i]).max() < 1e-3
