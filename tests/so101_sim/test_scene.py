"""Looks and rendering."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import environment
from small_task import HOME_QPOS, load_model

from so101_sim.scene import LOOK_FIELDS, Renderer, VisualRandomization, add_noise, camera_names, nominal_look


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def looks(model):
    return [VisualRandomization().draw(model, seed) for seed in range(300)]


def test_looks_vary_within_their_ranges(model, looks):
    before = nominal_look(model)
    moved = np.array([look.fields["cam_pos"] for look in looks]) - model.cam_pos
    assert 0.0045 < np.abs(moved).max() <= 0.005
    dots = np.abs(np.sum([look.fields["cam_quat"] * model.cam_quat for look in looks], axis=2)).clip(0, 1)
    assert 1.8 < np.rad2deg(2 * np.arccos(dots)).max() <= 2.0001
    zoom = np.array([look.fields["cam_fovy"] for look in looks]) / model.cam_fovy
    assert 0.97 <= zoom.min() < 0.973 and 1.027 < zoom.max() <= 1.03
    assert 0.4 < np.mean([look.shadows for look in looks]) < 0.6
    noise = np.array([look.noise for look in looks])
    assert 0 <= noise.min() < 0.2 and 5.8 < noise.max() <= 6
    light = np.array([look.ambient + look.headlight + look.fields["light_diffuse"][0] for look in looks])
    assert 0.6 * 0.9 <= light.min() < 0.65 and 1.15 < light.max() <= 1.15 * 1.1
    elevation = np.arcsin([-look.fields["light_dir"][0, 2] for look in looks])
    assert 0.7 <= elevation.min() < 0.72 and 1.48 < elevation.max() <= 1.5
    for name in LOOK_FIELDS:  # all of it varies, and drawing has not changed the model
        assert len(np.unique([look.fields[name] for look in looks], axis=0)) >= 5, name
        np.testing.assert_array_equal(getattr(model, name), before.fields[name])


def test_a_look_is_a_function_of_its_seed(model, looks):
    again = VisualRandomization().draw(model, 7)
    np.testing.assert_equal(again._asdict(), looks[7]._asdict())
    assert not np.array_equal(again.fields["mat_rgba"], looks[8].fields["mat_rgba"])


def test_a_shadow_is_drawn_where_the_look_has_one(model):
    """The same colours, light and cameras: only the lamp's shadow differs, and it is dark."""
    renderer, look = Renderer(model, (64, 64), fast=True), nominal_look(model)
    plain = renderer.render(HOME_QPOS, "top", look).astype(int)
    shadowed = renderer.render(HOME_QPOS, "top", look._replace(shadows=True)).astype(int)
    difference = (shadowed - plain).sum(2)
    assert (difference < -30).mean() > 0.01 and (difference > 10).mean() < 0.01
    np.testing.assert_array_equal(renderer.render(HOME_QPOS, "top"), plain)
    renderer.close()


def test_a_look_is_rendered_and_leaves_the_next_one_alone(model, looks):
    """Pictures through each camera in looks that differ, in two orders."""
    assert camera_names(model) == ("top", "wrist")
    renderer = Renderer(model, (48, 48), fast=True)
    for camera in camera_names(model):
        pictures = [renderer.render(HOME_QPOS, camera, look) for look in (*looks[:4], None)]
        again = [renderer.render(HOME_QPOS, camera, look) for look in (None, *looks[3::-1])]
        np.testing.assert_array_equal(pictures, again[::-1])
        means = np.array(pictures).mean((1, 2, 3))
        assert np.std(means) > 5 and len(np.unique(np.round(means, 3))) == 5
    renderer.close()


def test_image_noise_is_a_function_of_look_step_and_camera(model, looks):
    picture = np.full((64, 64, 3), 128, np.uint8)

    def noisy(look, step, camera):
        image = picture.copy()
        add_noise(image, look, step, camera)
        return image.astype(int) - 128

    look = looks[0]._replace(noise=4.0)
    first = noisy(look, 3, 0)
    assert first.std() == pytest.approx(4.0, rel=0.05) and abs(first.mean()) < 0.2
    np.testing.assert_array_equal(first, noisy(look, 3, 0))
    for other in (noisy(look, 4, 0), noisy(look, 3, 1), noisy(looks[1]._replace(noise=4.0), 3, 0)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05
    assert (noisy(nominal_look(model), 3, 0) == 0).all()


def run(code: str, **env: str | None) -> subprocess.CompletedProcess:
    variables = environment(**env)
    variables["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)


def test_environments_with_pictures_end_quietly():
    """Dropped or left open at the end, as users do: no traceback, no hang."""
    code = (
        "from small_task import SmallVectorEnv\nfor _ in range(2):\n"
        "    env = SmallVectorEnv(4, observe_pixels=True)\n    env.reset(seed=0)\n"
        "del env\nenv = SmallVectorEnv(4, observe_pixels=True)\nenv.reset(seed=0)"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_state_only_use_does_not_touch_opengl():
    code = (
        "import sys, small_task; env = small_task.SmallEnv(); env.reset(seed=0);"
        "env.step(env.action_space.sample()); env.close();"
        "print([m for m in sys.modules if m.startswith(('OpenGL', 'mujoco.egl', 'mujoco.osmesa'))])"
    )
    done = run(code, MUJOCO_GL=None)  # with it, MuJoCo imports OpenGL at once
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_rendering_that_fails_is_a_user_error():
    """On a machine without an EGL driver."""
    code = (
        "import small_task\nfrom so101_sim.errors import SO101Error\n"
        "try: small_task.SmallVectorEnv(1, observe_pixels=True).reset(seed=0)\n"
        "except SO101Error as error: print('error:', error)"
    )
    variables = environment(MUJOCO_GL=None, __EGL_VENDOR_LIBRARY_FILENAMES="/nowhere.json")
    variables["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)
    assert "error: off-screen rendering failed" in done.stdout, done.stdout + done.stderr
