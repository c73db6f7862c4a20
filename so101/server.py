"""A policy of LeRobot or GR00T as base policy: `server:HOST:PORT`, or `lerobot:DIR` without a server."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from so101.base import BasePolicy, camera_names, follow_chunks, new_chunks
from so101.cli import check_unused
from so101.extras import import_extra
from so101.groot import JOINT_GROUPS, Modality, PolicyError, check_action, identity_of, make_request
from so101.trust import Trust
from so101_env import (
    ACT_DIM,
    HOME_RAD,
    STATE,
    TASK_TEXT,
    BaseObservation,
    BasePolicyError,
    SO101Error,
)
from so101_sim.control import from_rad, to_rad
from so101_sim.vector import IMAGES


@dataclasses.dataclass(frozen=True)
class Server:
    """Options of pictures, and of a policy server as base policy."""

    cameras: tuple[str, ...] = ()
    """cameras to record, or that a policy server sees: top, wrist, or NAME=CAMERA if it has another name there"""
    image_size: tuple[int, ...] = (96,)
    """side of the pictures in pixels, or height and width"""
    units: Literal["deg", "norm", "rad", "deg-old"] | None = None
    """unit of the joints of a LeRobot or GR00T policy, which does not report it: deg (gripper 0 to 100; LeRobot since
    0.4.4, and recordings of this project), norm (-100 to 100; older LeRobot), rad, or deg-old (before LeRobot's
    calibration of 2025)"""
    chunk_steps: int = 8
    """steps of each predicted chunk that are executed before the policy is asked again"""
    instruction: str = TASK_TEXT
    """instruction for a LeRobot or GR00T policy"""
    server_timeout: float = 15.0
    """seconds to wait for a policy server; the first action may take 60"""
    trust: Trust = dataclasses.field(default_factory=Trust)

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"chunk_steps": (1, 1000), "server_timeout": (0.1, 3600)}

    def check_used(self, spec: str, *recorded: str) -> None:
        """Raise SO101Error for the first option without effect on the base policy that a person has named by spec.

        Args:
            spec: the base policy's spec string.
            recorded: options that also are for a recording.
        """
        kind = spec.removeprefix("opencv:").partition(":")[0]
        names = {"cameras", "image_size", "units", "chunk_steps", "instruction", "server_timeout"} - {*recorded}
        if kind == "lerobot":
            check_unused(self, ("server_timeout",), f"{spec} is no server")
        elif kind != "server":
            check_unused(self, names, f"only server:HOST:PORT and lerobot:DIR have it, {spec} has not")

    def camera_map(self) -> dict[str, str]:
        """Cameras of the scene, by their names in datasets and at the server."""
        pairs = [text.split("=", 1) if "=" in text else (text, text) for text in self.cameras]
        if len({name for name, _ in pairs}) < len(pairs) or not all(name and camera for name, camera in pairs):
            raise SO101Error(f"--cameras {' '.join(self.cameras)}: give NAME or NAME=CAMERA, each name once")
        if unknown := [camera for _, camera in pairs if camera not in camera_names()]:
            known = " and ".join(camera_names())
            raise SO101Error(f"--cameras {unknown[0]}: the scene has no such camera, it has {known}")
        return dict(pairs)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, pixels."""
        size = self.image_size
        if len(size) not in (1, 2) or not all(8 <= side <= 1024 and side % 2 == 0 for side in size):
            text = " ".join(map(str, size))
            raise SO101Error(f"--image-size {text}: give one side or height and width, even numbers from 8 to 1024")
        return size[0], size[-1]


class ChunkPolicy(BasePolicy):
    """A camera policy of LeRobot or GR00T, which predicts chunks of joint targets.

    All environments that need a new chunk in a step are one request. The first chunk_steps absolute joint targets of
    every predicted chunk are executed, see follow_chunks.

    Args:
        spec: the base policy's spec, for messages.
        client: has what the policy sees and returns, `modalities` by kind, and the methods get_action, identify and
            close of so101.wire.PolicyClient. The policy closes it.
        options: unit of the joints, picture size and so on.

    Raises:
        BasePolicyError: the policy does not answer, fails, or is not one for an SO-101.
    """

    def __init__(self, spec: str, client: Any, options: Server):
        self.spec, self.client, self.options, self.image_size, self.memory = spec, client, options, options.size, {}
        try:
            self._match_modalities()
            # grey pictures of an arm at home
            home, video, steps = HOME_RAD[None].astype(np.float32), client.modalities["video"], self.past + [0]
            grey = np.full((1, len(steps), *self.image_size, 3), 128, np.uint8)
            probe = self._question({key: grey for key in video.keys}, np.repeat(home[:, None], len(steps), axis=1))
            facts = [
                (name, getattr(options, name)) for name in ("cameras", "size", "units", "chunk_steps", "instruction")
            ]
            self.fingerprint = hashlib.sha256(f"{client.identify(probe)} {facts}".encode()).hexdigest()
        except PolicyError as error:
            self.close()
            raise self._error(error) from error
        except BaseException:
            self.close()
            raise

    def _error(self, problem: object) -> BasePolicyError:
        return BasePolicyError(f"base policy {self.spec}: {problem}")

    def _match_modalities(self) -> None:
        """Match cameras, states and actions of the policy with those of the scene."""
        video, state, action = (self.client.modalities[kind] for kind in ("video", "state", "action"))
        names = self.options.camera_map()
        self.camera_of = {key: names.get(key, key) for key in video.keys}
        if unknown := [key for key, camera in self.camera_of.items() if camera not in camera_names()]:
            example = " ".join(f"{key}={camera}" for key, camera in zip(video.keys, camera_names()))
            text = f"its policy sees {' and '.join(video.keys)}; say which camera {unknown[0]} is, as in"
            raise self._error(f"{text} --cameras {example}")
        if unused := [name for name in names if name not in video.keys]:
            seen = " and ".join(video.keys) or "no camera"
            raise self._error(f"--cameras {unused[0]}: its policy does not see this camera; it sees {seen}")
        self.cameras = tuple(dict.fromkeys(self.camera_of.values()))
        for kind, keys in (("state", state.keys), ("action", action.keys)):
            if unknown := [key for key in keys if key not in JOINT_GROUPS]:
                known = " and ".join(JOINT_GROUPS)
                raise self._error(f"its policy has the {kind} {unknown[0]}; an SO-101's are {known}")
        if missing := [key for key in JOINT_GROUPS if key not in action.keys]:
            raise self._error(f"its policy does not return {missing[0]}, only {' and '.join(action.keys) or 'nothing'}")
        horizon = len(action.deltas)
        if action.deltas != list(range(horizon)):
            raise self._error(f"its policy predicts the steps {action.deltas}, not all steps from now on")
        if self.options.chunk_steps > horizon:
            raise self._error(f"--chunk-steps {self.options.chunk_steps}: its policy predicts {horizon} steps")
        self.past = video.deltas[:-1] if video.keys else state.deltas[:-1]
        deltas = [modality.deltas for modality in (video, state) if modality.keys]
        if any(each != [*self.past, 0] for each in deltas) or any(-d > self.options.chunk_steps for d in self.past):
            text = f"its policy sees the steps {deltas[0]}; only 0 and up to --chunk-steps before it are possible"
            raise self._error(text)

    def _question(self, video: dict[str, np.ndarray], joints_rad: np.ndarray) -> dict[str, Any]:
        """Arguments of PolicyClient.get_action for pictures (B, T, H, W, 3) and joint positions (B, T, 6), rad."""
        joints = from_rad(joints_rad.astype(np.float64), self.options.units)
        state = {key: joints[:, :, JOINT_GROUPS[key]] for key in self.client.modalities["state"].keys}
        return {"video": video, "state": state, "text": self.options.instruction}

    def reset(self, mask: np.ndarray) -> None:
        """Ask for a new chunk before the next step."""
        n, steps = len(mask), self.options.chunk_steps
        if not self.memory or len(self.memory["step"]) != n:
            self.memory = new_chunks(n, steps)
            for back in self.past:  # past observations
                self.memory[f"joints{back}"] = np.zeros((n, ACT_DIM), np.float32)
                for camera in self.cameras:
                    self.memory[f"{camera}{back}"] = np.zeros((n, *self.image_size, 3), np.uint8)
            self.memory["new"] = np.zeros(n, bool)  # no observation in this episode yet
        self.memory["step"][mask], self.memory["new"][mask] = 0, True

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): from the last commanded targets to the policy's."""
        memory, steps = self.memory, self.options.chunk_steps
        look = mask & (memory["step"] == 0)
        if look.any():
            memory["targets"][look] = self._look(obs.rows(look), look)
            memory["new"][look] = False
        for back in self.past:  # a policy that also sees the past will need the present observation
            if (rows := mask & (memory["step"] == (steps + back) % steps)).any():
                seen = obs.rows(rows)
                memory[f"joints{back}"][rows] = seen[STATE]
                for camera in self.cameras:
                    memory[f"{camera}{back}"][rows] = seen[IMAGES + camera]
        return follow_chunks(memory, obs, mask)

    def _look(self, seen: BaseObservation, look: np.ndarray) -> np.ndarray:
        """The next joint targets (n, chunk_steps, 6), rad, of the n environments in look, (N,) bool."""
        new, n = self.memory["new"][look], int(look.sum())

        def over_time(name: str, now: np.ndarray) -> np.ndarray:
            """(n, T, ...): past observations, or the present one at the start of an episode."""
            past = [self.memory[f"{name}{back}"][look] for back in self.past]
            for array in past:
                array[new] = now[new]
            return np.stack([*past, now], axis=1)

        pictures = {camera: over_time(camera, seen[IMAGES + camera]) for camera in self.cameras}
        video = {key: pictures[camera] for key, camera in self.camera_of.items()}
        try:
            action = self.client.get_action(**self._question(video, over_time("joints", seen[STATE])))
            groups = [
                check_action(action, key, n, self.options.chunk_steps, group.stop - group.start)
                for key, group in JOINT_GROUPS.items()
            ]
            return to_rad(np.concatenate(groups, axis=2), self.options.units)
        except PolicyError as error:
            raise self._error(error) from error
        except SO101Error as error:
            raise self._error(f"{error}; check --units") from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


class ServerPolicy(ChunkPolicy):
    """A policy behind a server of LeRobot or GR00T: `server:HOST:PORT`.

    Raises BasePolicyError if the server may not be contacted, or as ChunkPolicy does.
    """

    def __init__(self, address: str, options: Server):
        spec = f"server:{address}"
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
            raise BasePolicyError(f"base policy {spec}: give server:HOST:PORT, as in server:127.0.0.1:5555")
        token, remote = os.environ.get("SO101_API_TOKEN"), not _is_loopback(host)
        if remote and not options.trust.allow_remote:
            raise BasePolicyError(
                f"base policy {spec}: is another machine, and the connection is not encrypted: tunnel it "
                f"(ssh -L {port}:127.0.0.1:{port} {host}), or pass --allow-remote"
            )
        if remote and token and not options.trust.send_token:
            raise BasePolicyError(
                f"base policy {spec}: SO101_API_TOKEN would leave this machine in clear text: tunnel the "
                "connection, unset the token, or pass --send-token"
            )
        check_units(spec, options)
        import_extra("zmq", "server", f"base policy {spec}")
        import_extra("msgpack", "server", f"base policy {spec}")
        from so101 import wire

        try:
            client = wire.PolicyClient(host, int(port), options.server_timeout, api_token=token)
        except PolicyError as error:
            raise BasePolicyError(f"base policy {spec}: {error}") from error
        super().__init__(spec, client, options)


class InProcess:
    """A policy directory of LeRobot, in this process, with the interface of so101.wire.PolicyClient.

    Its answers, and its identity, are those of the same directory behind so101.serve.
    """

    def __init__(self, policy: Any):
        self.policy = policy  # so101.serve.LeRobotPolicy
        self.config = {kind: entry["as_json"] for kind, entry in policy.modality_config().items()}
        parts = {kind: (entry["modality_keys"], entry["delta_indices"]) for kind, entry in self.config.items()}
        self.modalities = {kind: Modality(*part) for kind, part in parts.items()}

    def get_action(
        self, video: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], text: str
    ) -> dict[str, np.ndarray]:
        """See so101.wire.PolicyClient.get_action."""
        from so101.serve import RequestError

        try:
            return self.policy.get_action(**make_request(self.modalities, video, state, text))
        except RequestError as error:
            raise PolicyError(str(error)) from error

    def identify(self, probe: dict[str, Any]) -> str:
        """The identity that so101.wire.PolicyClient.identify finds for the same directory behind so101.serve."""
        return identity_of("n1.6", json.dumps(self.config, sort_keys=True), self.policy.weights, "")

    def close(self) -> None:
        """Nothing to do."""


class LeRobotBase(ChunkPolicy):
    """A policy trained by LeRobot, in this process: `lerobot:DIR`, where DIR is a pretrained_model directory.

    LeRobot must be installed in this environment. Pictures have the size that the policy was trained with.

    Raises:
        BasePolicyError: there is no such policy, LeRobot cannot load it, or as ChunkPolicy does.
    """

    def __init__(self, directory: str, options: Server):
        spec, path = f"lerobot:{directory}", Path(directory)
        check_units(spec, options)
        from so101.serve import RequestError, check_files, load_saved_policy

        try:
            check_files(path)
            import_extra("lerobot", "lerobot", f"base policy {spec}")
            policy = load_saved_policy(path, "cpu")
        except RequestError as error:
            raise BasePolicyError(f"base policy {spec}: {error}") from error
        sizes = {shape[1:] for shape in policy.images.values()} or {options.size}
        if len(sizes) > 1:
            raise BasePolicyError(f"base policy {spec}: its cameras have pictures of different sizes, {sizes}")
        if options.size not in sizes:
            if options.image_size != Server.image_size:
                size = " ".join(map(str, options.size))
                raise BasePolicyError(f"base policy {spec}: --image-size {size}: its pictures are {sizes}; drop it")
            options = dataclasses.replace(options, image_size=sizes.pop())
        super().__init__(spec, InProcess(policy), options)


def check_units(spec: str, options: Server) -> None:
    """Raise BasePolicyError unless the unit of the policy's joints is given."""
    if options.units is None:
        raise BasePolicyError(
            f"base policy {spec}: it does not say in which unit its joints are: pass --units deg (LeRobot since "
            "0.4.4, and recordings of this project), norm (older LeRobot) or rad"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
