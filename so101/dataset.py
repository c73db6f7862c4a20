"""Demonstrations on disk: LeRobotDataset v3.0, written and read with pyarrow.

An episode is a dict of float32 arrays: "observation.state" (T, 6), joint positions; "action" (T, 6), absolute joint
targets; and optionally "observation.environment_state" (T, 19), the rest of the observation. Camera pictures are stored
as H.264 videos. Joints are in degrees, the gripper in 0 to 100, as LeRobot records the arm. meta/info.json contains the
unit of the joints ("unit" of a feature) if the dataset was written here. For other datasets the user gives the unit,
see so101_sim.control.to_rad. Joints are found by name. A dataset of another robot is refused, and so is one whose
frames are not complete or whose files do not fit together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so101.extras import import_extra
from so101.files import SHOWN, is_file
from so101.groot import JOINT_GROUPS
from so101.video import VideoError, decode
from so101_env import ACTION, ENVIRONMENT, ENVIRONMENT_NAMES, STATE, STATE_NAMES, TASK_TEXT, SO101Error
from so101_sim.control import JOINTS, OLD_UNIT, UNITS, Calibration, from_rad, to_rad
from so101_sim.errors import LARGEST, strict_json
from so101_sim.scene import CONTROL_HZ
from so101_sim.vector import IMAGES

if TYPE_CHECKING:
    import pyarrow

UNIT = "deg"  # unit of the joints in datasets that are written here
FEATURES = {
    STATE: {"dtype": "float32", "shape": [6], "names": STATE_NAMES, "unit": UNIT},
    ENVIRONMENT: {"dtype": "float32", "shape": [19], "names": ENVIRONMENT_NAMES, "unit": "rad/s, m, quaternion"},
    ACTION: {"dtype": "float32", "shape": [6], "names": STATE_NAMES, "unit": UNIT},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
# LeRobot's robot types of this arm. An SO-100 has the same joints, zeros and directions, so its recordings fit as well.
# The last is the simulated arm of this project's plug-in.
ROBOTS = ("so101_follower", "so100_follower", "so_follower", "so101_residual_sim")
OLD_ROBOTS = ("so101", "so100")  # before LeRobot's change of calibration, with joints named main_shoulder_pan etc.
TIMESTAMP_TOLERANCE_S = 1e-4  # LeRobot's
FRAMES_PER_FILE = 500_000  # keeps a file below the format's 100 MB
# A key frame every other frame, and no references to later frames: training reads single frames at random.
VIDEO_OPTIONS = ["-crf", "20", "-g", "2", "-bf", "0"]
FRAMES_PER_SAMPLE = 10  # the statistics of pictures use every tenth frame


class DatasetError(SO101Error):
    """A dataset cannot be read or written. The message names the file and says what to do."""


def _pyarrow() -> tuple[types.ModuleType, types.ModuleType]:
    """pyarrow and pyarrow.parquet. Raises SO101Error if they are not installed."""
    return tuple(import_extra(module, "data", "a LeRobotDataset") for module in ("pyarrow", "pyarrow.parquet"))


def write_dataset(
    path: Path, episodes: list[dict[str, np.ndarray]], cameras: Mapping[str, Iterable[np.ndarray]] | None = None
) -> None:
    """Write episodes as a LeRobotDataset v3.0 into a new directory. The write is atomic.

    Args:
        path: the directory; it must not exist.
        episodes: arrays by name, see the head of this file, with joint angles in rad.
        cameras: by name, the pictures (H, W, 3) uint8 of all frames of all episodes, in order; they are read once.

    Raises:
        DatasetError: path exists or cannot be written, there are no episodes, or a camera has not as many pictures as
            there are frames.
        SO101Error: pyarrow is not installed.
    """
    _pyarrow()
    _check_new(path)
    if not episodes:
        raise DatasetError(f"{path}: there is no episode to write")
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"{path.name[:SHOWN]}.tmp", dir=path.parent
        ) as temporary:  # always a new one
            whole = Path(temporary) / "dataset"  # with the usual permissions; those of `temporary` are private
            _write_files(whole, episodes, cameras or {})
            _check_new(path)
            os.rename(whole, path)
    except OSError as error:
        reason = _reason(error)
        raise DatasetError(f"{path}: cannot be written ({reason}); free the disk, or name another place") from error


def _check_new(path: Path) -> None:
    """Raise DatasetError if there is anything at path, also a symbolic link that leads nowhere."""
    if os.path.lexists(path):
        raise DatasetError(f"{path} exists; delete it or name another directory")


def _reason(error: BaseException) -> str:
    """An error in one short line: libraries' own messages can be empty or have many lines."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{text.splitlines()[0]:.200}"


def _write_files(
    root: Path, episodes: list[dict[str, np.ndarray]], cameras: Mapping[str, Iterable[np.ndarray]]
) -> None:
    """Write all files of a dataset into the directory root."""
    pa, pq = _pyarrow()
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    features = {key: feature for key, feature in FEATURES.items() if key != ENVIRONMENT or key in episodes[0]}
    everything, rows, tables, file_index, first_frame = [], [], [], 0, 0
    for number, episode in enumerate(episodes):
        length = len(episode[ACTION])
        if tables and sum(map(len, tables)) + length > FRAMES_PER_FILE:
            _write_data(root, file_index, tables)
            tables, file_index = [], file_index + 1
        frames = np.arange(length)
        arrays = {
            **{key: np.asarray(episode[key], np.float32) for key in (STATE, ENVIRONMENT, ACTION) if key in features},
            "timestamp": (frames / CONTROL_HZ).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, number),
            "index": first_frame + frames,
            "task_index": np.zeros(length, np.int64),
        }
        for key, feature in features.items():
            if length == 0 or arrays[key].reshape(length, -1).shape[1:] != tuple(feature["shape"]):
                raise DatasetError(f"episode {number}: {key} has the wrong shape {arrays[key].shape}")
        for key in (STATE, ACTION):
            arrays[key] = from_rad(episode[key], UNIT).astype(np.float32)
        tables.append(pa.table({key: _column(arrays[key]) for key in features}))
        everything.append(arrays)
        rows.append(
            {
                "episode_index": number,
                "tasks": [TASK_TEXT],
                "length": length,
                "dataset_from_index": first_frame,
                "dataset_to_index": first_frame + length,
                "data/chunk_index": file_index // 1000,
                "data/file_index": file_index % 1000,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{f"stats/{key}/{name}": s for key in features for name, s in _stats(arrays[key]).items()},
            }
        )
        first_frame += length
    _write_data(root, file_index, tables)
    stats = {key: _stats(np.concatenate([arrays[key] for arrays in everything])) for key in features}
    for camera, frames in cameras.items():
        key = IMAGES + camera
        features[key], sample = _write_video(root / VIDEO_PATH.format(video_key=key, **NO_INDEX), frames, first_frame)
        stats[key] = _image_stats(sample)
        for row in rows:
            start, end = row["dataset_from_index"], row["dataset_to_index"]
            row |= {f"videos/{key}/{name}": 0 for name in NO_INDEX}
            row |= {f"videos/{key}/from_timestamp": start / CONTROL_HZ, f"videos/{key}/to_timestamp": end / CONTROL_HZ}
            # the sampled frames of the episode; if it is too short to have one, the next sampled frame
            first = min(-(-start // FRAMES_PER_SAMPLE), len(sample) - 1)
            own_stats = _image_stats(sample[first : max(-(-end // FRAMES_PER_SAMPLE), first + 1)])
            row |= {f"stats/{key}/{name}": value for name, value in own_stats.items()}
    episodes_path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    pq.write_table(pa.Table.from_pylist(rows), episodes_path, write_page_checksum=True)
    _write_meta(root / "meta", len(episodes), first_frame, features, stats, list(cameras))


def _write_meta(
    directory: Path, episodes: int, frames: int, features: dict[str, Any], stats: dict[str, Any], cameras: list[str]
) -> None:
    """Write what describes a dataset, with so many episodes and frames, as a whole."""
    pa, pq = _pyarrow()
    # LeRobot reads the tasks with pandas and expects their text as the index, which pandas' own metadata define
    index = {
        "index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0",
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
            for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ],
    }  # fmt: skip
    tasks = pa.table({"task_index": [0], "task": [TASK_TEXT]}).replace_schema_metadata({"pandas": json.dumps(index)})
    pq.write_table(tasks, directory / "tasks.parquet", write_page_checksum=True)
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so101_follower",
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": CONTROL_HZ,
        "splits": {"train": f"0:{episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": VIDEO_PATH if cameras else None,
        "features": features,
    }
    # GR00T's fine-tuning reads the names of the numbers from modality.json; LeRobot ignores it
    groups = {name: {"start": group.start, "end": group.stop} for name, group in JOINT_GROUPS.items()}
    modality = {
        "state": groups,
        "action": groups,
        "video": {camera: {"original_key": IMAGES + camera} for camera in cameras},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    for name, content in (("stats", stats), ("info", info), ("modality", modality)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")


VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
OLD_VIDEO_PATH = "videos/chunk-{chunk:03d}/{video_key}/episode_{episode:06d}.mp4"  # v2.1
NO_INDEX = {"chunk_index": 0, "file_index": 0}  # there is one video file for each camera


def _write_video(path: Path, frames: Iterable[np.ndarray], length: int) -> tuple[dict[str, Any], np.ndarray]:
    """Encode `length` pictures (H, W, 3) uint8 at exactly CONTROL_HZ.

    Returns the entry of the feature in info.json, and the sampled pictures (n, H, W, 3) for statistics.
    """
    import imageio.v2 as imageio
    import imageio_ffmpeg

    path.parent.mkdir(parents=True)
    sample, count, shape = [], 0, (0, 0, 3)
    # yuv420p keeps colours at half the resolution, so sides must be even
    options = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 1, "output_params": VIDEO_OPTIONS}
    with imageio.get_writer(path, fps=CONTROL_HZ, ffmpeg_log_level="quiet", **options) as writer:
        for frame in frames:
            if count % FRAMES_PER_SAMPLE == 0:
                sample.append(frame)
            writer.append_data(frame)
            count, shape = count + 1, frame.shape
    if count != length:
        raise DatasetError(f"{path}: has {count} pictures for {length} frames")
    written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    if written != length:
        raise OSError(f"{path.name} has {written} of {length} frames")
    details = {
        "height": shape[0], "width": shape[1], "codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False,
        "fps": CONTROL_HZ, "channels": 3,
    }  # fmt: skip
    feature = {"dtype": "video", "shape": list(shape), "names": ["height", "width", "channels"]}
    info = {f"video.{name}": value for name, value in details.items()} | {"has_audio": False}
    return {**feature, "info": info}, np.array(sample)


def _image_stats(frames: np.ndarray) -> dict[str, list]:
    """Statistics of pictures (n, H, W, 3) uint8 in LeRobot's format: per channel, (3, 1, 1), in [0, 1]."""
    pixels = frames.reshape(-1, 3)
    values: dict[str, Any] = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
    quantiles = np.quantile(pixels, (0.01, 0.10, 0.50, 0.90, 0.99), axis=0)
    values |= dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles))
    stats = {name: (value / 255.0).reshape(3, 1, 1).tolist() for name, value in values.items()}
    return stats | {"count": [len(frames)]}


def read_info(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read and check meta/info.json of a LeRobotDataset v3.0 or v2.1 of an SO-101 at 30 fps.

    Args:
        path: directory of the dataset.
        keys: names of the features that will be read.

    Raises:
        DatasetError: the file is missing or invalid, or the dataset lacks a feature, or it is not of an SO-101. The
            message names the problem.
    """
    info_path = path / "meta" / "info.json"

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise DatasetError(f"{info_path}: {problem}")

    require(not os.path.exists(info_path) or info_path.is_dir() or is_file(info_path), "is not a file")
    try:
        info = strict_json(info_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(f"{path}: is not a LeRobotDataset, meta/info.json is missing") from error
    except OSError as error:
        raise DatasetError(f"{info_path}: cannot be read ({_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{info_path}: is not valid JSON ({_reason(error)})") from error
    require(isinstance(info, dict), "does not contain a map; is it a LeRobotDataset?")
    version, fps, features, robot = (info.get(key) for key in ("codebase_version", "fps", "features", "robot_type"))
    require(version in ("v3.0", "v2.1"), f"has version {version!r:.80}; known are v3.0 and v2.1, convert with LeRobot")
    require(fps == CONTROL_HZ, f"has {fps!r:.80} fps, the simulation runs at {CONTROL_HZ}")  # true is 1
    require(isinstance(features, dict), "features is missing; is it a LeRobotDataset?")
    for key in ("total_episodes", "total_frames"):
        require(type(info.get(key, 0)) is int, f"{key} is not a whole number")
    require("total_episodes" in info, "total_episodes is missing")
    known = f"if it is an SO-101, write {ROBOTS[0]} there"
    require(robot in (*UNNAMED, *ROBOTS, *OLD_ROBOTS), f"robot_type is {robot!r:.80}; {known}")
    for key in keys:
        feature, width = features.get(key), FEATURES[key]["shape"][0]
        fits = isinstance(feature, dict) and feature.get("shape") == [width]
        require(fits, f"must have the feature {key} with {width} numbers")
        names = _names(feature)
        if key == ENVIRONMENT:
            require(names == ENVIRONMENT_NAMES, f"{key} has other names than in datasets of this project")
            continue
        unit = feature.get("unit")
        require(unit in (None, *UNITS), f"the unit of {key} is {unit!r:.80}; known are {', '.join(UNITS)}")
        require(names is not None or robot not in UNNAMED, f"{key} has no names and robot_type is missing; {known}")
        own = names is None or isinstance(names, list) and sorted(map(_joint, names)) == sorted(JOINTS)
        require(own, f"{key} has the names {names!r:.160}; the joints of an SO-101 are {', '.join(JOINTS)}")
    return info


UNNAMED = (None, "", "unknown")  # values of robot_type that say nothing


def _names(feature: dict[str, Any]) -> Any:
    """The names of a feature's numbers, which older datasets have as {"motors": names}."""
    names = feature.get("names")
    while isinstance(names, dict) and len(names) == 1:
        (names,) = names.values()
    return names


def _joint(name: Any) -> str:
    """The joint that a name of LeRobot means: shoulder_pan for shoulder_pan.pos and for main_shoulder_pan."""
    return str(name).removeprefix("main_").removesuffix(".pos")


def read_dataset(path: Path, info: dict[str, Any], keys: tuple[str, ...]) -> dict[int, dict[str, np.ndarray]]:
    """Read features of a LeRobotDataset. Pages are compared with their checksums if the file has them.

    Args:
        path: directory of the dataset.
        info: the result of read_info.
        keys: names of the features.

    Returns:
        By episode_index, in order, a dict of float32 arrays (T, width), with joints in JOINTS order and in the unit of
        the dataset.

    Raises:
        DatasetError: files cannot be read, their columns are not as info describes them, frames are missing, repeated
            or out of order, or data/ does not fit meta/.
        SO101Error: pyarrow is not installed.
    """
    files = _files(path / "data", "file-" if info["codebase_version"] == "v3.0" else "episode_")
    if not files:
        raise DatasetError(f"{path}: data/ has no parquet file with a name of LeRobot {info['codebase_version']}")
    parts: dict[str, list[np.ndarray]] = {}
    for file in files:  # each is converted by itself: files of one dataset can differ in their types
        columns = _read_columns(file, [*keys, "episode_index", "frame_index"], ["timestamp", "index"])
        for name, column in columns.items():
            where = f"{file}: {name}"
            array = _matrix(column, FEATURES[name]["shape"][0], where) if name in keys else _numbers(column, where)
            parts.setdefault(name, []).append(array)
    if uneven := [name for name, each in parts.items() if len(each) < len(files)]:
        raise DatasetError(f"{path}: not every file in data/ has the column {uneven[0]}")
    arrays = {name: np.concatenate(each) for name, each in parts.items()}
    for key, names in ((key, _names(info["features"][key])) for key in keys if key != ENVIRONMENT):
        if names is not None:
            arrays[key] = arrays[key][:, [[*map(_joint, names)].index(joint) for joint in JOINTS]]
    order = np.argsort(arrays["episode_index"], kind="stable")
    arrays = {name: array[order] for name, array in arrays.items()}
    whole = np.isfinite(arrays["episode_index"]) & (arrays["episode_index"] % 1 == 0) & (arrays["episode_index"] >= 0)
    if not whole.all():
        raise DatasetError(f"{path}: a frame has the episode_index {arrays['episode_index'][~whole][0]:g}")
    starts = np.flatnonzero(np.diff(arrays["episode_index"], prepend=-1))
    split = {name: np.split(array, starts[1:]) for name, array in arrays.items()}
    episodes = {}
    for i in range(len(starts)):
        episode = {name: each[i] for name, each in split.items()}
        number = int(episode["episode_index"][0])
        _check_frames(episode, f"{path}: episode {number}")
        episodes[number] = {key: episode[key] for key in keys}
    if "index" in arrays and len(np.unique(arrays["index"])) < len(arrays["index"]):
        raise DatasetError(f"{path}: two frames have the same index; episodes are there twice")
    _check_counts(path, info, {number: len(episode[keys[0]]) for number, episode in episodes.items()})
    return episodes


def _check_frames(episode: dict[str, np.ndarray], name: str) -> None:
    """Raise DatasetError unless the frames of an episode, in the order of the file, are complete, each there once."""
    frames = np.arange(len(episode["frame_index"]))
    expected = {"frame_index": (frames, 0.0)}
    if "timestamp" in episode:
        seconds = frames / CONTROL_HZ  # in long recordings the rounding of float32 is larger than the tolerance
        expected["timestamp"] = (seconds, TIMESTAMP_TOLERANCE_S + np.finfo(np.float32).eps * seconds)
    if "index" in episode:
        expected["index"] = (frames + np.nan_to_num(episode["index"][0]), 0.0)
    for key, (values, tolerance) in expected.items():
        wrong = np.flatnonzero(~(np.abs(episode[key] - values) <= tolerance))
        if wrong.size:
            found, right = episode[key][wrong[0]], values[wrong[0]]
            text = f"frame {wrong[0]} has the {key} {found:.10g} instead of {right:.10g}"
            raise DatasetError(f"{name}: {text}; frames are damaged, missing, repeated or out of order")


def _check_counts(path: Path, info: dict[str, Any], lengths: dict[int, int]) -> None:
    """Raise DatasetError unless the lengths of the episodes, by number, are those in meta/."""
    found = {"total_episodes": len(lengths), "total_frames": sum(lengths.values())}
    listed = _listed_lengths(path, info["codebase_version"])
    for number in sorted({*lengths, *listed}) if listed is not None else ():
        here, there = lengths.get(number, 0), listed.get(number, 0)
        if here != there:
            text = f"episode {number:.10g} has {here} frames in data/, but {there:.10g} in meta/episodes"
            raise DatasetError(f"{path}: {text}; load the dataset again, completely")
    for key, count in found.items():
        if count != info.get(key, count):
            text = f"has {count} {key.removeprefix('total_')} in data/, but {info[key]!r:.40} in meta/info.json"
            raise DatasetError(f"{path}: {text}; load the dataset again, completely")
    if not lengths:
        raise DatasetError(f"{path}: has no frames")


def _listed_lengths(path: Path, version: str) -> dict[float, float] | None:
    """The lengths of the episodes by number in meta/episodes (v3.0) or meta/episodes.jsonl (v2.1); None without it."""
    if version == "v3.0":
        name = path / "meta" / "episodes"
        rows, files = [], _files(name, "file-")
        for file in files:
            columns = _read_columns(file, ["episode_index", "length"], [])
            rows += zip(*(_numbers(column, f"{file}: {key}").tolist() for key, column in columns.items()))
    else:
        name = path / "meta" / "episodes.jsonl"
        files = [name] if os.path.lexists(name) else []
        if files and os.path.exists(name) and not is_file(name):
            raise DatasetError(f"{name}: is not a file")
        try:
            lines = [strict_json(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
            rows = [(float(line["episode_index"]), float(line["length"])) for line in lines]
        except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
            raise DatasetError(f"{name}: is damaged ({_reason(error)})") from error
    if len(dict(rows)) < len(rows):
        raise DatasetError(f"{name}: lists an episode twice")
    return dict(rows) if files else None


def _files(directory: Path, stem: str) -> list[Path]:
    """The files chunk-N/STEM-N.parquet of a directory, in order. LeRobot writes no others."""
    found = []
    for file in directory.glob("chunk-*/*.parquet"):
        if match := re.fullmatch(rf"chunk-([0-9]+)/{stem}([0-9]+)\.parquet", file.relative_to(directory).as_posix()):
            found.append((int(match[1]), int(match[2]), file))
    if odd := [file for *_, file in found if os.path.exists(file) and not (file.is_dir() or is_file(file))]:
        raise DatasetError(f"{odd[0]}: is not a file")
    return [file for *_, file in sorted(found)]


def _read_columns(file: Path, columns: list[str], optional: list[str]) -> dict[str, pyarrow.ChunkedArray]:
    """The columns of a parquet file by name; the optional ones if it has them. Raises DatasetError if it cannot."""
    pa, pq = _pyarrow()
    try:
        # an absolute path, since pyarrow takes the beginning of a name with a colon for a protocol
        with pq.ParquetFile(file.absolute(), page_checksum_verification=True) as parquet:
            names = [name for name in (*columns, *optional) if name in parquet.schema_arrow.names]
            table = parquet.read(names)
            read = {name: table[name] for name in names}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{file}: is damaged or not a parquet file ({_reason(error)})") from error
    if missing := [name for name in columns if name not in read]:
        raise DatasetError(f"{file}: has no column {missing[0]}")
    return read


def _matrix(column: pyarrow.ChunkedArray, width: int, name: str) -> np.ndarray:
    """A column of lists of `width` finite numbers as (T, width) float32. Raises DatasetError for anything else."""
    (pa, _), kind = _pyarrow(), column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DatasetError(f"{name} must be lists of numbers, but is {kind}")
    rows = column.to_pylist()
    if any(row is None or len(row) != width or None in row for row in rows):
        raise DatasetError(f"{name} must have {width} numbers in every frame")
    array = np.array(rows, np.float64).reshape(-1, width)
    if not (np.abs(array) <= LARGEST).all():
        raise DatasetError(f"{name} has numbers that are not finite, or larger than {LARGEST:g}")
    return array.astype(np.float32)


def _numbers(column: pyarrow.ChunkedArray, name: str) -> np.ndarray:
    """A column of numbers as (T,) float64, nan where there is none. Raises DatasetError for anything else."""
    pa, _ = _pyarrow()
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise DatasetError(f"{name} must be numbers, but is {column.type}")
    return column.cast(pa.float64(), safe=False).to_numpy()


def unit_of(info: dict[str, Any], key: str, given: str | None, flag: str = "--units") -> str:
    """Unit of a joint feature, one of so101_sim.control.UNITS.

    Args:
        info: the result of read_info.
        key: name of the feature.
        given: the user's unit, for a dataset without a unit.
        flag: how the user gives it, for messages.

    Raises:
        DatasetError: there is no unit, or the user's is unknown, contradicts that of the dataset, or does not fit the
            calibration with which the dataset was recorded.
    """
    feature, robot = info["features"][key], info.get("robot_type")
    own, names = feature.get("unit"), _names(feature) or []
    old = robot in OLD_ROBOTS or any(name.startswith("main_") for name in names)
    new = robot in ROBOTS or any(name.endswith(".pos") for name in names)
    found = f"robot_type {robot}" + (f" and joints named {names[0]} etc." if names else "")
    if given is not None and given not in UNITS:
        raise DatasetError(f"{flag} {given}: must be one of {', '.join(UNITS)}")
    if own is None and given is None:
        fitting = OLD_UNIT if old else "deg, norm or rad"
        raise DatasetError(f"the dataset does not contain the unit of {key}: give it with {flag} {fitting}")
    if own is not None and given is not None and own != given:
        raise DatasetError(f"{flag} {given}: {key} is in {own} according to the dataset; drop the flag")
    if own is None and old and given != OLD_UNIT:
        text = f"{key} has {found}, as before LeRobot's change of calibration: pass {flag} {OLD_UNIT}"
        newer = f"or, if it is newer, write {ROBOTS[0]} and {JOINTS[0]}.pos etc. in meta/info.json"
        raise DatasetError(f"{flag} {given}: {text}, {newer}")
    if own is None and new and not old and given == OLD_UNIT:
        text = f"{key} has {found}, as after LeRobot's change of calibration: pass {flag} deg or norm"
        raise DatasetError(f"{flag} {given}: {text}")
    return own or given


def joints_rad(
    info: dict[str, Any], episode: dict[str, np.ndarray], given: str | None, name: str,
    ranges: Calibration | None = None, flag: str = "--units",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Joint positions and joint targets (T, 6) of an episode, rad.

    Args:
        info: the result of read_info.
        episode: a value of the result of read_dataset.
        given: the user's unit, for a dataset without a unit.
        name: the episode's name, for messages.
        ranges: joint ranges of the arm's calibration, see so101_sim.control.to_rad.
        flag: as in unit_of.

    Raises:
        DatasetError: as unit_of, or the numbers are impossible in this unit.
    """
    units = [unit_of(info, key, given, flag) for key in (STATE, ACTION)]
    try:
        state, action = (to_rad(episode[key], unit, ranges) for key, unit in zip((STATE, ACTION), units))
    except SO101Error as error:
        raise DatasetError(f"{name}: {error}; check {flag}") from error
    return state, action


def _column(array: np.ndarray) -> pyarrow.Array:
    """A parquet column of an array (T,) or (T, width): numbers, or lists of fixed length."""
    pa, _ = _pyarrow()
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])


def _stats(array: np.ndarray) -> dict[str, list]:
    """Statistics over frames in LeRobot's format, lists with one number per component."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    functions = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}
    return {name: function(rows, axis=0).tolist() for name, function in functions.items()} | {"count": [len(rows)]}


def _write_data(root: Path, file_index: int, tables: list[pyarrow.Table]) -> None:
    """Write one data file with a row group for each episode."""
    _, pq = _pyarrow()
    path = root / "data" / f"chunk-{file_index // 1000:03d}" / f"file-{file_index % 1000:03d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema, write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table)


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def find_videos(path: Path, info: dict[str, Any], camera: str) -> dict[int, tuple[Path, float]]:
    """The videos of a camera: by episode_index the file, and where in it the episode begins, s.

    Args:
        path: directory of the dataset.
        info: the result of read_info.
        camera: its name in the dataset, as top for observation.images.top.

    Raises:
        DatasetError: there is no such camera, or meta/ does not say where its videos are.
    """
    key, features = IMAGES + camera, info["features"]
    cameras = [name.removeprefix(IMAGES) for name in features if name.startswith(IMAGES)]
    if camera not in cameras:
        raise DatasetError(f"{path}: has no camera {camera:.80}, only {', '.join(cameras)[:200] or 'joints'}")
    if not isinstance(features[key], dict) or features[key].get("dtype") != "video":
        raise DatasetError(f"{path}: {key:.80} is not stored as video; record with videos")
    if info["codebase_version"] == "v2.1":
        return {
            number: (path / OLD_VIDEO_PATH.format(chunk=number // 1000, video_key=key, episode=number), 0.0)
            for number in range(info["total_episodes"])
        }
    columns = ["episode_index", *(f"videos/{key}/{name}" for name in (*NO_INDEX, "from_timestamp"))]
    videos = {}
    for file in _files(path / "meta" / "episodes", "file-"):
        read = _read_columns(file, columns, [])
        rows = zip(*(_numbers(read[column], f"{file}: {column}") for column in columns))
        for number, chunk_index, file_index, begin_s in rows:
            indices = {"chunk_index": chunk_index, "file_index": file_index}
            whole = all(0 <= each < 1e6 and each % 1 == 0 for each in (number, *indices.values()))
            if not whole or not 0 <= begin_s < 1e6:
                raise DatasetError(f"{file}: says nothing usable about the videos of episode {number:.10g}")
            indices = {name: int(index) for name, index in indices.items()}
            videos[int(number)] = path / VIDEO_PATH.format(video_key=key, **indices), float(begin_s)
    return videos


DEMUXER = ("-f", "mp4")  # named, since another one could follow references in a file to other files


def check_video(file: Path, frames: int) -> None:
    """Raise DatasetError unless a file is a video of CONTROL_HZ pictures per second, of which it has as many or more.

    Its pictures are not decoded.
    """
    import imageio_ffmpeg

    if not is_file(file):
        raise DatasetError(f"{file}: is missing or not a file; load the dataset again, completely")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *DEMUXER, "-i", str(file.absolute()), "-map", "0:v:0"]
    command += ["-c", "copy", "-f", "framecrc", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines()
    times = [int(line.split(",")[2]) for line in lines if not line.startswith("#")]
    base = next((line.split()[-1] for line in lines if line.startswith("#tb")), None)
    if done.returncode or not times or base is None:
        raise DatasetError(f"{file}: is not an MP4 video that FFmpeg can read; load the dataset again, completely")
    ticks_per_s, seconds = base.split("/")[::-1]
    expected = np.arange(len(times)) / CONTROL_HZ
    shown = (np.sort(times) - min(times)) * int(seconds) / int(ticks_per_s)
    if np.abs(shown - expected).max() > 0.5 / CONTROL_HZ:
        raise DatasetError(f"{file}: is not a video of {CONTROL_HZ} pictures per second without gaps; record again")
    if len(times) < frames:
        text = f"has {len(times)} pictures, but the dataset has {frames} frames for it"
        raise DatasetError(f"{file}: {text}; load the dataset again, completely")


def read_frames(file: Path, begin_s: float, count: int) -> Iterator[np.ndarray]:
    """`count` successive pictures (H, W, 3) uint8, RGB, of a video that `check_video` accepts.

    Args:
        file: the video.
        begin_s: time of the first picture, s.
        count: number of pictures.

    Raises:
        DatasetError: the file is missing, damaged, or no video.
    """
    # on an error in a picture FFmpeg ends; it would show another picture instead
    strict = (*DEMUXER, "-xerror", "-err_detect", "explode")
    begin = ("-ss", f"{max(0.0, begin_s - 0.5 / CONTROL_HZ):.6f}")
    read = 0
    with contextlib.closing(decode(file, (*strict, *begin))) as pictures:
        try:
            for picture in itertools.islice(pictures, count):
                read += 1
                yield picture
        except VideoError as error:
            raise DatasetError(f"{file}: is missing, damaged or not an MP4 video; load the dataset again") from error
    if read < count:
        text = f"cannot be decoded from {(begin_s + read / CONTROL_HZ):.3f} s on"
        raise DatasetError(f"{file}: {text}; load the dataset again, completely")
