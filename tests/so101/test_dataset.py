"""Recording, cloning and replaying demonstrations, and the dataset on disk."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import error_of, module_of, run_script

from so101 import dataset
from so101.checkpoints import save_tensors
from so101.policies import load_policy
from so101_env import ACTION, ENVIRONMENT, STATE, SO101ResidualVectorEnv, base_observation
from so101_sim.control import JOINTS, from_rad, to_rad
from so101_sim.errors import SO101Error

pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))

KEYS = (STATE, ENVIRONMENT, ACTION)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """Twelve recorded episodes of the pusher, failures left out."""
    path = tmp_path_factory.mktemp("recorded") / "demos"
    flags = f"--base-policy jacobian --dataset {path} --episodes 12 --only-successes --tape-margin 0.03"
    done = run_script("so101.record", *flags.split())
    assert done.returncode == 0, done.stderr
    return path


LENGTHS = (20, 15, 12, 9)
HOME_RAD = np.array([0.0, -0.6, 0.9, 1.2, 0.0, 0.1])


def tiny_episodes() -> list[dict[str, np.ndarray]]:
    """An arm that hardly moves, beside a sheet that lies in the tape."""
    rest = np.zeros(19, np.float32)
    rest[[6, 8, 9]] = 0.27, 0.0005, 1.0
    wave = [HOME_RAD + 0.02 * np.sin(np.arange(n)[:, None] / 10 + np.arange(6)) for n in LENGTHS]
    return [
        {STATE: each.astype(np.float32), ACTION: (each + 0.001).astype(np.float32), ENVIRONMENT: np.tile(rest, (n, 1))}
        for each, n in zip(wave, LENGTHS)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """These episodes as a dataset."""
    path = tmp_path_factory.mktemp("written") / "tiny"
    dataset.write_dataset(path, tiny_episodes())
    return path


@pytest.fixture(scope="module")
def clone(demos, tmp_path_factory) -> Path:
    """The model of a clone of those."""
    logs = tmp_path_factory.mktemp("clones")
    done = run_script("so101.clone", "--dataset", str(demos), "--train-steps", "1500", "--log-dir", str(logs))
    assert done.returncode == 0, done.stderr
    (model,) = logs.glob("clone_*/final_model.pt")
    assert str(model) in done.stdout
    return model


def test_dataset_has_the_schema_of_lerobot_v3(demos):
    """Against the format as LeRobot 0.4 documents and reads it."""
    info = json.loads((demos / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 30 and info["robot_type"] == "so101_follower"
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["features"]["action"]["unit"] == "deg" and len(info["features"]["action"]["names"]) == 6
    data = pq.read_table(demos / info["data_path"].format(chunk_index=0, file_index=0))
    kinds = {
        "observation.state": pa.list_(pa.float32(), 6),
        "observation.environment_state": pa.list_(pa.float32(), 19),
    }
    kinds |= {"action": pa.list_(pa.float32(), 6), "timestamp": pa.float32()}
    kinds |= {key: pa.int64() for key in ("frame_index", "episode_index", "index", "task_index")}
    assert dict(zip(data.schema.names, data.schema.types)) == kinds and set(info["features"]) == set(kinds)
    assert info["total_frames"] == len(data) and data["index"].to_pylist() == list(range(len(data)))
    np.testing.assert_allclose(data["timestamp"].to_numpy(), data["frame_index"].to_numpy() / 30, atol=1e-6)

    episodes = pq.read_table(demos / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    assert info["total_episodes"] == len(episodes) and info["splits"] == {"train": f"0:{len(episodes)}"}
    number, action = data["episode_index"].to_numpy(), np.array(data["action"].to_pylist())
    for row in episodes:
        rows = np.flatnonzero(number == row["episode_index"])
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (rows[0], rows[-1] + 1)
        assert row["length"] == len(rows) and row["data/chunk_index"] == row["data/file_index"] == 0
        np.testing.assert_allclose(row["stats/action/mean"], action[rows].mean(0), atol=1e-6)
        assert row["stats/timestamp/max"] == [pytest.approx((len(rows) - 1) / 30, abs=1e-6)]
    stats = json.loads((demos / "meta" / "stats.json").read_text())
    assert set(stats) == set(kinds) and stats["action"]["count"] == [len(data)]
    np.testing.assert_allclose(stats["action"]["std"], action.std(0), atol=1e-6)
    modality = json.loads((demos / "meta" / "modality.json").read_text())
    assert modality["action"] == modality["state"] == {
        "single_arm": {"start": 0, "end": 5}, "gripper": {"start": 5, "end": 6}
    }  # fmt: skip
    tasks = pq.read_table(demos / "meta" / "tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert [row["tasks"] for row in episodes] == [tasks["task"].to_pylist()] * len(episodes)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Path:
    """Three episodes as two cameras see them, one by another name, beside the true state."""
    path = tmp_path_factory.mktemp("seen") / "demos"
    flags = f"--base-policy jacobian --dataset {path} --episodes 3 --environment-state --tape-margin 0.02"
    done = run_script("so101.record", *flags.split(), *"--cameras front=top wrist --image-size 64 96".split())
    assert done.returncode == 0, done.stderr
    assert not done.stderr and "lerobot-train" in done.stdout  # progress bars are for terminals
    return path


def test_recorded_videos_show_each_frame_as_policies_see_it(seen):
    """Rendered again from the recorded state of its frame, every picture is the same but for compression."""
    info = dataset.read_info(seen, KEYS)
    (episodes, features), names = (dataset.read_dataset(seen, info, KEYS), info["features"]), ("front", "wrist")
    rows = pq.read_table(seen / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    stats = json.loads((seen / "meta" / "stats.json").read_text())
    modality = json.loads((seen / "meta" / "modality.json").read_text())
    assert modality["video"] == {name: {"original_key": f"observation.images.{name}"} for name in names}
    qpos = np.concatenate([
        np.column_stack([to_rad(state, "deg"), rest[:, 6:9], 2 * np.arctan2(*rest[:, [12, 9]].T)])
        for state, rest in ((episode[STATE], episode[ENVIRONMENT]) for episode in episodes.values())
    ])  # fmt: skip
    envs = SO101ResidualVectorEnv(1, tape_margin=0.02)
    for name, camera in zip(names, ("top", "wrist")):
        key = f"observation.images.{name}"
        path = seen / info["video_path"].format(video_key=key, chunk_index=0, file_index=0)
        with imageio.get_reader(path) as reader:
            meta, frames = reader.get_meta_data(), np.array([frame for frame in reader])
        assert meta["fps"] == 30 and meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
        assert features[key]["dtype"] == "video" and features[key]["shape"] == [64, 96, 3] == list(frames.shape[1:])
        assert len(frames) == info["total_frames"] == len(qpos)
        wanted = envs.camera_images(qpos, camera, (64, 96))
        error = np.square(frames.astype(float) - wanted).mean((1, 2, 3))
        assert (10 * np.log10(255**2 / error)).min() > 24  # dB; a neighbour's picture has less where the arm moves
        later = np.square(frames[1:].astype(float) - wanted[:-1]).mean((1, 2, 3))
        assert error[1:].mean() < later.mean()
        np.testing.assert_allclose(np.ravel(stats[key]["mean"]), wanted.mean((0, 1, 2)) / 255, atol=0.01)
        assert np.shape(stats[key]["q99"]) == (3, 1, 1) and stats[key]["count"] == [-(-len(qpos) // 10)]
        for row in rows:
            start, end = row["dataset_from_index"] / 30, row["dataset_to_index"] / 30
            assert row[f"videos/{key}/from_timestamp"] == start and row[f"videos/{key}/to_timestamp"] == end


def test_cameras_leave_the_true_state_out_unless_asked(tmp_path, monkeypatch):
    """A policy for a real arm must not learn from what only the simulation knows."""
    flags = ["--base-policy", "jacobian", "--episodes", "1", "--dataset", str(tmp_path / "demos")]
    done = run_script("so101.record", *flags, "--cameras", "wrist", "--image-size", "32")
    assert done.returncode == 0, done.stderr
    assert ENVIRONMENT not in json.loads((tmp_path / "demos" / "meta" / "info.json").read_text())["features"]
    data = pq.read_table(tmp_path / "demos" / "data" / "chunk-000" / "file-000.parquet")
    assert ENVIRONMENT not in data.schema.names and "so101.clone" not in done.stdout
    flags[-1] = str(tmp_path / "other")
    for extra, words in (
        (["--cameras", "roof"], "--cameras roof: the scene has no such camera, it has top and wrist"),
        (["--cameras", "a=top", "a=wrist"], "--cameras a=top a=wrist: give NAME or NAME=CAMERA, each name once"),
        (["--cameras", "top", "--image-size", "33"], "--image-size 33: give one side or height and width"),
    ):
        assert words in error_of(monkeypatch, "so101.record", *flags, *extra)
    assert not (tmp_path / "other").exists()
    unseen = run_script("so101.record", *flags, "--cameras", "top", MUJOCO_GL="glfw", DISPLAY=None)
    assert unseen.returncode == 2 and "off-screen rendering failed" in unseen.stderr and unseen.stdout == ""


READ_WITH_LEROBOT = """
import json, sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
read = LeRobotDataset("local/demos", root=sys.argv[1], delta_timestamps={"action": [0, 1 / 30]})
frames = [read[int(i)] for i in sys.argv[2:]]
result = {"episodes": read.num_episodes, "fps": read.fps, "task": frames[0]["task"], "keys": sorted(frames[0])}
result |= {key: [frame[key].tolist() for frame in frames] for key in ("action", "observation.state")}
pictures = [key for key in frames[0] if key.startswith("observation.images.") and not key.endswith("_is_pad")]
print(json.dumps(result | {key: [frame[key].tolist() for frame in frames] for key in pictures}))
"""


def test_datasets_are_read_by_lerobot(demos, seen):
    """With the Python of an environment that has LeRobot in LEROBOT_PYTHON."""
    python = os.environ.get("LEROBOT_PYTHON") or pytest.skip("LEROBOT_PYTHON names no Python with LeRobot")
    for path in (demos, seen):
        info = dataset.read_info(path, KEYS)
        episodes = dataset.read_dataset(path, info, KEYS)
        first = len(episodes[0][ACTION])  # of the second episode
        command = [python, "-c", READ_WITH_LEROBOT, str(path), "5", str(first)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        read = json.loads(done.stdout.splitlines()[-1])
        assert (read["episodes"], read["fps"], read["task"]) == (len(episodes), 30, dataset.TASK_TEXT)
        np.testing.assert_allclose(read["action"], [episodes[0][ACTION][5:7], episodes[1][ACTION][:2]], rtol=1e-6)
        np.testing.assert_allclose(read[STATE], [episodes[0][STATE][5], episodes[1][STATE][0]], rtol=1e-6)
        for key in (key for key in info["features"] if key.startswith("observation.images.")):
            with imageio.get_reader(path / info["video_path"].format(video_key=key, **dataset.NO_INDEX)) as reader:
                frames = np.array([frame for frame in reader])
            for index, picture in zip((5, first), read[key]):  # two decoders round colours differently
                assert np.abs(255 * np.transpose(picture, (1, 2, 0)) - frames[index]).mean() < 2


def test_recorded_frames_are_what_the_policy_saw_and_did(demos):
    """The state follows the commanded targets, one control step later."""
    episodes = dataset.read_dataset(demos, dataset.read_info(demos, KEYS), KEYS)
    for episode in episodes.values():
        (state, action), rest = (to_rad(episode[key], "deg") for key in (STATE, ACTION)), episode[ENVIRONMENT]
        # a servo stays within the command window of its target, but for gravity and damping: 0.1 rad in all
        assert np.abs(action - state).max() < 0.1
        lag = np.abs(action[:-1] - state[1:])[:, 0].mean()  # pan carries no load
        assert lag < np.abs(action[1:] - state[:-1])[:, 0].mean()
        np.testing.assert_allclose(rest[:, 13:15], np.array([0.27, 0.0]) - rest[:, 6:8], atol=1e-6)


def test_written_is_read_over_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "FRAMES_PER_FILE", 12)
    rng = np.random.default_rng(0)
    widths = dict(zip(KEYS, (6, 19, 6)))
    written = [{k: rng.normal(size=(n, w)).astype(np.float32) for k, w in widths.items()} for n in (5, 7, 3, 12, 1)]
    dataset.write_dataset(tmp_path / "many", written)
    assert len(list((tmp_path / "many" / "data" / "chunk-000").iterdir())) == 4
    info = dataset.read_info(tmp_path / "many", KEYS)
    read = dataset.read_dataset(tmp_path / "many", info, KEYS)
    assert info["total_episodes"] == 5
    assert [*read] == [0, 1, 2, 3, 4]
    for a, b in zip(written, read.values()):
        assert np.array_equal(a[ENVIRONMENT], b[ENVIRONMENT])
        for key in (STATE, ACTION):
            np.testing.assert_allclose(to_rad(b[key], "deg"), a[key], atol=1e-6)
    with pytest.raises(dataset.DatasetError, match="episode 0: action"):
        dataset.write_dataset(tmp_path / "bad", [{**written[0], "action": np.zeros((5, 7))}])
    assert not (tmp_path / "bad").exists()


TARGETS = {
    "a directory": lambda path: path.mkdir() or (path / "mine").write_text("kept"),
    "an empty directory": lambda path: path.mkdir(),
    "a file": lambda path: path.write_text("kept"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a directory": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_there_already_is_refused_and_untouched(tiny, tmp_path, kind):
    TARGETS[kind](tmp_path / "demos")
    before = [(path, path.is_symlink(), path.is_file() and path.read_text()) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(dataset.DatasetError, match="demos exists"):
        dataset.write_dataset(tmp_path / "demos", tiny_episodes())
    after = [(path, path.is_symlink(), path.is_file() and path.read_text()) for path in sorted(tmp_path.rglob("*"))]
    assert before == after


def test_writing_leaves_neighbours_alone_and_usual_permissions(tmp_path):
    (tmp_path / "demos.tmp").mkdir()
    (tmp_path / "demos.tmp" / "thesis.txt").write_text("kept")
    umask = os.umask(0o027)
    try:
        dataset.write_dataset(tmp_path / "demos", tiny_episodes())
    finally:
        os.umask(umask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "demos.tmp"]
    assert (tmp_path / "demos.tmp" / "thesis.txt").read_text() == "kept"
    modes = {
        (path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "demos", *tmp_path.glob("demos/**/*"))
    }
    assert modes == {(True, 0o750), (False, 0o640)}
    with pytest.raises(dataset.DatasetError, match="cannot be written"):
        dataset.write_dataset(tmp_path / "no" / "parent", tiny_episodes())


def test_a_target_that_appears_during_the_writing_is_untouched(tmp_path):
    def pictures():
        (tmp_path / "demos").mkdir()
        yield from np.zeros((56, 16, 16, 3), np.uint8)

    with pytest.raises(dataset.DatasetError, match="demos exists"):
        dataset.write_dataset(tmp_path / "demos", tiny_episodes(), {"top": pictures()})
    assert [*tmp_path.rglob("*")] == [tmp_path / "demos"]


def test_replay_repeats_a_recording_and_reads_v21(demos, tmp_path, monkeypatch):
    """The recording had other friction, so the replay is near, not equal."""
    done = run_script("so101.replay", "--dataset", str(demos), "--episode", "2", "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert max(result["max_joint_deviation_deg"].values()) < 1.0 and result["max_sheet_deviation_mm"] < 5.0
    assert "success in the simulation" in done.stdout

    # the same episode as v2.1 keeps it, in degrees, and without the unit
    info = dataset.read_info(demos, KEYS)
    episodes = dataset.read_dataset(demos, info, KEYS)
    joints = {key: episodes[2][key] for key in (STATE, ACTION)}
    old = tmp_path / "v21"
    (old / "meta").mkdir(parents=True)
    (old / "data" / "chunk-000").mkdir(parents=True)
    features = {k: {n: v for n, v in info["features"][k].items() if n != "unit"} for k in joints}
    old_info = {"codebase_version": "v2.1", "fps": 30, "total_episodes": 1, "features": features}
    (old / "meta" / "info.json").write_text(json.dumps(old_info))
    columns = {key: pa.array(array.tolist()) for key, array in joints.items()}
    length = len(joints[STATE])
    columns |= {"episode_index": pa.array([0] * length), "frame_index": pa.array(range(length))}
    pq.write_table(pa.table(columns), old / "data" / "chunk-000" / "episode_000000.parquet")
    assert "--units" in error_of(monkeypatch, "so101.replay", "--dataset", str(old))
    line = error_of(monkeypatch, "so101.replay", "--dataset", str(old), "--units", "rad")
    assert "v21: episode 0: joint angles of" in line and "not in rad; check --units" in line
    done = run_script("so101.replay", "--dataset", str(old), "--units", "deg", "--json", str(tmp_path / "o.json"))
    assert done.returncode == 0, done.stderr
    # the sheet lies elsewhere here, and the arm does not feel it much
    assert max(json.loads((tmp_path / "o.json").read_text())["mean_joint_deviation_deg"].values()) < 1.0


def replayed(monkeypatch, capsys, path: Path, *flags: str) -> tuple[dict, str]:
    """The JSON and the output of a replay in this process."""
    result = path.parent / "replayed.json"
    monkeypatch.setattr(sys, "argv", ["replay", "--dataset", str(path), "--json", str(result), *flags])
    assert module_of("so101.replay").main() == 0
    return json.loads(result.read_text()), capsys.readouterr().out


def test_every_recorded_step_is_replayed(tiny, tmp_path, monkeypatch, capsys):
    """The sheet lies in the tape all the time. Success is reported where the sheet was recorded, and nowhere else."""
    for path, success in ((tiny, True), (foreign(tiny, tmp_path / "foreign"), None)):
        flags = [] if success else ["--units", "deg"]
        result, output = replayed(monkeypatch, capsys, path, *flags)
        assert result["steps_recorded"] == result["steps_replayed"] == LENGTHS[0] and result["success"] is success
        assert ("success" in output) == bool(success)
    moved = change(tiny, tmp_path / "moved", lambda t: replace(t, ENVIRONMENT, [[0.6] * 19] * len(t)))
    result, output = replayed(monkeypatch, capsys, moved)  # a sheet out of reach does not end it either
    assert result["steps_replayed"] == LENGTHS[0] and result["success"] is False and "no success" in output


def replace(table: pa.Table, name: str, values) -> pa.Table:
    """A table with other values in a column."""
    return table.set_column(
        table.schema.names.index(name), name, values if isinstance(values, pa.Array) else pa.array(values)
    )


def change(tiny: Path, to: Path, table=None, episodes=None, **info) -> Path:
    """A copy of the dataset with other tables, functions of the present ones, and other entries of info.json."""
    shutil.copytree(tiny, to)
    for name, function in (("data", table), ("meta/episodes", episodes)):
        if function is not None:
            file = to / name / "chunk-000" / "file-000.parquet"
            pq.write_table(function(pq.read_table(file)), file)
    path = to / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))
    return to


JOINTS_POS = [f"{joint}.pos" for joint in JOINTS]


def foreign(tiny: Path, to: Path, names=JOINTS_POS, robot_type="so101_follower", table=None, **feature) -> Path:
    """A copy as others record it: with these names, without units, and without the sheet."""
    joints = {key: {"dtype": "float32", "shape": [6], "names": names, **feature} for key in (STATE, ACTION)}
    return change(tiny, to, table, features=joints, robot_type=robot_type)


def joints_rad(path: Path, units: str | None = None) -> list[np.ndarray]:
    """States and actions (T, 6), rad, of the episodes, one after the other."""
    info = dataset.read_info(path, (STATE, ACTION))
    episodes = dataset.read_dataset(path, info, (STATE, ACTION)).values()
    return [joints for episode in episodes for joints in dataset.joints_rad(info, episode, units, str(path))]


def written_rad() -> list[np.ndarray]:
    return [episode[key] for episode in tiny_episodes() for key in (STATE, ACTION)]


MAIN = [f"main_{joint}" for joint in JOINTS]
NAMED = {  # names, robot type, unit, and words of the message; None if the dataset is read
    "as LeRobot records": (JOINTS_POS, "so101_follower", "deg", None),
    "plain": ([*JOINTS], None, "deg", None),
    "in a map": ({"motors": [*JOINTS]}, "unknown", "deg", None),
    "in a map of maps": ({"axes": {"motors": JOINTS_POS}}, "so_follower", "deg", None),
    "not there": (None, "so100_follower", "deg", None),
    "not there, nor the robot": (None, None, "deg", "has no names and robot_type is missing"),
    "not there, unknown robot": (None, "unknown", "deg", "has no names and robot_type is missing"),
    "of another robot": (JOINTS_POS, "koch_follower", "deg", "robot_type is 'koch_follower'"),
    "a robot that is a list": (JOINTS_POS, ["so101_follower"], "deg", "robot_type is ['so101_follower']"),
    "of a pose": (["ee.x", "ee.y", "ee.z", "ee.wx", "ee.wy", "ee.wz"], None, "deg", "has the names ['ee.x'"),
    "of motors": ([f"motor_{i}" for i in range(6)], None, "deg", "has the names ['motor_0'"),
    "one too few": (JOINTS_POS[:5], "so101_follower", "deg", "has the names"),
    "one twice": (JOINTS_POS[:5] + JOINTS_POS[:1], "so101_follower", "deg", "has the names"),
    "two lists": ({"a": JOINTS_POS, "b": JOINTS_POS}, "so101_follower", "deg", "has the names {'a'"),
    "a list of a list": ([JOINTS_POS], "so101_follower", "deg", "has the names"),
    "numbers": ([0, 1, 2, 3, 4, 5], "so101_follower", "deg", "has the names [0, 1"),
    "a text": ("shoulder_pan", "so101_follower", "deg", "has the names 'shoulder_pan'"),
    "old": (MAIN, "so100", "deg", "pass --units deg-old"),
    "old, without a robot": (MAIN, None, "norm", "pass --units deg-old"),
    "old, with no unit": (MAIN, "so100", None, "give it with --units deg-old"),
    "old robot": ([*JOINTS], "so101", "deg", "pass --units deg-old"),
    "new, read as old": (JOINTS_POS, "so101_follower", "deg-old", "pass --units deg or norm"),
    "new, with no unit": (JOINTS_POS, "so101_follower", None, "--units deg, norm or rad"),
    "an unknown unit": (JOINTS_POS, "so101_follower", "furlong", "--units furlong: must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_joints_are_found_by_name_or_refused(tiny, tmp_path, kind):
    names, robot, units, words = NAMED[kind]
    path = foreign(tiny, tmp_path / "foreign", names, robot)
    if words is None:
        for read, written in zip(joints_rad(path, units), written_rad(), strict=True):
            np.testing.assert_allclose(read, written, atol=1e-6)
        return
    with pytest.raises(dataset.DatasetError) as error:
        joints_rad(path, units)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_order_of_joints_is_put_in_order(tiny, tmp_path):
    order = [5, 0, 3, 1, 4, 2]

    def permute(table):
        for key in (STATE, ACTION):
            table = replace(table, key, [[row[i] for i in order] for row in table[key].to_pylist()])
        return table

    path = foreign(tiny, tmp_path / "permuted", [JOINTS_POS[i] for i in order], table=permute)
    for read, written in zip(joints_rad(path, "deg"), written_rad(), strict=True):
        np.testing.assert_allclose(read, written, atol=1e-6)


def test_recordings_from_before_the_change_of_calibration(tiny, tmp_path):
    """With what LeRobot publishes: present degrees are -(old - 90) for shoulder_lift and old - 90 for elbow_flex."""
    old_degrees = np.array([10.0, 120.0, 130.0, -20.0, 30.0, 40.0])
    now = old_degrees.copy()
    now[1], now[2] = -(now[1] - 90), now[2] - 90

    def fill(table):
        for key in (STATE, ACTION):
            table = replace(table, key, [old_degrees.tolist()] * len(table))
        return table

    path = foreign(tiny, tmp_path / "old", MAIN, "so100", fill)
    for read in joints_rad(path, "deg-old"):
        np.testing.assert_allclose(read, np.tile(to_rad(now, "deg"), (len(read), 1)), atol=1e-6)
    np.testing.assert_allclose(from_rad(to_rad(now, "deg"), "deg-old"), old_degrees)


KINDS = [pa.list_(pa.float32()), pa.list_(pa.float32(), 6), pa.list_(pa.float64()), pa.large_list(pa.float32())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_files_of_one_dataset_can_have_other_types(tiny, tmp_path, kind):
    """LeRobot's merging writes other types than its recorder."""
    path = change(tiny, tmp_path / "merged", lambda table: table.slice(0, LENGTHS[0]))
    table = pq.read_table(tiny / "data" / "chunk-000" / "file-000.parquet").slice(LENGTHS[0])
    for key in (STATE, ACTION):
        table = replace(table, key, pa.array(table[key].to_pylist(), kind))
    rest = replace(table, "frame_index", table["frame_index"].cast(pa.int32()).combine_chunks())
    rest = replace(rest, "timestamp", table["timestamp"].cast(pa.float64()).combine_chunks())
    pq.write_table(rest, path / "data" / "chunk-000" / "file-001.parquet")
    for stray in (
        "chunk-000/._file-000.parquet",
        "chunk-000/file-000 (copy).parquet",
        "chunk-000/file-000.parquet.tmp",
    ):
        (path / "data" / stray).write_text("not of the dataset")
    for read, written in zip(joints_rad(path), joints_rad(tiny), strict=True):
        assert np.array_equal(read, written)


def renumbered(table: pa.Table) -> pa.Table:
    return replace(table, "episode_index", [(3, 7, 8, 9)[i] for i in table["episode_index"].to_pylist()])


def test_episodes_are_called_by_their_own_number(tiny, tmp_path, monkeypatch, capsys):
    path = change(tiny, tmp_path / "renumbered", renumbered, renumbered)
    for number, length in zip((3, 7, 8, 9), LENGTHS):
        result, output = replayed(monkeypatch, capsys, path, "--episode", str(number))
        assert result["steps_recorded"] == length and f"episode {number}:" in output
    words = "--episode 0: the dataset has the episodes 3, 7 to 9"
    assert words in error_of(monkeypatch, "so101.replay", "--dataset", str(path))


def column(name, function):
    """Replace a column by a function of its values."""
    return lambda table: replace(table, name, function(table[name].to_pylist()))


def without(*rows):
    return lambda table: table.filter(pa.array([i not in rows for i in range(len(table))]))


def bare(function):
    """Frames that neither time nor index describes."""
    return lambda table: function(table.drop_columns(["timestamp", "index"]))


FRAMES = {
    "a null": (column("frame_index", lambda f: [*f[:22], None, *f[23:]]), "episode 1: frame 2 has the frame_index nan"),
    "all null": (column("frame_index", lambda f: pa.array([None] * len(f), pa.int64())), "episode 0: frame 0 has"),
    "constant": (bare(column("frame_index", lambda f: [0] * len(f))), "episode 0: frame 1 has the frame_index 0"),
    "reversed": (bare(column("frame_index", lambda f: [*f[19::-1], *f[20:]])), "frame 0 has the frame_index 19"),
    "swapped": (bare(column("frame_index", lambda f: [*f[:21], 2, 1, *f[23:]])), "frame 1 has the frame_index 2"),
    "halves": (column("frame_index", lambda f: [i / 2 for i in f]), "frame 1 has the frame_index 0.5"),
    "texts": (column("frame_index", lambda f: [str(i) for i in f]), "frame_index must be numbers, but is string"),
    "a row is missing": (bare(without(25)), "episode 1: frame 5 has the frame_index 6"),
    "a row is there twice": (lambda t: pa.concat_tables([t.slice(0, 5), t.slice(4)]), "episode 0: frame 5 has"),
    "the last row is missing": (without(34), "episode 1 has 14 frames in data/, but 15 in meta/episodes"),
    "an episode is missing": (without(*range(20, 35)), "episode 1 has 0 frames in data/, but 15"),
    "an episode has no number": (column("episode_index", lambda e: [None, *e[1:]]), "has the episode_index nan"),
    "a negative episode": (column("episode_index", lambda e: [-1 - i for i in e]), "has the episode_index -4"),
    "another time": (column("timestamp", lambda t: [*t[:30], t[30] + 2e-4, *t[31:]]), "frame 10 has the timestamp"),
    "no time": (column("timestamp", lambda t: [None, *t[1:]]), "episode 0: frame 0 has the timestamp nan"),
    "a constant index": (column("index", lambda i: [0] * len(i)), "episode 0: frame 1 has the index 0 instead of 1"),
    "an index for each episode": (lambda t: replace(t, "index", t["frame_index"].to_pylist()), "the same index"),
    "a null index": (column("index", lambda i: [None, *i[1:]]), "episode 0: frame 0 has the index nan"),
    "no rows": (lambda table: table.slice(0, 0), "episode 0 has 0 frames in data/"),
    "a column twice": (lambda table: table.append_column(ACTION, table[ACTION]), "2 times"),
    "huge numbers": (column(ACTION, lambda a: [[1e300] * 6] * len(a)), "not finite"),
    "numbers that no table has": (column(ACTION, lambda a: [[1e30] * 6] * len(a)), "or larger than"),
    "truth values": (column(ACTION, lambda a: [[True] * 6] * len(a)), "must be lists of numbers, but is"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_that_are_not_complete_are_refused(tiny, tmp_path, kind):
    function, words = FRAMES[kind]
    path = change(tiny, tmp_path / "damaged", function)
    with pytest.raises(dataset.DatasetError) as error:
        joints_rad(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


UNUSUAL = {key: {"shape": [6.0], "names": JOINTS_POS, "unit": "deg"} for key in (STATE, ACTION)}
SOUND = {
    "frames as floats": dict(table=column("frame_index", lambda f: [float(i) for i in f])),
    "exact times": dict(table=lambda t: replace(t, "timestamp", [i / 30 for i in t["frame_index"].to_pylist()])),
    "no times": dict(table=bare(lambda table: table)),
    "30 fps as a float": dict(fps=30.0),
    "shapes as floats": dict(features=UNUSUAL),
}


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_only_unusual_is_read(tiny, tmp_path, kind):
    path = change(tiny, tmp_path / "unusual", **SOUND[kind])
    assert all(map(np.array_equal, joints_rad(path), joints_rad(tiny)))


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tiny, tmp_path):
    path = change(tiny, tmp_path / "v21", codebase_version="v2.1")
    (path / "data" / "chunk-000" / "file-000.parquet").rename(path / "data" / "chunk-000" / "episode_000000.parquet")
    os.mkfifo(path / "meta" / "episodes.jsonl")
    with pytest.raises(dataset.DatasetError, match="episodes.jsonl: is not a file"):
        joints_rad(path)


def test_the_longest_name_of_a_dataset_can_be_written(tmp_path):
    """Its temporary name is no longer."""
    path, joints = tmp_path / ("a" * 255), np.full((5, 6), 0.25)
    dataset.write_dataset(path, [{STATE: joints, ACTION: joints}])
    np.testing.assert_allclose(joints_rad(path)[0], joints, atol=1e-6)


def test_a_recording_without_a_success_is_refused_in_one_line(tmp_path, monkeypatch):
    flags = f"--base-policy zero --episodes 1 --only-successes --dataset {tmp_path / 'none'}"
    line = error_of(monkeypatch, "so101.record", *flags.split())
    assert "--only-successes: none of 1 episodes succeeded; nothing is written" in line
    assert not (tmp_path / "none").exists()


def test_lengths_of_v21_are_compared(tiny, tmp_path):
    path = change(tiny, tmp_path / "v21", codebase_version="v2.1")
    (path / "data" / "chunk-000" / "file-000.parquet").rename(path / "data" / "chunk-000" / "episode_000000.parquet")
    listed, rows = path / "meta" / "episodes.jsonl", [{"episode_index": i, "length": n} for i, n in enumerate(LENGTHS)]
    assert all(map(np.array_equal, joints_rad(path), joints_rad(tiny)))  # without the list
    for lines, words in (
        ([*map(json.dumps, rows), ""], None),
        (map(json.dumps, rows[:3]), "episode 3 has 9 frames in data/, but 0 in meta/episodes"),
        (map(json.dumps, [{**rows[0], "length": 21}, *rows[1:]]), "episode 0 has 20 frames in data/, but 21"),
        (map(json.dumps, [rows[0], *rows]), "lists an episode twice"),
        (map(json.dumps, [{**rows[0], "length": 10**400}, *rows[1:]]), "is damaged"),
        (map(json.dumps, [{**rows[0], "length": None}, *rows[1:]]), "is damaged"),
        (["[1]"], "is damaged"),
        (["{"], "is damaged"),
        (["[" * 100_000], "is damaged"),
    ):
        listed.write_text("\n".join(lines))
        if words is None:
            assert len(joints_rad(path)) == 2 * len(LENGTHS)
        else:
            with pytest.raises(dataset.DatasetError, match=words):
                joints_rad(path)


def test_a_column_that_only_some_files_have_is_refused(tiny, tmp_path):
    path = change(tiny, tmp_path / "uneven", lambda table: table.slice(0, LENGTHS[0]))
    rest = pq.read_table(tiny / "data" / "chunk-000" / "file-000.parquet").slice(LENGTHS[0])
    pq.write_table(rest.drop_columns(["index"]), path / "data" / "chunk-000" / "file-001.parquet")
    with pytest.raises(dataset.DatasetError, match="not every file in data/ has the column index"):
        joints_rad(path)


def test_clones_need_the_observation_of_this_task(tiny, tmp_path, monkeypatch):
    """19 numbers of something else would be learned from in silence."""
    features = json.loads((tiny / "meta" / "info.json").read_text())["features"]
    other = {**features, ENVIRONMENT: {**features[ENVIRONMENT], "names": None}}
    path = change(tiny, tmp_path / "other", features=other)
    assert f"{ENVIRONMENT} has other names" in error_of(monkeypatch, "so101.clone", "--dataset", str(path))


def test_no_flipped_bit_changes_what_is_read(tiny, tmp_path):
    path = change(tiny, tmp_path / "flipped")
    file, wanted = path / "data" / "chunk-000" / "file-000.parquet", joints_rad(tiny)
    rng, refused = np.random.default_rng(0), 0
    content = file.read_bytes()
    for position, bit in zip(rng.integers(len(content), size=60), rng.integers(8, size=60)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        file.write_bytes(flipped)
        try:
            assert all(map(np.array_equal, joints_rad(path), wanted))
        except dataset.DatasetError as error:
            refused += str(path) in str(error)
    assert refused > 20  # the rest are flips in parts of the file that reading does not need


def test_clone_acts_like_the_pusher_and_is_deterministic(demos, clone, tmp_path):
    policy, pusher, one = load_policy(f"bc:{clone}"), load_policy("jacobian"), np.ones(1, bool)
    wanted, answers = [], []
    for episode in dataset.read_dataset(demos, dataset.read_info(demos, KEYS), KEYS).values():
        pusher.reset(one)
        policy.reset(one)
        state = to_rad(episode[STATE], "deg").astype(np.float32)
        for obs in np.concatenate([state, episode[ENVIRONMENT]], 1)[:, None]:
            command = obs[:, :6].astype(np.float64)
            wanted.append(pusher.act(base_observation(obs, command), one)[0, :4])
            answers.append(policy.act(base_observation(obs, command), one)[0, :4])
    error = np.array(answers) - np.array(wanted)
    assert np.sqrt(np.mean(error**2)) < 0.2 * np.std(wanted)
    again = tmp_path / "again"
    flags = ("--dataset", str(demos), "--train-steps", "1500", "--log-dir", str(again))
    assert run_script("so101.clone", *flags).returncode == 0
    first, second = (torch.load(p, weights_only=True)["agent"] for p in (clone, next(again.glob("*/final_model.pt"))))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_disk_that_is_full_under_the_curves_of_a_clone_is_named(demos, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    line = error_of(
        monkeypatch, "so101.clone", "--dataset", str(demos), "--train-steps", "1", "--log-dir", str(tmp_path)
    )
    (run,) = tmp_path.iterdir()
    assert line.startswith(f"{run}: cannot be written (No space left on device)")


def test_a_clone_whose_last_step_goes_wrong_is_refused(demos, tmp_path, monkeypatch):
    """Its training loss, of before the step, is finite."""
    flags = ["--dataset", str(demos), "--train-steps", "1", "--learning-rate", "10", "--log-dir", str(tmp_path)]
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *_: self.param_groups[0]["params"][-1].data.fill_(np.nan)
    )
    assert "--learning-rate 10.0: the loss is nan at step 1" in error_of(monkeypatch, "so101.clone", *flags)
    assert not list(tmp_path.glob("*/final_model.pt"))


def test_clone_carries_out_a_chunk_before_it_looks_again(clone):
    policy, both, second = load_policy(f"bc:{clone}"), np.ones(2, bool), np.array([False, True])
    obs = np.random.default_rng(0).normal(size=(12, 2, 25)).astype(np.float32)
    planned = [policy.clone(o).detach().numpy() for o in obs]  # (2, 4, 6) each
    policy.reset(both)
    for step in range(6):
        np.testing.assert_allclose(
            policy.act(base_observation(obs[step], np.zeros((2, 6))), both),
            planned[step // 4 * 4][:, step % 4],
            atol=1e-6,
        )
    policy.reset(second)  # the first goes on with step 2 of its chunk
    answer = policy.act(base_observation(obs[6], np.zeros((2, 6))), both)
    np.testing.assert_allclose(answer, [planned[4][0, 2], planned[6][1, 0]], atol=1e-6)
    policy.act(base_observation(obs[7], np.zeros((2, 6))), second)  # a step of the second alone
    answer = policy.act(base_observation(obs[8], np.zeros((2, 6))), both)
    np.testing.assert_allclose(answer, [planned[4][0, 3], planned[6][1, 2]], atol=1e-6)


def test_clone_keeps_all_that_is_needed_to_rebuild_it(clone, tmp_path, monkeypatch):
    """No default of today decides about a clone of yesterday; what does not fit is named."""
    from so101 import clone as script

    obs = np.random.default_rng(0).normal(size=(3, 25)).astype(np.float32)
    before = load_policy(f"bc:{clone}").clone(obs)
    monkeypatch.setattr(script.Args, "hidden_size", 7)
    monkeypatch.setattr(script.Args, "chunk_size", 2)
    assert torch.equal(load_policy(f"bc:{clone}").clone(obs), before)
    saved, path = torch.load(clone, weights_only=True), tmp_path / "damaged.pt"
    first = "actor.0.weight"
    for damaged in (
        {**saved, "args": {}},
        {**saved, "args": {**saved["args"], "hidden_size": 64}},
        {**saved, "args": {**saved["args"], "hidden_size": "many"}},
        {**saved, "args": {**saved["args"], "chunk_size": 10**9}},
        {**saved, "agent": {**saved["agent"], first: saved["agent"][first] * torch.inf}},
        {**saved, "agent": {}},
        {**saved, "script": "nowhere.py"},
        {key: value for key, value in saved.items() if key != "script"},
    ):
        save_tensors(path, damaged)
        with pytest.raises(SO101Error, match=str(path) + "|chunk-size"):
            load_policy(f"bc:{path}")


def broken(demos: Path, to: Path, info: dict | None = None, **columns) -> Path:
    """A copy of a dataset with other metadata (None as value: without the key), or other columns (None: without)."""
    shutil.copytree(demos, to)
    path = to / "meta" / "info.json"
    content = json.loads(path.read_text()) | (info or {})
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    file = next((to / "data").glob("*/*.parquet"))
    table = pq.read_table(file)
    for name, column in columns.items():
        name = {"state": STATE, "action": ACTION}.get(name, name)
        table = table.drop_columns([name])
        if column is not None:
            table = table.append_column(name, pa.array(column(len(table))))
    pq.write_table(table, file)
    return to


FEATURE = {"dtype": "float32", "shape": [6], "names": None, "unit": "rad"}
DAMAGE = {
    "15 fps": ({"fps": 15}, "15 fps"),
    "0 fps": ({"fps": 0}, "fps"),
    "negative fps": ({"fps": -30}, "fps"),
    "no fps": ({"fps": None}, "fps"),
    "fps is text": ({"fps": "30"}, "fps"),
    "no features": ({"features": None}, "features"),
    "features is a list": ({"features": [1]}, "features"),
    "a feature is text": ({"features": {STATE: "hello", ACTION: FEATURE}}, STATE),
    "a feature without shape": ({"features": {STATE: {"dtype": "float32"}, ACTION: FEATURE}}, STATE),
    "a feature too wide": ({"features": {STATE: {**FEATURE, "shape": [7]}, ACTION: FEATURE}}, STATE),
    "many frames": ({"total_frames": 10**400}, "frames in data/, but 1000"),
    "frames as text": ({"total_frames": "400"}, "total_frames"),
    "true episodes": ({"total_episodes": True}, "total_episodes"),
    "fewer than no episodes": ({"total_episodes": -1}, "but -1 in"),
    "true fps": ({"fps": True}, "fps"),
    "fps that are no number": ({"fps": float("nan")}, "contains NaN"),
    "a version of two lines": ({"codebase_version": "v3.0\nv3.0"}, "version"),
    "a version in a list": ({"codebase_version": ["v3.0"]}, "version"),
    "a version close by": ({"codebase_version": "v2.0"}, "'v2.0'"),
    "a long version": ({"codebase_version": "v" * 10_000}, "version"),
    "a unit that is a number": ({"features": {STATE: {**FEATURE, "unit": 3}, ACTION: FEATURE}}, "unit"),
    "an unknown unit": (
        {"features": {STATE: {**FEATURE, "unit": "furlong"}, ACTION: FEATURE}},
        "furlong",
    ),
    "an old version": ({"codebase_version": "v1.6"}, "v1.6"),
    "no number of episodes": ({"total_episodes": "many"}, "total_episodes"),
    "another number of episodes": ({"total_episodes": 400}, "400"),
    "a scalar action": ({"action": lambda n: [1.0] * n}, ACTION),
    "a narrow action": ({"action": lambda n: [[1.0] * 5] * n}, ACTION),
    "a wide action": ({"action": lambda n: [[1.0] * 7] * n}, ACTION),
    "a ragged action": ({"action": lambda n: [[1.0] * 6] * (n - 1) + [[1.0]]}, ACTION),
    "an action of text": ({"action": lambda n: [["a"] * 6] * n}, ACTION),
    "an action with a gap": ({"action": lambda n: [None] + [[1.0] * 6] * (n - 1)}, ACTION),
    "an action with a null": ({"action": lambda n: [[None] * 6] * n}, ACTION),
    "an action that is not finite": ({"action": lambda n: [[float("nan")] * 6] * n}, "not finite"),
    "no action": ({"action": None}, "has no column action"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_datasets_end_with_one_line(demos, tmp_path, monkeypatch, kind):
    change, word = DAMAGE[kind]
    columns = {key: value for key, value in change.items() if key in ("action", "frame_index")}
    info = {key: value for key, value in change.items() if key not in columns}
    path = broken(demos, tmp_path / "broken", info, **columns)
    for script, flag in (("so101.clone", "--dataset"), ("so101.replay", "--dataset")):
        line = error_of(monkeypatch, script, flag, str(path))
        assert word in line and "\n" not in line and len(line) < 1000


def test_unreadable_datasets_end_with_one_line(demos, tmp_path, monkeypatch):
    path = broken(demos, tmp_path / "info")
    info = path / "meta" / "info.json"
    deep, digits = b"[" * 100_000, b"9" * 5000
    twice = json.dumps(json.loads(info.read_text())).replace('"fps"', '"fps": 15, "fps"').encode()
    for content in (
        twice,
        b"",
        b"[",
        b"null",
        b"3",
        b'"text"',
        b"{}",
        b"\xff\xfe{}",
        '"é"'.encode("latin-1"),
        deep,
        digits,
    ):
        info.write_bytes(content)
        assert str(path) in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    info.unlink()
    assert "meta/info.json is missing" in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    info.symlink_to("info.json")
    assert "cannot be read (Too many" in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    info.unlink()
    info.mkdir()
    assert "cannot be read (Is a directory" in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    info.rmdir()
    os.mkfifo(info)  # opening it would wait for ever
    assert "is not a file" in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    path = broken(demos, tmp_path / "truncated")
    file = next((path / "data").glob("*/*.parquet"))
    file.write_bytes(file.read_bytes()[:1000])
    assert str(path) in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    file.unlink()
    file.mkdir()
    assert str(path) in error_of(monkeypatch, "so101.clone", "--dataset", str(path))
    file.rmdir()
    assert "no parquet file" in error_of(monkeypatch, "so101.replay", "--dataset", str(path))
    assert "--units rad" in error_of(monkeypatch, "so101.clone", "--dataset", str(demos), "--units", "rad")
    assert "--episode 99" in error_of(monkeypatch, "so101.replay", "--dataset", str(demos), "--episode", "99")
    inside = str(demos / "meta" / "info.json")
    line = error_of(monkeypatch, "so101.replay", "--dataset", str(demos), "--json", inside)
    assert "which is only read" in line and dataset.read_info(demos, KEYS)


def test_replay_of_targets_out_of_reach_is_refused(demos, tmp_path, monkeypatch):
    path = broken(demos, tmp_path / "far", action=lambda n: [[359.0] * 5 + [330.0]] * n)
    state = broken(path, tmp_path / "farther", state=lambda n: [[-350.0] * 5 + [-300.0]] * n)
    assert "Replay: asks for a joint to move by" in error_of(monkeypatch, "so101.replay", "--dataset", str(state))


def test_episodes_start_where_they_are_told():
    envs = SO101ResidualVectorEnv(2, randomize=False)
    qpos = np.tile([0.3, 0.2, 0.1, 1.2, 0.0, 0.1, 0.25, 0.05, 0.0005, 0.2], (2, 1))
    obs, _ = envs.reset(seed=0, options={"qpos": qpos})
    np.testing.assert_allclose(obs[:, :6], qpos[:, :6], atol=1e-6)
    np.testing.assert_allclose(obs[:, 12:15], qpos[:, 6:9], atol=1e-6)
    for _ in range(10):  # and rest there: the targets carry the arm's weight
        obs = envs.step(np.zeros((2, 6)))[0]
    np.testing.assert_allclose(obs[:, :6], qpos[:, :6], atol=2e-3)
