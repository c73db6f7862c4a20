"""Writes checkpoints as the ONNX files that so101.onnx describes and reads.

`python eval_so101.py --model CHECKPOINT --export policy.onnx` writes one with `export_onnx`. It needs onnxruntime
(extra "arm"), onnx and onnxscript (extra "export").
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from so101.checkpoints import CHECKPOINT, load_checkpoint, load_file
from so101.extras import import_extra
from so101.files import CHECKSUM_BYTES, checksum, write_atomic
from so101.onnx import CHECKSUM, FORMAT, METADATA, interface, open_session
from so101.run_dirs import describe_run
from so101.trust import Trust
from so101_env import ACT_DIM, OBS, SO101Error, SO101ResidualVectorEnv

CHECKED_OBSERVATIONS, TOLERANCE = 1000, 1e-5


class _Actor(nn.Module):
    """The module that is exported: from observations (N, 25 to 37), as a tensor, to an agent's clipped mean action."""

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Residuals (N, 6) in [-1, 1]."""
        x = self.agent.features(observation.numpy())  # PyTorch's tracer also traces NumPy
        return self.agent.get_action(x)


def export_onnx(model: str, path: Path, trust: Trust | None = None) -> dict[str, Any]:
    """Write a checkpoint's policy as an ONNX file. Takes about ten seconds.

    Before the file is put in place, its outputs are compared with the checkpoint's on CHECKED_OBSERVATIONS observations
    of its task.

    Args:
        model: path of the checkpoint.
        path: the ONNX file.
        trust: the permissions of the person who runs the command.

    Returns:
        The metadata of the file, and the largest "difference" of an action from the checkpoint's.

    Raises:
        SO101Error: a library is missing; the checkpoint is a camera policy; the policy cannot be traced; the exported
            policy has other outputs.
    """
    onnx = import_extra("onnx", "export", "--export")
    import_extra("onnxscript", "export", "--export")  # without it torch fails later, with a longer message
    saved = load_file(model, CHECKPOINT)
    checkpoint = load_checkpoint(model, saved, trust)
    args, agent = checkpoint.args, checkpoint.agent(model).eval()
    if getattr(agent, "cameras", ()):
        raise SO101Error(f"--export {path}: {model} is a camera policy, which cannot be exported yet")
    envs = checkpoint.script.make_envs(args, 50, evaluation=False)
    try:
        observations = _observations(envs, agent)
        parts = envs.parts.values()
    finally:
        envs.close()
    content = _trace(agent, observations.shape[1], path)
    run = describe_run(saved["script"], args)
    metadata = {
        "format": FORMAT,
        **interface(parts, args.task),
        "base_policy": args.base.base_policy,
        "base_fingerprint": saved["base_fingerprint"],
        "server": {key: value for key, value in vars(args.base.server).items() if key != "trust"},
        "observe_base": args.base.observe_base,
        "task": dataclasses.asdict(args.task),
        "script": saved["script"],
        "global_step": saved["global_step"],
        "command": checkpoint.command,
        "evaluations": saved["recorder"]["finalists"],
        "git": run["git"],
        "versions": run["versions"],
    }
    model_proto = onnx.load_from_string(content)
    _strip(model_proto.graph)
    content = serialize(model_proto, metadata)
    session, _ = open_session(content, path)
    action = session.run(None, {session.get_inputs()[0].name: observations})[0]
    difference = float(np.abs(action - agent.act(observations)).max())
    if not difference <= TOLERANCE:
        raise SO101Error(f"--export {path}: differs from {model} by {difference:.1g}, so it cannot be exported")
    write_atomic(path, lambda temporary: temporary.write_bytes(content))
    return metadata | {"difference": difference}


def serialize(model: Any, metadata: dict[str, Any]) -> bytes:
    """An onnx.ModelProto with this project's metadata, as bytes that end in the checksum of the bytes before."""
    onnx = import_extra("onnx", "export", "--export")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata)})
    entry = onnx.ModelProto()
    onnx.helper.set_model_props(entry, {CHECKSUM: "0" * CHECKSUM_BYTES})
    # protobuf: the fields of a message whose bytes follow another's are added to it
    content = model.SerializeToString() + entry.SerializeToString()[:-CHECKSUM_BYTES]
    return content + checksum(content)


def _observations(envs: SO101ResidualVectorEnv, agent: nn.Module) -> np.ndarray:
    """Observations (CHECKED_OBSERVATIONS, 25 to 37) of episodes in which the agent acts, with noise."""
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
