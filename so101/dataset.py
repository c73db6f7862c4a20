"""Demonstrations on disk: LeRobotDataset v3.0, written and read with pyarrow.

An episode is a dict of float32 arrays: "observation.state" (T, 6), joint positions; "action" (T, 6), absolute joint
targets; and optionally "observation.environment_state" (T, 19), the rest of the observation. Camera pictures are stored
as H.264 videos. Joints are in degrees, the gripper in 0 to 100, as LeRobot records the arm. meta/info.json contains the
unit of the joints ("unit" of a feature) if the dataset was written here. For other datasets the user gives the unit,
see so101_sim.control.to_rad.
"""

from __future__ import annotations

import json
import os
import shutil
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so101.extras import import_extra
from so101.groot import JOINT_GROUPS
from so101_env import ACTION, ENVIRONMENT, ENVIRONMENT_NAMES, STATE, STATE_NAMES, TASK_TEXT, SO101Error
from so101_sim.control import from_rad
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
    if path.exists():
        raise DatasetError(f"{path} exists; delete it or name another directory")
    if not episodes:
        raise DatasetError(f"{path}: there is no episode to write")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    try:
        _write_files(temporary, episodes, cameras or {})
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]  # FFmpeg's own message has many lines
        raise DatasetError(f"{path}: cannot be written ({reason}); free the disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    pq.write_table(pa.Table.from_pylist(rows), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")

    # LeRobot reads the tasks with pandas and expects their text as the index, which pandas' own metadata define
    index = {
        "index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0",
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
            for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ],
    }  # fmt: skip
    tasks = pa.table({"task_index": [0], "task": [TASK_TEXT]}).replace_schema_metadata({"pandas": json.dumps(index)})
    pq.write_table(tasks, root / "meta" / "tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so101_follower",
        "total_episodes": len(episodes),
        "total_frames": first_frame,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": CONTROL_HZ,
        "splits": {"train": f"0:{len(episodes)}"},
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
        (root / "meta" / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")


VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
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
    """Read and check meta/info.json of a LeRobotDataset v3.0 or v2.1 at 30 fps.

    Args:
        path: directory of the dataset.
        keys: names of the features that will be read.

    Raises:
        DatasetError: the file is missing or invalid, or the dataset lacks a feature. The message names the problem.
    """
    info_path = path / "meta" / "info.json"

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise DatasetError(f"{info_path}: {problem}")

    if not info_path.is_file():
        raise DatasetError(f"{path}: is not a LeRobotDataset, meta/info.json is missing")
    try:
        info = json.loads(info_path.read_text())
    except ValueError as error:
        raise DatasetError(f"{info_path}: is not valid JSON ({error})") from error
    require(isinstance(info, dict), "does not contain a map; is it a LeRobotDataset?")
    version, fps, features = (info.get(key) for key in ("codebase_version", "fps", "features"))
    require(version in ("v3.0", "v2.1"), f"has version {version}; known are v3.0 and v2.1")
    require(fps == CONTROL_HZ and not isinstance(fps, bool), f"has {fps} fps, the simulation runs at {CONTROL_HZ}")
    require(isinstance(features, dict), "features is missing; is it a LeRobotDataset?")
    require(type(info.get("total_episodes")) is int, "total_episodes is missing or not a number")
    for key in keys:
        feature, width = features.get(key), FEATURES[key]["shape"][0]
        fits = isinstance(feature, dict) and feature.get("shape") == [width]
        require(fits, f"must have the feature {key} with {width} numbers")
        require(isinstance(feature.get("unit", ""), str), f"the unit of {key} is not a text")
    return info


def read_dataset(path: Path, info: dict[str, Any], keys: tuple[str, ...]) -> list[dict[str, np.ndarray]]:
    """Read features of a LeRobotDataset.

    Args:
        path: directory of the dataset.
        info: the result of read_info.
        keys: names of the features.

    Returns:
        A dict of float32 arrays (T, width) for each episode, in order, with joints in the unit of the dataset.

    Raises:
        DatasetError: files cannot be read, or their columns are not as info describes them.
        SO101Error: pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    files = sorted((path / "data").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"{path}: data/ has no parquet file")
    columns = [*keys, "episode_index", "frame_index"]
    try:
        table = pa.concat_tables(pq.read_table(file, columns=columns) for file in files)
        number, frame = (table[key].cast(pa.int64()).to_numpy() for key in ("episode_index", "frame_index"))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{path}: its parquet files cannot be read ({str(error).splitlines()[0]})") from error
    arrays = {key: _matrix(table[key], FEATURES[key]["shape"][0], f"{path}: {key}") for key in keys}
    order = np.lexsort([frame, number])
    episodes = [
        {key: array[rows] for key, array in arrays.items()}
        for rows in np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    ]
    if len(order) == 0 or len(episodes) != info["total_episodes"]:
        found = len(episodes) if len(order) else 0
        raise DatasetError(f"{path}: has {found} episodes in data/, but {info['total_episodes']} in meta/info.json")
    return episodes


def _matrix(column: pyarrow.ChunkedArray, width: int, name: str) -> np.ndarray:
    """A column of lists of `width` finite numbers as (T, width) float32. Raises DatasetError for anything else."""
    (pa, _), kind = _pyarrow(), column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DatasetError(f"{name} must be lists of numbers, but is {kind}")
    rows = column.to_pylist()
    if any(row is None or len(row) != width or None in row for row in rows):
        raise DatasetError(f"{name} must have {width} numbers in every frame")
    array = np.array(rows, np.float32).reshape(-1, width)
    if not np.isfinite(array).all():
        raise DatasetError(f"{name} has numbers that are not finite")
    return array


def unit_of(info: dict[str, Any], key: str, given: str | None) -> str:
    """Unit of a joint feature: "rad", "deg" or "norm".

    Args:
        info: the result of read_info.
        key: name of the feature.
        given: the user's unit, for a dataset without a unit.

    Raises:
        DatasetError: there is no unit, or the user's contradicts that of the dataset.
    """
    own = info["features"][key].get("unit")
    if own is None and given is None:
        raise DatasetError(f"the dataset does not contain the unit of {key}: give it with --units rad, deg or norm")
    if own is not None and given is not None and own != given:
        raise DatasetError(f"--units {given}: {key} is in {own} according to the dataset; drop the flag")
    return own or given


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
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
