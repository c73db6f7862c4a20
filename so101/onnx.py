"""Policies as ONNX files, for another machine, another program, or an arm.

`python eval_so101.py --model CHECKPOINT --export policy.onnx` writes one with `export_onnx`. Features, normalisation
and mirror average are part of the graph. Its input is observations (N, 25), or (N, 31) with the base policy's action;
its output is residuals (N, 6) in [-1, 1]. The file's metadata contain everything else that its user must know, as JSON
under "so101". Reading needs onnxruntime (extra "arm"); writing also needs onnx and onnxscript (extra "export").

`onnx:PATH` as base policy is an `OnnxPolicy`. Files of other tools work, too: one input (N, 25) or (1, 25), and one
output with 6 numbers. Without this project's metadata, they are taken for a residual of the default task on base policy
zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from so101.base import StackedPolicy, flat_observation
from so101.checkpoints import CHECKPOINT, check_base, load_checkpoint, load_file, restore_settings
from so101.extras import import_extra
from so101.files import write_atomic
from so101.policies import load_policy
from so101.run_dirs import describe_run
from so101_env import ACT_DIM, OBS, OBS_DIM, BaseObservation, SO101Error, SO101ResidualVectorEnv, Task

METADATA, FORMAT = "so101", "so101 onnx 1"
UNITS = {"pos": "rad", "vel": "rad/s", "base_delta": "rad", "qw": "1", "qx": "1", "qy": "1", "qz": "1"}
CHECKED_OBSERVATIONS, TOLERANCE = 1000, 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# reading


class OnnxPolicy(StackedPolicy):
    """A policy in an ONNX file, including its own base policy.

    Raises SO101Error for a file that is not such a policy, or without onnxruntime.
    """

    def __init__(self, path: str):
        self.path, content = path, _read(path)
        self.session = _session(content, path)
        self.metadata = _metadata(self.session, path)
        base = load_policy(self.metadata["base_policy"])
        super().__init__(base)
        check_base(self.metadata, self.metadata["base_policy"], base, path)
        self.task = restore_settings(Task, self.metadata["task"], path)
        self.observe_base, self.steps = self.metadata["observe_base"], self.metadata["global_step"]
        self.scale_rad = self.task.alpha * self.task.act_scale
        (source,), (sink,) = self.session.get_inputs(), self.session.get_outputs()
        self.input, self.alone = source.name, source.shape[0] == 1
        width = OBS_DIM + ACT_DIM * self.observe_base
        if len(source.shape) != 2 or source.shape[1] != width or source.type != "tensor(float)":
            raise SO101Error(f"{path}: takes {source.shape} {source.type}, not observations (N, {width}) in float32")
        if len(sink.shape) != 2 or sink.shape[1] != ACT_DIM:
            raise SO101Error(f"{path}: returns {sink.shape}, not residuals (N, {ACT_DIM})")
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def residuals(self, obs: np.ndarray) -> np.ndarray:
        """Residuals (n, 6) in [-1, 1] for observations (n, 25 or 31)."""
        rows = np.split(obs, len(obs)) if self.alone else [obs]
        action = np.concatenate([self.session.run(None, {self.input: row.astype(np.float32)})[0] for row in rows])
        return np.clip(action, -1.0, 1.0)

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): those of its own base policy plus its residual."""
        base, flat = self.base_delta(obs, mask), flat_observation(obs)
        if self.observe_base:
            flat = np.concatenate([flat, base.astype(np.float32)], axis=1)
        residual = np.zeros((len(mask), ACT_DIM))
        residual[mask] = self.scale_rad * self.residuals(flat[mask]).astype(np.float64)
        self.residual[mask] = residual[mask]
        return base + residual


def _read(path: str) -> bytes:
    """The content of a file. Raises SO101Error if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SO101Error(f"{path}: cannot be read ({error.strerror})") from error


def _session(content: bytes, path: str | Path) -> Any:
    """An onnxruntime session with one thread: bit-identical results on all machines with the same processor."""
    onnxruntime = import_extra("onnxruntime", "arm", str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own class for every kind of damage
        reason = " ".join(str(error).split())[:120]
        raise SO101Error(f"{path}: is not a usable ONNX file ({reason}); export it again") from error


def _metadata(session: Any, path: str | Path) -> dict[str, Any]:
    """The metadata in the file, or what is assumed of a file without them."""
    inputs, outputs = ([each.name for each in each_kind] for each_kind in (session.get_inputs(), session.get_outputs()))
    if len(inputs) != 1 or len(outputs) != 1:
        raise SO101Error(f"{path}: has inputs {inputs} and outputs {outputs}; a policy has one of each")
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        task = dataclasses.asdict(Task())
        return {"base_policy": "zero", "base_fingerprint": "", "task": task, "observe_base": False, "global_step": None}
    try:
        metadata = json.loads(text)
        found = metadata["format"]
        for key in ("base_policy", "base_fingerprint", "task", "observe_base", "global_step"):
            metadata[key]
    except (ValueError, KeyError, TypeError) as error:
        raise SO101Error(f"{path}: its metadata are damaged ({error!r}); export it again") from error
    if found != FORMAT:
        raise SO101Error(f"{path}: has format {found!r}, and this version reads {FORMAT!r}; export it again")
    return metadata


# ---------------------------------------------------------------------------------------------------------------------
# writing


class _Actor(nn.Module):
    """The module that is exported: from observations (N, 25 or 31), as a tensor, to an agent's clipped mean action."""

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Residuals (N, 6) in [-1, 1]."""
        x = self.agent.features(observation.numpy())  # PyTorch's tracer also traces NumPy
        return self.agent.get_gaussian(x)[0].clamp(-1, 1)


def export_onnx(model: str, path: Path) -> dict[str, Any]:
    """Write a checkpoint's policy as an ONNX file. Takes about ten seconds.

    Before the file is put in place, its outputs are compared with the checkpoint's on CHECKED_OBSERVATIONS observations
    of its task.

    Args:
        model: path of the checkpoint.
        path: the ONNX file.

    Returns:
        The metadata of the file, and the largest "difference" of an action from the checkpoint's.

    Raises:
        SO101Error: a library is missing; the checkpoint is a camera policy; the policy cannot be traced; the exported
            policy has other outputs.
    """
    onnx = import_extra("onnx", "export", "--export")
    import_extra("onnxscript", "export", "--export")  # without it torch fails later, with a longer message
    saved = load_file(model, CHECKPOINT)
    checkpoint = load_checkpoint(model, saved)
    args, agent = checkpoint.args, checkpoint.agent(model).eval()
    if getattr(agent, "cameras", ()):
        raise SO101Error(f"--export {path}: {model} is a camera policy, which cannot be exported yet")
    envs = checkpoint.script.make_envs(args, 50, evaluation=False)
    try:
        observations = _observations(envs, agent)
        parts = envs.parts
    finally:
        envs.close()
    content = _trace(agent, observations.shape[1], path)
    names = [name for part in parts.values() for name in part.names]
    run = describe_run(saved["script"], args)
    metadata = {
        "format": FORMAT,
        "observation": [{"name": name, "unit": UNITS.get(name.rpartition(".")[2], "m")} for name in names],
        "action": "residuals in [-1, 1]; multiplied by scale_rad they are added to the last commanded joint targets",
        "scale_rad": args.task.alpha * args.task.act_scale,
        "control_hz": envs.metadata["render_fps"],
        "base_policy": args.base.base_policy,
        "base_fingerprint": saved["base_fingerprint"],
        "observe_base": args.base.observe_base,
        "task": dataclasses.asdict(args.task),
        "script": saved["script"],
        "global_step": saved["global_step"],
        "git": run["git"],
        "versions": run["versions"],
    }
    model_proto = onnx.load_from_string(content)
    _strip(model_proto.graph)
    onnx.helper.set_model_props(model_proto, {METADATA: json.dumps(metadata)})
    content = model_proto.SerializeToString()

    session = _session(content, path)
    action = session.run(None, {session.get_inputs()[0].name: observations})[0]
    difference = float(np.abs(action - agent.act(observations)).max())
    if not difference <= TOLERANCE:
        raise SO101Error(f"--export {path}: differs from {model} by {difference:.1g}, so it cannot be exported")
    write_atomic(path, lambda temporary: temporary.write_bytes(content))
    return metadata | {"difference": difference}


def _observations(envs: SO101ResidualVectorEnv, agent: nn.Module) -> np.ndarray:
    """Observations (CHECKED_OBSERVATIONS, 25 or 31) of episodes in which the agent acts, with noise."""
    obs, seen, rng = envs.reset(seed=0)[0], [], np.random.default_rng(0)
    while sum(map(len, seen)) < CHECKED_OBSERVATIONS:
        seen.append(obs)
        obs = envs.step(agent.act(obs) + 0.5 * rng.standard_normal((len(obs), ACT_DIM)))[0]
    return np.concatenate(seen)[:CHECKED_OBSERVATIONS]


def _strip(graph: Any) -> None:
    """Remove the exporter's notes on the source code of each part: paths of this machine, and half of the file size."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _trace(agent: nn.Module, width: int, path: Path) -> bytes:
    """The agent's actor as a serialised ONNX model. Raises SO101Error if it cannot be traced."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    table = torch.export.default_decompositions()
    table[torch.ops.aten.hypot.default] = lambda x, y: (x * x + y * y).sqrt()  # ONNX has no hypot
    example = torch.zeros(2, width)
    example[:, OBS["sheet_quat"].start] = 1.0  # a valid quaternion
    try:
        with warnings.catch_warnings(action="ignore"):
            shapes = {"observation": {0: torch.export.Dim("N")}}
            program = torch.export.export(_Actor(agent), (example,), dynamic_shapes=shapes, strict=True)
            program = program.run_decompositions(table)
            if lost := [name for name, value in program.constants.items() if type(value) is not torch.Tensor]:
                raise SO101Error(
                    f"--export {path}: a feature uses a NumPy array of its module ({lost[0]}), which the tracer loses; "
                    "make the array within the function"
                )
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["observation"], output_names=["action"]
            )
        return exported.model_proto.SerializeToString()
    except SO101Error:
        raise
    except Exception as error:  # tracer and exporter raise many types of exceptions
        reason = " ".join(str(error).split())[:200]
        raise SO101Error(f"--export {path}: the policy cannot be traced ({type(error).__name__}: {reason})") from error
