"""Serve a policy that LeRobot has trained, as a base policy for ppo_residual_so101.py. Runs in LeRobot's environment.

    pip install pyzmq msgpack          # in the environment in which the policy was trained
    python serve_lerobot.py --policy outputs/train/act_so101/checkpoints/last/pretrained_model
    python ppo_residual_so101.py --base-policy server:127.0.0.1:5555 --units deg      # in this project's environment

It speaks the wire of GR00T N1.6 (see so101_wire.py), answers a whole batch of arms in one call, and only to programs on
this machine. The same question gets the same answer to the bit: policies that draw noise are seeded by the client.
"""

import argparse
import hashlib
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from so101_wire import JOINT_GROUPS, pack, unpack

STATE, IMAGES = "observation.state", "observation.images."


class RequestError(ValueError):
    """A request that cannot be answered; its text goes back to the client."""


class LeRobotPolicy:
    """A policy directory of LeRobot, with its own pre- and postprocessing.

    Args:
        path: directory with config.json and model.safetensors: checkpoints/*/pretrained_model of lerobot-train.
        device: torch's name of the device.

    Raises:
        RequestError: a policy whose inputs are no SO-101's.
    """

    def __init__(self, path: Path, device: str):
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
            raise RequestError(f"the policy needs {others[0]}, which no camera shows; train it without")
        if shapes.get(STATE) != (6,) or action != (6,):
            raise RequestError(f"state {shapes.get(STATE)} and action {action} of the policy are not an SO-101's (6,)")
        self.num_obs = self.config.n_obs_steps
        # diffusion predicts a horizon that starts in the past, and gives what is left of it from now on
        self.horizon = self.config.n_action_steps if self.config.type == "diffusion" else self.config.chunk_size
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".safetensors"):
                digest.update(file.name.encode() + file.read_bytes())
        self.weights = digest.hexdigest()

    def modality_config(self) -> dict[str, Any]:
        """What the policy sees and gives, as GR00T's servers say it."""
        past, future = list(range(1 - self.num_obs, 1)), list(range(self.horizon))
        keys = {"video": (list(self.images), past), "state": (list(JOINT_GROUPS), past)}
        keys |= {"action": (list(JOINT_GROUPS), future), "language": (["annotation.human.task_description"], [0])}
        return {
            kind: {"__ModalityConfig_class__": True, "as_json": {"modality_keys": names, "delta_indices": deltas}}
            for kind, (names, deltas) in keys.items()
        }

    def get_action(self, observation: Any, options: Any) -> dict[str, np.ndarray]:
        """Actions (B, horizon, D) by joint group; raises RequestError for an observation that is not what is needed."""
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
            self.policy.reset()  # nothing is left over from other arms
            action = self.postprocess(self._predict(self.preprocess(batch)))
        action = action[:, : self.horizon].float().cpu().numpy()
        return {key: action[:, :, group] for key, group in JOINT_GROUPS.items()}

    def _predict(self, batch: dict[str, Any]) -> Any:
        """The chunk (B, horizon, 6), normalised."""
        if self.config.type != "diffusion":
            return self.policy.predict_action_chunk(batch)
        # its predict_action_chunk reads queues that only its select_action fills, one observation at a time
        import torch

        batch = {key: value if self.num_obs > 1 else value[:, None] for key, value in batch.items() if key != "task"}
        if self.images:
            batch["observation.images"] = torch.stack([batch[IMAGES + name] for name in self.images], dim=2)
        return self.policy.diffusion.generate_actions(batch)


def _map(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get(key), dict):
        raise RequestError(f"observation: {key} is missing")
    return value[key]


def _array(values: dict[str, Any], key: str, kind: str) -> np.ndarray:
    if not isinstance(values.get(key), np.ndarray):
        raise RequestError(f"observation: {kind} {key} is missing")
    return values[key]


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        hint = f"; --image-size {shape[2]} {shape[3]}" if len(shape) == 5 and array.shape[:2] == shape[:2] else ""
        raise RequestError(f"observation: {name} must be {shape}, got {array.shape}{hint}")


def answer(policy: LeRobotPolicy, request: Any) -> Any:
    """The reply to one request."""
    if not isinstance(request, dict):
        raise RequestError("a request is a map with an endpoint")
    endpoint, data = request.get("endpoint", "get_action"), request.get("data") or {}
    if endpoint == "ping":
        return {"status": "ok", "message": "Server is running", "weights": policy.weights}
    if endpoint == "get_modality_config":
        return policy.modality_config()
    if endpoint == "reset":  # nothing is remembered from one request to the next
        return {}
    if endpoint == "get_action":
        return [policy.get_action(data.get("observation"), data.get("options")), {}]
    raise RequestError(f"Unknown endpoint: {endpoint}")


def main() -> int:
    """Serve until Ctrl+C; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, type=Path, help="directory with config.json and model.safetensors")
    parser.add_argument("--port", type=int, default=5555, help="port on 127.0.0.1 (default 5555)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--num-threads", type=int, help="torch threads; the last digits of answers depend on it")
    args = parser.parse_args()
    for name in ("config.json", "model.safetensors"):
        if not (args.policy / name).is_file():
            parser.error(f"--policy {args.policy}: no {name} there; name a pretrained_model directory of lerobot-train")
    if not 1 <= args.port <= 65535 or (args.num_threads or 1) < 1:
        parser.error("--port must be in 1 to 65535, --num-threads at least 1")
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.bind(f"tcp://127.0.0.1:{args.port}")
        except zmq.ZMQError as error:
            parser.error(f"--port {args.port}: {error.strerror}; name another port")
        try:
            import torch

            if args.num_threads:
                torch.set_num_threads(args.num_threads)
            policy = LeRobotPolicy(args.policy, args.device)
        except ImportError as error:
            parser.error(f"{error}; run this in LeRobot's environment, see requirements-lerobot.txt")
        except RequestError as error:
            parser.error(f"--policy {args.policy}: {error}")
        print(
            f"{policy.config.type}, {policy.horizon} steps a chunk, cameras {' '.join(policy.images) or 'none'}, "
            f"at 127.0.0.1:{args.port}",
            flush=True,
        )
        try:
            while True:
                try:
                    reply = answer(policy, unpack(socket.recv()))
                except Exception as error:  # whatever it was, the client is told, and the next one served
                    reply = {"error": str(error) if isinstance(error, RequestError) else f"{error!r}"}
                    print(f"refused: {reply['error']}", file=sys.stderr, flush=True)
                socket.send(pack(reply, "n1.6"))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
