"""Serve a policy trained with LeRobot, as a base policy. Runs in LeRobot's environment, from the root of the clone.

    pip install pyzmq msgpack          # in the environment in which the policy was trained
    python -m so101.serve --model outputs/train/act_so101/checkpoints/last/pretrained_model
    python ppo_residual_so101.py --base-policy server:127.0.0.1:5555 --units deg      # in this project's environment

The server uses the protocol of GR00T N1.6, see so101/wire.py. It answers a whole batch of arms in one call, and accepts
connections from this machine only. Equal requests get bit-identical answers: the client's seed makes policies that draw
noise reproducible.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from so101.groot import JOINT_GROUPS

STATE, IMAGES = "observation.state", "observation.images."


class RequestError(ValueError):
    """A request that cannot be answered. The client gets the text."""


def check_files(path: Path) -> None:
    """Raise RequestError if a policy directory has no configuration or no weights."""
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise RequestError(f"has no {name}; name a pretrained_model directory of lerobot-train")


def check_processors(path: Path) -> None:
    """Raise RequestError if the pre- or postprocessing of a policy directory names code that is not LeRobot's.

    LeRobot imports and calls any class that these files name, with the arguments that they give.
    """
    for file in sorted(path.glob("*.json")):
        if not file.is_file():
            raise RequestError(f"{file.name} is not a file; save the policy again")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"{file.name} cannot be read ({type(error).__name__}); save the policy again") from error
        steps = content.get("steps") if isinstance(content, dict) else None
        for step in steps if isinstance(steps, list) else []:
            name = step.get("class", "lerobot.") if isinstance(step, dict) else repr(step)
            if not str(name).startswith("lerobot."):
                raise RequestError(f"{file.name} names the code {name!r:.80}, which is not LeRobot's, and is not run")


class LeRobotPolicy:
    """A policy saved by LeRobot, with its own pre- and postprocessing.

    Args:
        path: directory with config.json and model.safetensors: checkpoints/*/pretrained_model of lerobot-train.
        device: name of the torch device.

    Raises:
        RequestError: inputs or outputs of the policy are not those of an SO-101.
    """

    def __init__(self, path: Path, device: str):
        check_processors(path)
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        self.config = PreTrainedConfig.from_pretrained(path)
        self.config.device = device
        self.policy = get_policy_class(self.config.type).from_pretrained(path, config=self.config).eval()
        on_device = {"device_processor": {"device": device}}
        self.preprocess, self.postprocess = make_pre_post_processors(
            self.config, str(path), preprocessor_overrides=on_device
        )
        shapes = {key: tuple(feature.shape) for key, feature in self.config.input_features.items()}
        self.images = {key.removeprefix(IMAGES): shapes[key] for key in shapes if key.startswith(IMAGES)}
        action = tuple(self.config.output_features["action"].shape)
        if others := [key for key in shapes if key != STATE and not key.startswith(IMAGES)]:
            raise RequestError(f"the policy needs {others[0]}, which is neither joints nor a camera; train it without")
        if shapes.get(STATE) != (6,) or action != (6,):
            raise RequestError(f"the policy has state {shapes.get(STATE)} and action {action}; an SO-101 has (6,)")
        self.num_obs = self.config.n_obs_steps
        # the horizon of a diffusion policy starts in the past; it returns the steps from now on
        self.horizon = self.config.n_action_steps if self.config.type == "diffusion" else self.config.chunk_size
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".safetensors") and file.name != "train_config.json":
                digest.update(file.name.encode() + file.read_bytes())
        self.weights = digest.hexdigest()

    def modality_config(self) -> dict[str, Any]:
        """The policy's inputs and outputs, in the format of GR00T's servers."""
        past, future = list(range(1 - self.num_obs, 1)), list(range(self.horizon))
        keys = {"video": (list(self.images), past), "state": (list(JOINT_GROUPS), past)}
        keys |= {"action": (list(JOINT_GROUPS), future), "language": (["annotation.human.task_description"], [0])}
        return {
            kind: {"__ModalityConfig_class__": True, "as_json": {"modality_keys": names, "delta_indices": deltas}}
            for kind, (names, deltas) in keys.items()
        }

    def get_action(self, observation: Any, options: Any) -> dict[str, np.ndarray]:
        """Actions (B, horizon, D) by joint group, in the unit that the policy was trained in.

        Args:
            observation: pictures (B, T, H, W, 3) uint8 by camera in "video", joint positions (B, T, D) by joint group
                in "state", texts by key in "language".
            options: "seed" of the noise that the policy draws.

        Raises:
            RequestError: the observation does not fit the policy.
        """
        import torch

        steps, video, state, text = self.num_obs, *(_map(observation, key) for key in ("video", "state", "language"))
        groups = [_array(state, key, "state") for key in JOINT_GROUPS]
        batch_size = len(groups[0])
        for key, array, group in zip(JOINT_GROUPS, groups, JOINT_GROUPS.values()):
            _check_shape(f"state {key}", array, (batch_size, steps, group.stop - group.start))
        batch: dict[str, Any] = {STATE: torch.from_numpy(np.concatenate(groups, axis=2).astype(np.float32))}
        for name, (channels, height, width) in self.images.items():
            frames = _array(video, name, "video")
            _check_shape(f"video {name}", frames, (batch_size, steps, height, width, channels))
            pixels = torch.from_numpy(frames.copy()).permute(0, 1, 4, 2, 3)
            batch[IMAGES + name] = pixels.to(torch.float32) / 255.0
        if steps == 1:
            batch = {key: tensor[:, 0] for key, tensor in batch.items()}
        texts = next(iter(text.values()), [[""]] * batch_size)
        batch["task"] = [row[0] for row in texts]

        seed = options.get("seed", 0) if isinstance(options, dict) else 0
        torch.manual_seed(int(seed))
        with torch.inference_mode():
            self.policy.reset()  # forget earlier requests, which may be of other arms
            action = self.postprocess(self._predict(self.preprocess(batch)))
        action = action[:, : self.horizon].float().cpu().numpy()
        return {key: action[:, :, group] for key, group in JOINT_GROUPS.items()}

    def _predict(self, batch: dict[str, Any]) -> Any:
        """The predicted chunk of actions (B, horizon, 6), normalised."""
        if self.config.type != "diffusion":
            return self.policy.predict_action_chunk(batch)
        # for diffusion, predict_action_chunk reads queues that only select_action fills, one observation at a time
        import torch

        batch = {key: value if self.num_obs > 1 else value[:, None] for key, value in batch.items() if key != "task"}
        if self.images:
            batch["observation.images"] = torch.stack([batch[IMAGES + name] for name in self.images], dim=2)
        return self.policy.diffusion.generate_actions(batch)


def load_saved_policy(path: Path, device: str) -> LeRobotPolicy:
    """The policy in a directory. Raises RequestError for any that LeRobot cannot load."""
    try:
        return LeRobotPolicy(path, device)
    except RequestError:
        raise
    except Exception as error:  # LeRobot raises many types of exceptions for a directory that it cannot read
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RequestError(f"LeRobot cannot load it ({reason})") from error


def _map(value: Any, key: str) -> dict[str, Any]:
    """The map `key` of an observation. Raises RequestError if it is missing."""
    if not isinstance(value, dict) or not isinstance(value.get(key), dict):
        raise RequestError(f"observation: {key} is missing")
    return value[key]


def _array(values: dict[str, Any], key: str, kind: str) -> np.ndarray:
    """The array `key` of a map. Raises RequestError if it is missing."""
    if not isinstance(values.get(key), np.ndarray):
        raise RequestError(f"observation: {kind} {key} is missing")
    return values[key]


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise RequestError if an array has another shape."""
    if array.shape != shape:
        hint = f"; --image-size {shape[2]} {shape[3]}" if len(shape) == 5 and array.shape[:2] == shape[:2] else ""
        raise RequestError(f"observation: {name} must be {shape}, got {array.shape}{hint}")


def answer(policy: LeRobotPolicy, request: Any) -> Any:
    """The reply to one request."""
    if not isinstance(request, dict):
        raise RequestError("a request must be a map with an endpoint")
    endpoint, data = request.get("endpoint", "get_action"), request.get("data") or {}
    if not isinstance(data, dict):
        raise RequestError("the data of a request must be a map")
    if endpoint == "ping":
        return {"status": "ok", "message": "Server is running", "weights": policy.weights}
    if endpoint == "get_modality_config":
        return policy.modality_config()
    if endpoint == "reset":  # there is nothing to reset: no request depends on an earlier one
        return {}
    if endpoint == "get_action":
        return [policy.get_action(data.get("observation"), data.get("options")), {}]
    raise RequestError(f"Unknown endpoint: {endpoint!r}")


def serve(socket: Any, policy: LeRobotPolicy) -> None:
    """Answer the requests at a bound REP socket until an exception ends it. A request with a fault gets an error."""
    from so101.wire import MAX_ERROR_LETTERS, pack, unpack

    while True:
        parts = socket.recv_multipart()
        try:
            if len(parts) > 1:
                raise RequestError(f"a request must have one part, not {len(parts)}")
            reply = pack(answer(policy, unpack(parts[0])), "n1.6")
        except Exception as error:  # the client gets the error, and the server continues
            text = str(error) if isinstance(error, RequestError) else repr(error)
            text = " ".join(text[:MAX_ERROR_LETTERS].split())
            reply = pack({"error": text}, "n1.6")
            print(f"error: {text}", file=sys.stderr, flush=True)
        socket.send(reply)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print it, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    """Serve until Ctrl+C."""
    parser = Parser(
        prog="python -m so101.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory with config.json and model.safetensors")
    parser.add_argument("--port", type=int, default=5555, help="port on 127.0.0.1 (default 5555)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--num-threads", type=int, help="torch threads; the last digits of answers depend on it")
    args = parser.parse_args()
    try:
        check_files(args.model)
    except RequestError as error:
        parser.error(f"--model {args.model}: {error}")
    if not 1 <= args.port <= 65535 or (args.num_threads is not None and args.num_threads < 1):
        parser.error("--port must be in 1 to 65535, --num-threads at least 1")
    try:
        import zmq

        from so101.wire import MAX_MESSAGE_BYTES
    except ImportError as error:
        parser.error(f"needs {error.name}: pip install pyzmq msgpack, in LeRobot's environment")
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)  # a larger request ends its connection
        try:
            socket.bind(f"tcp://127.0.0.1:{args.port}")
        except zmq.ZMQError as error:
            parser.error(f"--port {args.port}: {error.strerror}; name another port")
        try:
            import lerobot  # noqa: F401
            import torch

            if args.num_threads:
                torch.set_num_threads(args.num_threads)
            policy = load_saved_policy(args.model, args.device)
        except ImportError as error:
            parser.error(f"{error}; run this in LeRobot's environment, see requirements-lerobot.txt")
        except RequestError as error:
            parser.error(f"--model {args.model}: {error}")
        print(
            f"{policy.config.type}, {policy.horizon} steps a chunk, cameras {' '.join(policy.images) or 'none'}, "
            f"at 127.0.0.1:{args.port}",
            flush=True,
        )
        serve(socket, policy)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
