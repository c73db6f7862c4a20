"""Policies as ONNX files: what travels to another machine, another program, or an arm.

`python eval_so101.py --model CHECKPOINT --export policy.onnx` writes one, with `export_onnx`: features, normalisation
and mirror average are part of the graph, which takes observations (N, 25) and gives residuals (N, 6) in [-1, 1]. What
else a user of it must know is JSON in the file's metadata, under "so101". Reading needs onnxruntime, writing onnx and
onnxscript, the extra "export".

`onnx:PATH` as base policy is an `OnnxPolicy`. A file of another tool's will do: without that metadata, it must have one
input (N, 25) or (1, 25) and one output of 6, and its residuals are those of a default task on base policy zero.
"""

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

from so101_env import ACT_DIM, OBS_DIM, BaseObservation, SO101Error, SO101ResidualVectorEnv, Task, flat_observation
from so101_policies import (
    CHECKPOINT,
    StackedPolicy,
    check_base,
    load_checkpoint,
    load_file,
    load_policy,
    restore_settings,
)
from so101_runs import describe_run, write_atomically

METADATA, FORMAT = "so101", "so101 onnx 1"
UNITS = {"pos": "rad", "vel": "rad/s", "base_delta": "rad", "qw": "1", "qx": "1", "qy": "1", "qz": "1"}
CHECKED_OBSERVATIONS, TOLERANCE = 1000, 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# reading


class OnnxPolicy(StackedPolicy):
    """A policy in an ONNX file, its own base policy included. Raises SO101Error for a file that is no such policy."""

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
            raise SO101Error(f"{path}: gives {sink.shape}, not residuals (N, {ACT_DIM})")
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def residuals(self, obs: np.ndarray) -> np.ndarray:
        """Residuals (n, 6) in [-1, 1] for observations (n, 25 or 31)."""
        rows = np.split(obs, len(obs)) if self.alone else [obs]
        action = np.concatenate([self.session.run(None, {self.input: row.astype(np.float32)})[0] for row in rows])
        return np.clip(action, -1.0, 1.0)

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): what its own base policy and its residual ask for together."""
        base, flat = self.base_delta(obs, mask), flat_observation(obs)
        if self.observe_base:
            flat = np.concatenate([flat, base.astype(np.float32)], axis=1)
        residual = np.zeros((len(mask), ACT_DIM))
        residual[mask] = self.scale_rad * self.residuals(flat[mask]).astype(np.float64)
        self.residual[mask] = residual[mask]
        return base + residual


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SO101Error(f"{path}: cannot be read ({error.strerror})") from error


def _session(content: bytes, path: str | Path) -> Any:
    """An onnxruntime session of one thread: the same numbers on any machine with the same processor."""
    try:
        import onnxruntime
    except ImportError as error:
        raise SO101Error(f"{path}: needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each kind of damage
        reason = " ".join(str(error).split())[:120]
        raise SO101Error(f"{path}: is no ONNX file that can be used ({reason}); export it again") from error


def _metadata(session: Any, path: str | Path) -> dict[str, Any]:
    """What the file says of itself; of another tool's file, what is assumed."""
    inputs, outputs = ([each.name for each in each_kind] for each_kind in (session.get_inputs(), session.get_outputs()))
    if len(inputs) != 1 or len(outputs) != 1:
        raise SO101Error(f"{path}: has inputs {inputs} and outputs {outputs}; a policy has one of each")
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        task = dataclasses.asdict(Task())
        return {"base_policy": "zero", "base_fingerprint": "", "task": task, "observe_base": False, "global_step": None}
    try:
        metadata = json.loads(text)
        if metadata["format"] != FORMAT:
            raise SO101Error(
                f"{path}: not of this version, which reads {FORMAT!r}; the file says {metadata['format']!r}"
            )
        for key in ("base_policy", "base_fingerprint", "task", "observe_base", "global_step"):
            metadata[key]
    except (ValueError, KeyError, TypeError) as error:
        raise SO101Error(f"{path}: its metadata are damaged ({error!r}); export it again") from error
    return metadata


# ---------------------------------------------------------------------------------------------------------------------
# writing


class _Actor(nn.Module):
    """The mean action (N, 6), clipped, of an agent, from observations as a tensor: what is exported."""

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Residuals (N, 6) in [-1, 1]."""
        x = self.agent.features(observation.numpy())  # PyTorch's tracer follows NumPy, too
        return self.agent.get_gaussian(x)[0].clamp(-1, 1)


def export_onnx(model: str, path: Path) -> dict[str, Any]:
    """Write a checkpoint's policy as an ONNX file; returns its metadata. Takes about ten seconds.

    The file is read back and compared with the checkpoint on CHECKED_OBSERVATIONS observations of its task, before it
    is put in place.

    Raises:
        SO101Error: what export needs is not installed; a checkpoint whose policy looks at pictures; a policy that
            cannot be traced, or does not give the same actions then.
    """
    try:
        import onnx  # noqa: F401  torch asks for it late, and in other words
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SO101Error(f"--export needs {error.name}: pip install onnx onnxscript") from error
    saved = load_file(model, CHECKPOINT)
    checkpoint = load_checkpoint(model, saved)
    args, agent = checkpoint.args, checkpoint.agent(model).eval()
    if getattr(agent, "cameras", ()):
        raise SO101Error(
            f"--export {path}: the policy of {model} looks at pictures; only policies that do not travel so"
        )
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
        "action": "residuals in [-1, 1]; times alpha * act_scale, rad is added to the last commanded joint targets",
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
        raise SO101Error(f"--export {path}: differs from {model} by {difference:.1g}: it cannot be exported")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return metadata | {"difference": difference}


def _observations(envs: SO101ResidualVectorEnv, agent: nn.Module) -> np.ndarray:
    """Observations (CHECKED_OBSERVATIONS, 25 or 31) of an agent at work."""
    obs, seen, rng = envs.reset(seed=0)[0], [], np.random.default_rng(0)
    while sum(map(len, seen)) < CHECKED_OBSERVATIONS:
        seen.append(obs)
        obs = envs.step(agent.act(obs) + 0.5 * rng.standard_normal((len(obs), ACT_DIM)))[0]
    return np.concatenate(seen)[:CHECKED_OBSERVATIONS]


def _strip(graph: Any) -> None:
    """Drop what the exporter notes of the code that each part came from: paths of this machine, half of the file."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _trace(agent: nn.Module, width: int, path: Path) -> bytes:
    """The agent's actor as an ONNX model. Raises SO101Error."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    table = torch.export.default_decompositions()
    table[torch.ops.aten.hypot.default] = lambda x, y: (x * x + y * y).sqrt()  # ONNX has none
    example = torch.zeros(2, width)
    example[:, 15] = 1.0  # an upright sheet
    try:
        with warnings.catch_warnings(action="ignore"):
            shapes = {"observation": {0: torch.export.Dim("N")}}
            program = torch.export.export(_Actor(agent), (example,), dynamic_shapes=shapes, strict=True)
            program = program.run_decompositions(table)
            if lost := [name for name, value in program.constants.items() if type(value) is not torch.Tensor]:
                raise SO101Error(
                    f"--export {path}: a feature uses a NumPy array of its module ({lost[0]}), which the tracer loses: "
                    "make the array within the function"
                )
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["observation"], output_names=["action"]
            )
        return exported.model_proto.SerializeToString()
    except SO101Error:
        raise
    except Exception as error:  # the tracer, the exporter and what they call raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise SO101Error(f"--export {path}: the policy cannot be traced ({type(error).__name__}: {reason})") from error
