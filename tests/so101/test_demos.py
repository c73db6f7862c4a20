"""Demonstrations for practice: videos of a dataset, and episodes that practice sees as its own."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, load, run_script

from so101 import practice, sac
from so101.dataset import DatasetError, check_video, find_videos, read_dataset, read_frames, read_info, write_dataset
from so101.demos import read_demos, watch
from so101.learner import MODEL
from so101.opencv import OpenCVPolicy
from so101.practising import PractisingPolicy
from so101.pusher import JacobianPolicy
from so101.simulated_arm import Flaws
from so101.virtual_time import virtual_loop
from so101_env import ACTION, OBS, STATE, Task

pytest.importorskip("cv2")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("onnxruntime")

sys.path.insert(0, str(ROOT / "benchmark"))
from practised_arm import RecordedRobot  # noqa: E402

KEYS = (STATE, ACTION)
TASK = Task(firmware_p=16, observe_load=True)
SMALL = "--virtual-time --minutes 0.3 --seed 3 --train-episode-steps 25 --hidden-size 16 --batch-size 32".split()


def gray(value: int) -> np.ndarray:
    return np.full((48, 64, 3), value, np.uint8)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A dataset of three episodes whose pictures are 5 shades brighter in every step."""
    path = tmp_path_factory.mktemp("film") / "demos"
    lengths = (7, 12, 5)
    episodes = [dict.fromkeys(KEYS, np.zeros((length, 6))) for length in lengths]
    write_dataset(path, episodes, {"front": (gray(20 + 5 * step) for step in range(sum(lengths)))})
    return path


def shades(file, begin_s: float, count: int) -> list[int]:
    """The step of each picture, by its brightness."""
    return [round((frame.mean() - 20) / 5) for frame in read_frames(file, begin_s, count)]


def encode(source, target, *flags: str) -> None:
    """Convert a video with the FFmpeg that comes with imageio."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(source), *flags, str(target)]
    subprocess.run(command, check=True)


def test_every_episode_has_its_own_pictures(film, tmp_path):
    info = read_info(film, KEYS)
    videos = find_videos(film, info, "front")
    assert shades(*videos[0], 7) == [0, 1, 2, 3, 4, 5, 6]
    assert shades(*videos[1], 12) == [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert shades(*videos[2], 5) == [19, 20, 21, 22, 23]
    # AV1 with sparse key frames, as recordings of LeRobot can have it
    encode(videos[0][0], tmp_path / "av1.mp4", "-c:v", "libsvtav1", "-crf", "20", "-g", "30")
    assert shades(tmp_path / "av1.mp4", videos[1][1], 12) == [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]


WRITE_WITH_LEROBOT = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

names = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
joints = {"dtype": "float32", "shape": (6,), "names": [f"{name}.pos" for name in names]}
camera = {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
features = {"observation.state": joints, "action": joints, "observation.images.front": camera}
dataset = LeRobotDataset.create("me/film", fps=30, root=sys.argv[1], robot_type="so101_follower", features=features)
still, step = np.zeros(6, np.float32), 0
for length in (7, 12, 5):
    for _ in range(length):
        image = np.full((48, 64, 3), 20 + 5 * step, np.uint8)
        frame = {"observation.state": still, "action": still, "observation.images.front": image}
        dataset.add_frame(frame | {"task": "brighten"})
        step += 1
    dataset.save_episode()
dataset.finalize()
"""


def test_a_recording_of_lerobot(tmp_path):
    """With the Python of an environment that has LeRobot 0.6 in LEROBOT_PYTHON."""
    python = os.environ.get("LEROBOT_PYTHON") or pytest.skip("LEROBOT_PYTHON names no Python with LeRobot")
    subprocess.run([python, "-c", WRITE_WITH_LEROBOT, str(tmp_path / "demos")], capture_output=True, check=True)
    demos = read_demos(tmp_path / "demos", "front", "deg")
    lengths = [len(episode[STATE]) for episode in demos.episodes.values()]
    assert lengths == [7, 12, 5]
    assert sum((shades(*demos.videos[i], lengths[i]) for i in range(3)), []) == [*range(24)]


def test_videos_of_the_older_format(film, tmp_path):
    shutil.copytree(film, path := tmp_path / "demos")
    info = read_info(film, KEYS) | {"codebase_version": "v2.1"}
    videos = find_videos(path, info, "front")
    assert videos.keys() == {0, 1, 2}
    assert videos[2] == (path / "videos/chunk-000/observation.images.front/episode_000002.mp4", 0.0)


@pytest.mark.parametrize(
    "damage, words",
    [
        ("gone", "is missing or not a file"),
        ("cut", "has 20 pictures, but the dataset has 24 frames for it"),
        ("60 fps", "is not a video of 30 pictures per second without gaps"),
        ("gap", "is not a video of 30 pictures per second without gaps"),
        ("text", "is not an MP4 video that FFmpeg can read"),
        ("playlist", "is not an MP4 video that FFmpeg can read"),
        ("noise", "is not an MP4 video that FFmpeg can read"),
    ],
)
def test_a_video_that_cannot_be_used(film, tmp_path, damage, words):
    """No other picture is shown instead. A playlist leads FFmpeg to other files: it is not followed."""
    shutil.copytree(film, path := tmp_path / "my:demos")
    target = find_videos(path, read_info(path, KEYS), "front")[0][0]
    source = shutil.move(target, tmp_path / "source.mp4")
    if damage == "cut":
        encode(source, target, "-c", "copy", "-frames:v", "20")
    elif damage == "60 fps":
        encode(source, target, "-vf", "setpts=0.5*PTS", "-r", "60")
    elif damage == "gap":
        encode(source, target, "-vf", "select='not(between(n,8,10))'", "-fps_mode", "passthrough")
    elif damage == "text":
        target.write_text("no video")
    elif damage == "playlist":
        shutil.copy(source, target.parent / "other.mp4")
        target.write_text("ffconcat version 1.0\nfile other.mp4\n")
    elif damage == "noise":
        content = bytearray(source.read_bytes())
        begin = content.index(b"mdat") + 4
        size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8  # of the pictures
        content[begin + size // 2 : begin + size] = np.random.default_rng(0).bytes(size - size // 2)
        target.write_bytes(content)
    with pytest.raises(DatasetError, match=words) as error:
        read_demos(path, "front", None)
    assert str(target) in str(error.value) and "\n" not in str(error.value)
    if damage in ("playlist", "text", "noise"):  # the decoder refuses it, too
        with pytest.raises(
            DatasetError, match="is missing, damaged or not an MP4 video|cannot be decoded from 0.[0-9]+ s"
        ):
            list(read_frames(target, 0.0, 24))


def test_a_picture_that_is_damaged_is_not_shown(tmp_path):
    """A decoder would show something like it; in a picture of an arm that would be another place of the sheet."""
    texture = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    pictures = (np.roll(texture, 3 * step, axis=1) for step in range(60))
    write_dataset(tmp_path / "demos", [dict.fromkeys(KEYS, np.zeros((60, 6)))], {"top": pictures})
    file, _ = read_demos(tmp_path / "demos", "top", None).videos[0]
    content = file.read_bytes()
    begin = content.index(b"mdat") + 4
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    assert len(list(read_frames(file, 0.0, 60))) == 60
    for seed in range(4):
        rng, damaged = np.random.default_rng(seed), bytearray(content)
        for position in rng.integers(begin, begin + size, 10):
            damaged[position] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        with pytest.raises(DatasetError):
            check_video(file, 60)
            list(read_frames(file, 0.0, 60))


def test_a_video_whose_place_makes_no_sense(film, tmp_path):
    import pyarrow.parquet as pq

    info = read_info(film, KEYS)
    for key, value in (
        ("file_index", 0.9),
        ("chunk_index", -1.0),
        ("from_timestamp", float("nan")),
        ("file_index", 1e9),
    ):
        shutil.copytree(film, path := tmp_path / f"{key}{value}")
        file = path / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        table, name = pq.read_table(file), f"videos/observation.images.front/{key}"
        column = pyarrow.array([0.0, value, 0.0])
        pq.write_table(table.set_column(table.column_names.index(name), name, column), file)
        with pytest.raises(DatasetError, match="says nothing usable about the videos of episode 1"):
            find_videos(path, info, "front")


def test_a_camera_that_the_dataset_lacks(film):
    with pytest.raises(DatasetError, match="has no camera top, only front"):
        find_videos(film, read_info(film, KEYS), "top")


# ---------------------------------------------------------------------------------------------------------------------
# episodes


def make_loop(robot, base):
    args = sac.Args(base=sac.Base("jacobian" if base else "zero", observe_base=base is not None), task=TASK)
    torch.manual_seed(0)
    residual = PractisingPolicy(base, TASK, sac.Agent(args), base is not None, seed=1)
    policy = OpenCVPolicy(residual, TASK.tape_margin)
    policy.firmware_p = TASK.firmware_p
    return virtual_loop(robot, policy, TASK), residual


def start(loop, robot) -> None:
    robot.reset(5)
    loop.controller.reset()
    loop.measure()
    loop.home()  # estimates the servo gain
    loop.measure()


def record(loop, robot, residual, path) -> np.ndarray:
    """An episode of 40 steps that explores, as a dataset; returns its targets (40, 6), rad."""
    residual.exploring = True
    loop.episode(40, TASK.tape_margin)
    residual.exploring = False
    episode, pictures = robot.episode(loop.moves)
    write_dataset(path, [episode], {"top": pictures})
    return episode[ACTION]


@pytest.mark.parametrize("with_base", [False, True])
def test_a_recorded_episode_of_practice_is_that_episode(tmp_path, with_base):
    """Observations and residuals are those of the learner when it was recorded; the film is compressed."""
    robot = RecordedRobot(TASK, Flaws())
    loop, residual = make_loop(robot, JacobianPolicy() if with_base else None)
    start(loop, robot)
    targets = record(loop, robot, residual, tmp_path / "demos")
    obs, asked = residual.steps(loop.moves, complete=True)
    seen, wanted, success = watch(read_demos(tmp_path / "demos", "top", None), 0, loop, TASK.tape_margin)
    late = 40 - len(seen)  # the tape may be found some pictures later in a compressed film
    assert not success and late <= 5 and wanted.shape == (39 - late, 6)
    obs, asked, sent = obs[late:-1], asked[late:-1], targets[late:]
    np.testing.assert_allclose(seen[:, :6], obs[:, :6], atol=1e-5)
    np.testing.assert_allclose(seen[1:, 25:31], obs[1:, 25:31], atol=2e-3)  # load
    assert np.abs(seen - obs)[:, OBS["sheet_pos"]].max() < 3e-3  # m
    # the command law has changed some of the targets that were asked for: what counts is what the arm did
    assert (np.abs(wanted - asked) < (0.2 if with_base else 2e-3)).mean() > 0.7
    if not with_base:
        np.testing.assert_allclose(residual.scale_rad * wanted[1:], np.diff(sent, axis=0)[:-1], atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Successful episodes of the included policy on the simulated arm of seed 3, with the camera's film."""
    path = tmp_path_factory.mktemp("demos") / "demos"
    flags = ["--model", "assets/arm.onnx", "--seed", "3", "--episodes", "3", "--dataset", str(path)]
    done = run_script("benchmark/practised_arm.py", *flags)
    assert done.returncode == 0, done.stderr
    return path


def practise(monkeypatch, log_dir, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["practice.py", "--log-dir", str(log_dir), *SMALL, *flags])
    return practice.run_script(practice.main)


@pytest.mark.parametrize("base", ["zero", "jacobian"])
def test_practice_begins_with_demonstrations(demos, monkeypatch, tmp_path, capfd, base):
    """They are the first rows of the buffer, and the arm explores from its first episode; a resumed run keeps them."""
    flags = ["--base-policy", base, "--demos", str(demos)]
    assert practise(monkeypatch, tmp_path, *flags) == 0
    said = capfd.readouterr().err
    (model,) = tmp_path.glob(f"*/{MODEL}")
    (own,) = (saved := load(model))["ranks"]
    first, buffer, records = own["first_rows"], own["buffer"], saved["recorder"]["recent_episodes"]
    assert "3 episodes" in said and "3 of them show tape and sheet, 3 succeed" in said and f": {first} steps, " in said
    assert saved["global_step"] == len(buffer["x"]) == first + own["arm"]["steps"] and own["arm"]["steps"] > 0
    assert buffer["terminations"][:first].sum() == buffer["dones"][:first].sum() == 3 and buffer["dones"][first - 1]
    assert buffer["rewards"][:first][buffer["terminations"][:first]].min() > 1  # the bonus of the task
    assert 0.3 < buffer["actions"][:first].abs().max() <= 1
    assert all(record["exploring"] for record in records)
    assert saved["optimizer"]["critics"]["state"][0]["step"] == saved["global_step"]  # it has learned from them, too
    flags = ["--virtual-time", "--minutes", "0.5", "--resume", str(model)]
    assert "--demos: a resumed run has begun already" in error_of(monkeypatch, "so101.practice", *flags, "--demos", "x")
    monkeypatch.setattr(sys, "argv", ["practice.py", *flags])
    assert practice.run_script(practice.main) == 0
    (later,) = (again := load(model))["ranks"]
    assert later["first_rows"] == first and again["global_step"] > saved["global_step"]
    assert torch.equal(later["buffer"]["x"][:first], buffer["x"][:first])


def test_the_learner_of_demonstrations_is_the_same_in_its_own_process(demos, monkeypatch, tmp_path):
    for name, flags in (("own", []), ("same", ["--no-learner-process"])):
        given = ["--base-policy", "zero", "--demos", str(demos), "--run-name", name, *flags]
        assert practise(monkeypatch, tmp_path, *given) == 0
    one, other = (load(tmp_path / name / MODEL)["agent"] for name in ("own", "same"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--demos", "nowhere"], "nowhere: is not a LeRobotDataset"),
        (["--demos", "DEMOS", "--demos-camera", "front"], "has no camera front, only top"),
        (["--demos", "DEMOS", "--demos-units", "rad"], "--demos-units rad: observation.state is in deg"),
        (["--demos", "DEMOS", "--tape-margin", "0.01"], "episodes show tape and sheet, and none of them success"),
        (["--demos", "FILM", "--demos-camera", "front"], "0 of 3 episodes show tape and sheet"),
        (["--demos", "DEMOS", "--learning-starts", "100"], "--learning-starts: --demos take the place"),
        (["--demos", "DEMOS", "--alpha", "0"], "--alpha 0: a residual of zero learns nothing from --demos"),
        (["--demos", "DEMOS", "--prior", "x.pt"], "--prior: brings steps of its own"),
        (["--demos-camera", "front"], "--demos-camera: needs --demos"),
        (["--demos-units", "deg"], "--demos-units: needs --demos"),
    ],
)
def test_demonstrations_that_cannot_be_used(demos, film, monkeypatch, tmp_path, flags, reason):
    names = {"DEMOS": str(demos), "FILM": str(film)}
    given = [names.get(flag, flag) for flag in flags]
    line = error_of(monkeypatch, "so101.practice", "--virtual-time", "--log-dir", str(tmp_path), *given)
    assert reason in line
    assert not list(tmp_path.glob(f"*/{MODEL}"))


def test_an_episode_of_another_arm_is_named(demos, monkeypatch, tmp_path):
    """Joints that this arm cannot have."""
    info = read_info(demos, KEYS)
    episodes = read_dataset(demos, info, KEYS)
    rows = [{key: np.deg2rad(episode[key]) for key in KEYS} for episode in episodes.values()]
    rows[1][STATE][3, 1] = np.deg2rad(170.0)
    pictures = (
        frame
        for i, row in enumerate(rows)
        for frame in read_frames(*find_videos(demos, info, "top")[i], len(row[STATE]))
    )
    write_dataset(tmp_path / "demos", rows, {"top": pictures})
    line = error_of(
        monkeypatch, "so101.practice", "--virtual-time", "--log-dir", str(tmp_path), "--demos", str(tmp_path / "demos")
    )
    assert "demos: episode 1: shoulder_lift is" in line and "check --demos-units" in line


def test_loads_are_seen_with_the_gain_that_practice_has_estimated(tmp_path):
    """On an arm with weak servos, what the learner sees of a demonstration is what it saw when the arm moved."""
    robot = RecordedRobot(TASK, Flaws(gain=0.6))
    loop, residual = make_loop(robot, None)
    start(loop, robot)
    assert loop.controller.gain_factor < 0.75
    record(loop, robot, residual, tmp_path / "demos")
    obs, _ = residual.steps(loop.moves, complete=True)
    before = loop.controller.get_state()
    seen, _, _ = watch(read_demos(tmp_path / "demos", "top", None), 0, loop, TASK.tape_margin)
    late = 40 - len(seen)
    np.testing.assert_allclose(seen[1:, 25:31], obs[late:-1][1:, 25:31], atol=2e-3)
    after = loop.controller.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)  # the arm's own state is untouched
    loop.offset_rad = np.array([0.0, 0.05, 0.0, 0.0, 0.0, 0.0])  # as so101.drive --check finds it
    moved, _, _ = watch(read_demos(tmp_path / "demos", "top", None), 0, loop, TASK.tape_margin)
    np.testing.assert_allclose(moved[-30:, :6], obs[late:-1][-30:, :6] - loop.offset_rad, atol=1e-5)


def test_the_film_of_a_dataset_can_be_looked_at(demos, tmp_path):
    """Also as AV1, which LeRobot records: tape and sheet are found in every picture or nearly so."""
    source = find_videos(demos, read_info(demos, KEYS), "top")[0][0]
    encode(source, film := tmp_path / "av1.mp4", "-c:v", "libsvtav1", "-crf", "25")
    steps = sum(len(episode[STATE]) for episode in read_dataset(demos, read_info(demos, KEYS), KEYS).values())
    done = run_script("so101.drive", "--replay", str(film), "--json", str(tmp_path / "seen.json"))
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["frames"] == steps and seen["tape_seen_at"] <= 5 and seen["sheet_seen"] > 0.9
