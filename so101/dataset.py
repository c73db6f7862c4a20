"""Demonstrations on disk: LeRobotDataset v3.0, written and read with pyarrow.

An episode is a dict of float32 arrays: "observation.state" (T, 6), joint positions; "action" (T, 6), absolute joint
targets; and "observation.environment_state" (T, 19), the rest of the observation, where it was asked for. What cameras
saw lies beside, as H.264 video. Joints are in degrees, the gripper in 0 to 100, as LeRobot records the arm; a dataset
of this project says so in meta/info.json ("unit" of a feature), others need to be told, see so101_control.to_rad.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from so101_control import from_rad
from so101_env import (
    ACTION,
    CONTROL_HZ,
    ENVIRONMENT,
    ENVIRONMENT_NAMES,
    IMAGES,
    STATE,
    STATE_NAMES,
    TASK_TEXT,
    SO101Error,
)
from so101_wire import JOINT_GROUPS

UNIT = "deg"  # of the joints in what is written here
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
# A key frame every other frame, and no frame that refers to a later one, so that training reads frames at random fast.
VIDEO_OPTIONS = ["-crf", "20", "-g", "2", "-bf", "0"]
FRAMES_PER_SAMPLE = 10  # of the frames, one in so many is counted in the pictures' statistics


class DatasetError(SO101Error):
    """A dataset that cannot be read or written; says which file, and what to do."""


def write_dataset(
    path: Path, episodes: list[dict[str, np.ndarray]], cameras: Mapping[str, Iterable[np.ndarray]] | None = None
) -> None:
    """Write episodes as a LeRobotDataset v3.0 into the new directory path, which is complete or absent.

    Args:
        path: the directory.
        episodes: each with joint angles in rad.
        cameras: by name, the pictures (H, W, 3) uint8 of all frames of all episodes, in order; they are read once.

    Raises:
        DatasetError: path exists, cannot be written, there is no episode, or as many pictures as frames.
    """
    if path.exists():
        raise DatasetError(f"{path} exists; delete it or name another directory")
    if not episodes:
        raise DatasetError(f"no episode to write into {path}")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        _write_files(temporary, episodes, cameras or {})
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]  # FFmpeg's own words are many lines
        raise DatasetError(f"{path}: cannot be written ({reason}); free the disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
    root: Path, episodes: list[dict[str, np.ndarray]], cameras: Mapping[str, Iterable[np.ndarray]]
) -> None:
    """All files of a dataset below root."""
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
                raise DatasetError(f"episode {number}: {key} has shape {arrays[key].shape}")
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
            # the sampled frames of the episode; of a very short one, the next sampled frame
            first = min(-(-start // FRAMES_PER_SAMPLE), len(sample) - 1)
            of_episode = _image_stats(sample[first : max(-(-end // FRAMES_PER_SAMPLE), first + 1)])
            row |= {f"stats/{key}/{name}": value for name, value in of_episode.items()}
    pq.write_table(pa.Table.from_pylist(rows), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")

    # LeRobot reads the tasks with pandas and expects their text as the index: pandas' own metadata say so
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
    # GR00T's fine-tuning reads which numbers are which from modality.json; LeRobot ignores it
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
NO_INDEX = {"chunk_index": 0, "file_index": 0}  # one file for each camera


def _write_video(path: Path, frames: Iterable[np.ndarray], length: int) -> tuple[dict[str, Any], np.ndarray]:
    """Encode `length` pictures at exactly CONTROL_HZ; returns the feature, and the pictures sampled for statistics."""
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
        raise DatasetError(f"{path}: {count} pictures for {length} frames")
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
    """Statistics of pictures (n, H, W, 3) uint8 as LeRobot keeps them: per channel, (3, 1, 1), in [0, 1]."""
    pixels = frames.reshape(-1, 3)
    values: dict[str, Any] = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
    quantiles = np.quantile(pixels, (0.01, 0.10, 0.50, 0.90, 0.99), axis=0)
    values |= dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles))
    stats = {name: (value / 255.0).reshape(3, 1, 1).tolist() for name, value in values.items()}
    return stats | {"count": [len(frames)]}


def read_info(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """meta/info.json of a LeRobotDataset v3.0 or v2.1, with all that the features named by keys need to be read.

    Raises DatasetError, naming the file and what is wrong, for anything else, and for a rate other than 30 fps.
    """
    info_path = path / "meta" / "info.json"

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise DatasetError(f"{info_path}: {problem}")

    if not info_path.is_file():
        raise DatasetError(f"{path}: no LeRobotDataset, meta/info.json is missing")
    try:
        info = json.loads(info_path.read_text())
    except ValueError as error:
        raise DatasetError(f"{info_path}: no JSON ({error})") from error
    require(isinstance(info, dict), "holds no map; is it a LeRobotDataset?")
    version, fps, features = (info.get(key) for key in ("codebase_version", "fps", "features"))
    require(version in ("v3.0", "v2.1"), f"version {version}; known are v3.0 and v2.1")
    require(fps == CONTROL_HZ and not isinstance(fps, bool), f"has {fps} fps, the simulation runs at {CONTROL_HZ}")
    require(isinstance(features, dict), "features is missing; is it a LeRobotDataset?")
    require(type(info.get("total_episodes")) is int, "total_episodes is missing or no number")
    for key in keys:
        feature, width = features.get(key), FEATURES[key]["shape"][0]
        fits = isinstance(feature, dict) and feature.get("shape") == [width]
        require(fits, f"needs the feature {key} with {width} numbers")
        require(isinstance(feature.get("unit", ""), str), f"the unit of {key} is no text")
    return info


def read_dataset(path: Path, info: dict[str, Any], keys: tuple[str, ...]) -> list[dict[str, np.ndarray]]:
    """Read the features named by keys from a LeRobotDataset, given what read_info says of it.

    Returns one dict of float32 arrays (T, width) per episode, in order. Raises DatasetError for files that cannot be
    read, and for columns that do not hold what info says.
    """
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
        raise DatasetError(f"{path}: {found} episodes in data/, meta/info.json says {info['total_episodes']}")
    return episodes


def _matrix(column: pa.ChunkedArray, width: int, name: str) -> np.ndarray:
    """A column of lists of `width` finite numbers as (T, width) float32; DatasetError, with name, for anything else."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DatasetError(f"{name} must be lists of numbers, it is {kind}")
    rows = column.to_pylist()
    if any(row is None or len(row) != width or None in row for row in rows):
        raise DatasetError(f"{name} must have {width} numbers in every frame")
    array = np.array(rows, np.float32).reshape(-1, width)
    if not np.isfinite(array).all():
        raise DatasetError(f"{name} has numbers that are not finite")
    return array


def unit_of(info: dict[str, Any], key: str, given: str | None) -> str:
    """Unit of a joint feature, "rad", "deg" or "norm": what the dataset says, or what the user gave, not both."""
    said = info["features"][key].get("unit")
    if said is None and given is None:
        raise DatasetError(f"the dataset does not say the unit of {key}: give it with --units rad, deg or norm")
    if said is not None and given is not None and said != given:
        raise DatasetError(f"--units {given}: the dataset says that {key} is in {said}; drop the flag")
    return said or given


def _column(array: np.ndarray) -> pa.Array:
    """A parquet column: numbers, or lists of fixed length."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])


def _stats(array: np.ndarray) -> dict[str, list]:
    """Statistics over frames as LeRobot keeps them, lists of one number per component."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    functions = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}
    return {name: function(rows, axis=0).tolist() for name, function in functions.items()} | {"count": [len(rows)]}


def _write_data(root: Path, file_index: int, tables: list[pa.Table]) -> None:
    """One data file, an episode per row group."""
    path = root / "data" / f"chunk-{file_index // 1000:03d}" / f"file-{file_index % 1000:03d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
