"""Demonstrations on disk: LeRobotDataset v3.0, written and read with pyarrow.

An episode is a dict of float32 arrays: "observation.state" (T, 6), joint positions; "observation.environment_state"
(T, 19), the rest of the observation; "action" (T, 6), absolute joint targets. A dataset of this project says its units
in meta/info.json ("unit" of a feature); others need to be told, see `to_rad`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from so101_env import CONTROL_HZ, JOINTS, load_model

TASK = "Slide the sheet of paper into the square of red tape."
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
JOINT_NAMES = [f"{joint}.pos" for joint in JOINTS]
ENVIRONMENT_NAMES = (
    [f"{joint}.vel" for joint in JOINTS]
    + [f"sheet.{axis}" for axis in ("x", "y", "z", "qw", "qx", "qy", "qz")]
    + [f"tape_minus_sheet.{axis}" for axis in "xyz"]
    + [f"tip.{axis}" for axis in "xyz"]
)
FEATURES = {
    STATE: {"dtype": "float32", "shape": [6], "names": JOINT_NAMES, "unit": "rad"},
    ENVIRONMENT: {"dtype": "float32", "shape": [19], "names": ENVIRONMENT_NAMES, "unit": "rad/s, m, quaternion"},
    ACTION: {"dtype": "float32", "shape": [6], "names": JOINT_NAMES, "unit": "rad"},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
FRAMES_PER_FILE = 500_000  # keeps a file below the format's 100 MB


class DatasetError(ValueError):
    """A dataset that cannot be read or written; says which file, and what to do."""


def write_dataset(path: Path, episodes: list[dict[str, np.ndarray]]) -> None:
    """Write episodes as a LeRobotDataset v3.0 into the new directory path, which is complete or absent.

    Raises DatasetError if path exists or there is no episode.
    """
    if path.exists():
        raise DatasetError(f"{path} exists; delete it or name another directory")
    if not episodes:
        raise DatasetError(f"no episode to write into {path}")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    (temporary / "meta" / "episodes" / "chunk-000").mkdir(parents=True)

    everything, rows, tables, file_index, first_frame = [], [], [], 0, 0
    for number, episode in enumerate(episodes):
        length = len(episode[ACTION])
        if tables and sum(map(len, tables)) + length > FRAMES_PER_FILE:
            _write_data(temporary, file_index, tables)
            tables, file_index = [], file_index + 1
        frames = np.arange(length)
        arrays = {
            **{key: np.asarray(episode[key], np.float32) for key in (STATE, ENVIRONMENT, ACTION)},
            "timestamp": (frames / CONTROL_HZ).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, number),
            "index": first_frame + frames,
            "task_index": np.zeros(length, np.int64),
        }
        for key, feature in FEATURES.items():
            if length == 0 or arrays[key].reshape(length, -1).shape[1:] != tuple(feature["shape"]):
                raise DatasetError(f"episode {number}: {key} has shape {arrays[key].shape}")
        tables.append(pa.table({key: _column(arrays[key]) for key in FEATURES}))
        everything.append(arrays)
        rows.append(
            {
                "episode_index": number,
                "tasks": [TASK],
                "length": length,
                "dataset_from_index": first_frame,
                "dataset_to_index": first_frame + length,
                "data/chunk_index": file_index // 1000,
                "data/file_index": file_index % 1000,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{f"stats/{key}/{name}": s for key in FEATURES for name, s in _stats(arrays[key]).items()},
            }
        )
        first_frame += length
    _write_data(temporary, file_index, tables)
    pq.write_table(pa.Table.from_pylist(rows), temporary / "meta" / "episodes" / "chunk-000" / "file-000.parquet")

    # LeRobot reads the tasks with pandas and expects their text as the index: pandas' own metadata say so
    index = {
        "index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0",
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
            for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ],
    }  # fmt: skip
    tasks = pa.table({"task_index": [0], "task": [TASK]}).replace_schema_metadata({"pandas": json.dumps(index)})
    pq.write_table(tasks, temporary / "meta" / "tasks.parquet")
    stats = {key: _stats(np.concatenate([arrays[key] for arrays in everything])) for key in FEATURES}
    _write_json(temporary / "meta" / "stats.json", stats)
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
        "video_path": None,
        "features": FEATURES,
    }
    _write_json(temporary / "meta" / "info.json", info)
    os.replace(temporary, path)


def read_info(path: Path) -> dict[str, Any]:
    """meta/info.json of a LeRobotDataset v3.0 or v2.1. Raises DatasetError for anything else, naming the file."""
    info_path = path / "meta" / "info.json"
    if not info_path.is_file():
        raise DatasetError(f"{path}: no LeRobotDataset, meta/info.json is missing")
    try:
        info = json.loads(info_path.read_text())
    except ValueError as error:
        raise DatasetError(f"{info_path}: no JSON ({error})") from error
    for key in ("features", "fps", "total_episodes"):
        if key not in info:
            raise DatasetError(f"{info_path}: {key} is missing; is it a LeRobotDataset?")
    if info.get("codebase_version") not in ("v3.0", "v2.1"):
        raise DatasetError(f"{info_path}: version {info.get('codebase_version')}; known are v3.0 and v2.1")
    return info


def read_dataset(path: Path, info: dict[str, Any], keys: tuple[str, ...]) -> list[dict[str, np.ndarray]]:
    """Read the features named by keys from a LeRobotDataset, given what read_info says of it.

    Returns one dict of float32 arrays (T, width) per episode, in order. Raises DatasetError for features that are
    missing or of another width, and for files that cannot be read.
    """
    for key in keys:
        width = FEATURES[key]["shape"][0]
        if key not in info["features"] or list(info["features"][key]["shape"]) != [width]:
            raise DatasetError(f"{path}/meta/info.json: needs the feature {key} with {width} numbers")
    files = sorted((path / "data").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"{path}: data/ has no parquet file")
    columns = [*keys, "episode_index", "frame_index"]
    try:
        table = pa.concat_tables(pq.read_table(file, columns=columns) for file in files)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: its parquet files cannot be read ({error})") from error
    number, frame = (table[key].to_numpy() for key in ("episode_index", "frame_index"))
    arrays = {key: np.array(table[key].to_pylist(), np.float32) for key in keys}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise DatasetError(f"{path}: {key} has numbers that are not finite")
    order = np.lexsort([frame, number])
    episodes = [
        {key: array[rows] for key, array in arrays.items()}
        for rows in np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    ]
    if len(episodes) != info["total_episodes"]:
        raise DatasetError(f"{path}: {len(episodes)} episodes in data/, meta/info.json says {info['total_episodes']}")
    return episodes


def unit_of(info: dict[str, Any], key: str, given: str | None) -> str:
    """Unit of a joint feature, "rad", "deg" or "norm": what the dataset says, or what the user gave, not both."""
    said = info["features"][key].get("unit")
    if said is None and given is None:
        raise DatasetError(f"the dataset does not say the unit of {key}: give it with --units rad, deg or norm")
    if said is not None and given is not None and said != given:
        raise DatasetError(f"--units {given}: the dataset says that {key} is in {said}; drop the flag")
    return said or given


def to_rad(joints: np.ndarray, unit: str) -> np.ndarray:
    """Joint angles (T, 6) in rad.

    Args:
        joints: in `unit`, JOINTS order.
        unit: "rad"; "deg", as LeRobot records with use_degrees: the gripper is then in 0 to 100; "norm", LeRobot's -100
            to 100 over each joint's range, and 0 to 100 for the gripper. The ranges are those of the model, so "norm"
            is as good as the arm's calibration reaches its stops.

    Raises:
        DatasetError: an unknown unit, or numbers that no such unit can have.
    """
    if unit == "rad":
        result = joints.astype(np.float64)
    elif unit in ("deg", "norm"):
        low, high = load_model().actuator_ctrlrange.T
        share = np.concatenate([(joints[:, :5] + 100.0) / 200.0, joints[:, 5:] / 100.0], axis=1)
        result = low + share * (high - low)
        if unit == "deg":
            result[:, :5] = np.deg2rad(joints[:, :5])
    else:
        raise DatasetError(f"unknown unit {unit!r}; known are rad, deg and norm")
    if np.abs(result).max() > 2 * np.pi:
        raise DatasetError(f"joint angles of {np.abs(result).max():.0f} rad: they are not in {unit}; see --units")
    return result


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")
