"""Policies as ONNX files, for another machine, another program, or an arm.

so101/onnx_export.py writes one. Features, normalisation and mirror average are part of the graph. Its input is
observations (N, 25), plus 6 numbers for the load on the joints and 6 for the base policy's action if the policy
observes them. Its output is residuals (N, 6) in [-1, 1]. The file's metadata contain everything else that its user must
know, as JSON under "so101". Reading needs onnxruntime (extra "arm"), and no torch.

`onnx:PATH` as base policy is an `OnnxPolicy`. Files of other tools work, too: one input (N, 25), where N may be a fixed
number, and one output with 6 numbers. Without this project's metadata, they are taken for a residual of the default
task on base policy zero. A file with these metadata ends in its checksum, and is refused if it does not fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from so101.base import StackedPolicy, check_base, extend_observation, flat_observation
from so101.extras import import_extra
from so101.files import check_file, has_checksum
from so101.policies import load_policy
from so101.server import Server
from so101.settings import MAX_COUNT, restore_settings
from so101.trust import Trust
from so101_env import (
    ACT_DIM,
    OBSERVATION,
    BaseObservation,
    SO101Error,
    Task,
    extra_parts,
)
from so101_sim.errors import strict_json
from so101_sim.scene import CONTROL_HZ
from so101_sim.vector import Part

METADATA, FORMAT = "so101", "so101 onnx 2"
CHECKSUM = "so101_sha256"  # key of the last metadata entry
UNITS = {"pos": "rad", "vel": "rad/s", "load": "rad", "base_delta": "rad", "qw": "1", "qx": "1", "qy": "1", "qz": "1"}


class OnnxPolicy(StackedPolicy):
    """A policy in an ONNX file, including its own base policy.

    Raises SO101Error for a file that is not such a policy, or without onnxruntime.
    """

    def __init__(self, path: str, trust: Trust | None = None):
        self.path, content = path, _read(path)
        if any(word.encode() in content for word in (FORMAT, CHECKSUM)) and not has_checksum(content):
            raise SO101Error(f"{path}: damaged, its checksum is wrong or missing; export it again")
        self.session, data = open_session(content, path)
        self.metadata = _metadata(self.session, content, path)
        spec, trust = (trust or Trust()).resolve(self.metadata["base_policy"], path)
        base = load_policy(spec, dataclasses.replace(self.metadata["server"], trust=trust))
        super().__init__(base)
        check_base(self.metadata, spec, base, path)
        self.task = restore_settings(Task, self.metadata["task"], path)
        self.observe_base, self.steps = self.metadata["observe_base"], self.metadata["global_step"]
        self.scale_rad = self.task.alpha * self.task.act_scale
        (source,), (sink,) = self.session.get_inputs(), self.session.get_outputs()
        width = sum(len(part.names) for part in _parts(self.task, self.observe_base))
        if len(source.shape) != 2 or source.shape[1] != width or source.type != "tensor(float)":
            raise SO101Error(f"{path}: takes {source.shape} {source.type}, not observations (N, {width}) in float32")
        if len(sink.shape) != 2 or sink.shape[1] != ACT_DIM or sink.type not in ("tensor(float)", "tensor(double)"):
            raise SO101Error(f"{path}: returns {sink.shape} {sink.type}, not residuals (N, {ACT_DIM})")
        self.input, self.batch = source.name, source.shape[0] if isinstance(source.shape[0], int) else None
        self.fingerprint = hashlib.sha256(content + data).hexdigest()
        self.residuals(np.zeros((2, width), np.float32))  # fails early if the graph does not run

    def residuals(self, obs: np.ndarray) -> np.ndarray:
        """Residuals (n, 6) in [-1, 1] for observations (n, 25 to 37). Raises SO101Error if the graph does not run."""
        count, batch = len(obs), self.batch or len(obs)
        padded = np.zeros((-(-count // batch) * batch, obs.shape[1]), np.float32)  # whole batches
        padded[:count] = obs
        try:
            parts = [self.session.run(None, {self.input: rows})[0] for rows in padded.reshape(-1, batch, obs.shape[1])]
        except Exception as error:  # onnxruntime raises its own class for every kind of fault
            raise SO101Error(f"{self.path}: cannot be run ({' '.join(str(error).split())[:120]})") from error
        action = np.concatenate(parts)
        if action.shape != (len(padded), ACT_DIM) or not np.isfinite(action[:count]).all():
            text = f"returns {action.shape} for observations {padded.shape}, or numbers that are not finite"
            raise SO101Error(f"{self.path}: {text}; export it again")
        return np.clip(action[:count], -1.0, 1.0)

    def residual_rad(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See StackedPolicy."""
        seen_base = base_delta if self.observe_base else None
        flat = extend_observation(flat_observation(obs), obs, self.task.observe_load, seen_base)
        residual = np.zeros((len(mask), ACT_DIM))
        residual[mask] = self.scale_rad * self.residuals(flat[mask]).astype(np.float64)
        return residual


def _read(path: str) -> bytes:
    """The content of a file. Raises SO101Error if it cannot be read."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SO101Error(f"{path}: cannot be read ({error.strerror})") from error


def open_session(content: bytes, path: str | Path) -> tuple[Any, bytes]:
    """An onnxruntime session, and the content of the files beside path in which the graph keeps its weights.

    One thread: bit-identical results on all machines with the same processor.
    """
    onnxruntime = import_extra("onnxruntime", "arm", str(path))
    # the table says which files the graph may read: none at first; without an entry, onnxruntime would read any
    table = {"": b"-"}
    while True:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        lengths = [len(data) for data in table.values()]
        options.add_external_initializers_from_files_in_memory(list(table), list(table.values()), lengths)
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            return session, b"".join(list(table.values())[1:])
        except Exception as error:  # onnxruntime raises its own class for every kind of damage
            missing = re.search(r"External file: (.+) not found", str(error))
            beside = missing and Path(path).parent / missing[1]
            if missing and missing[1] not in table and Path(missing[1]).name == missing[1] and beside.is_file():
                table[missing[1]] = _read(str(beside))
                continue
            reason = " ".join(str(error).split())[:120]
            if missing:
                reason = f"its weights are in {missing[1]}, which is not beside it"
            raise SO101Error(f"{path}: is not a usable ONNX file ({reason}); export it again") from error


def _metadata(session: Any, content: bytes, path: str | Path) -> dict[str, Any]:
    """The metadata in the file, or what is assumed of a file without them."""
    inputs, outputs = ([each.name for each in each_kind] for each_kind in (session.get_inputs(), session.get_outputs()))
    if len(inputs) != 1 or len(outputs) != 1:
        raise SO101Error(f"{path}: has inputs {inputs} and outputs {outputs}; a policy has one of each")
    try:
        text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    except UnicodeDecodeError as error:
        raise SO101Error(f"{path}: its metadata are not text; export it again") from error
    if text is None:
        task = dataclasses.asdict(Task())
        base = {"base_policy": "zero", "base_fingerprint": "", "observe_base": False, "server": Server()}
        return {**base, "task": task, "global_step": None}
    try:
        metadata = strict_json(text)
        found = metadata["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SO101Error(f"{path}: its metadata are damaged ({error!r}); export it again") from error
    if found != FORMAT:
        raise SO101Error(f"{path}: has format {found!r}, and this version reads {FORMAT!r}; export it again")
    if not has_checksum(content):
        raise SO101Error(f"{path}: damaged, its checksum is wrong or missing; export it again")
    kinds = {
        "base_policy": str, "base_fingerprint": str, "server": dict, "task": dict, "observe_base": bool,
        "global_step": int, "scale_rad": float, "script": str, "git": dict, "versions": dict,
        "command": (str, type(None)), "evaluations": list,
    }  # fmt: skip
    for key, kind in kinds.items():
        value = metadata.get(key, ...)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SO101Error(f"{path}: {key} of its metadata is missing or of a wrong type; export it again")
    task = restore_settings(Task, metadata["task"], path)
    described = interface(_parts(task, metadata["observe_base"]), task)
    if unknown := [key for key in metadata if key not in (*kinds, *described, "format")]:
        raise SO101Error(f"{path}: its metadata have {unknown[0]!r:.80}, which is unknown; export it again")
    for key, value in described.items():
        if metadata.get(key) != value:
            raise SO101Error(f"{path}: {key} of its metadata is not that of this version; export it again")
    if not 0 <= metadata["global_step"] <= MAX_COUNT:
        raise SO101Error(f"{path}: global_step of its metadata is {metadata['global_step']}; export it again")
    server = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata["server"].items()}
    server = restore_settings(Server, server | {"trust": dataclasses.asdict(Trust())}, path)
    return metadata | {"server": server}


def _parts(task: Task, observe_base: bool) -> list[Part]:
    """The parts of the observation that a policy gets."""
    return [*OBSERVATION.values(), *extra_parts(task, observe_base).values()]


def interface(parts: Iterable[Part], task: Any) -> dict[str, Any]:
    """The part of the metadata that describes input and output, for the parts of the observation and the task."""
    names = [name for part in parts for name in part.names]
    return {
        "observation": [{"name": name, "unit": UNITS.get(name.rpartition(".")[2], "m")} for name in names],
        "action": "residuals in [-1, 1]; multiplied by scale_rad they are added to the last commanded joint targets",
        "scale_rad": task.alpha * task.act_scale,
        "control_hz": CONTROL_HZ,
    }
