"""How to talk to a policy server: ZeroMQ and msgpack, as NVIDIA's GR00T servers do, in the dialects of three releases.

One request at a time, a msgpack map {"endpoint", "data", "api_token"} in one frame, answered by one frame. The dialects
differ in how arrays travel, in what get_action takes and gives, and in how the policy says what it wants:

    n1.5   release N1.5
    n1.6   releases N1.6, N1.6.1 and N1.7, and serve_lerobot.py
    main   since May 2026

Nothing here unpickles anything, and nothing of the rest of the project is imported: serve_lerobot.py runs in LeRobot's
environment and shares this file. Formats: gr00t/eval/service.py, gr00t/policy/server_client.py of NVIDIA/Isaac-GR00T.
"""

import hashlib
import io
import json
import math
import socket
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

DIALECTS = ("n1.5", "n1.6", "main")
MAX_REPLY_BYTES = 2**28
JOINT_GROUPS = {"single_arm": slice(0, 5), "gripper": slice(5, 6)}  # of state and action, JOINTS order
PIECE_S = 0.2  # how often a wait looks whether the connection still stands


class WireError(RuntimeError):
    """A server that cannot be used, or has failed, said in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# messages


def pack(message: Any, dialect: str) -> bytes:
    """A message as bytes; arrays as the dialect has them."""

    def default(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray) or value.dtype.hasobject or value.dtype.names:
            raise TypeError(f"{type(value).__name__} cannot be sent")
        if dialect == "main":  # as the package msgpack-numpy writes it
            head = {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": list(value.shape)}
            return head | {b"data": np.ascontiguousarray(value).tobytes()}
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    return msgpack.packb(message, default=default)


def unpack(body: bytes) -> Any:
    """A message from bytes of any dialect, arrays and modality configs decoded. Raises WireError for anything else."""
    try:
        return msgpack.unpackb(body, object_hook=_decode)
    except Exception as error:  # msgpack and numpy raise many kinds for garbage
        raise WireError(f"answers with what is no message of a policy server ({type(error).__name__})") from error


def _decode(value: dict[Any, Any]) -> Any:
    """One map of a message: an array, a modality config, or as it is."""
    if "__ndarray_class__" in value:
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
    if "__ModalityConfig_class__" in value or "__ModalityConfig__" in value:
        config = value["as_json"]
        return json.loads(config) if isinstance(config, str) else config
    plain = {key.decode() if isinstance(key, bytes) else key: item for key, item in value.items()}
    if "nd" in plain and "type" in plain and "data" in plain:
        if plain.get("kind") not in (None, b"", ""):
            raise ValueError("an array of objects or records")
        return np.frombuffer(plain["data"], np.dtype(plain["type"])).reshape(plain["shape"] if plain["nd"] else ())
    return value


# ---------------------------------------------------------------------------------------------------------------------
# the client


class Modality(NamedTuple):
    """What the policy wants, or gives, of one kind."""

    keys: list[str]  # without the prefixes of n1.5
    deltas: list[int]  # control steps relative to now: 0 is now, -1 the step before


class PolicyClient:
    """A connection to a policy server.

    A server that closes the connection, as when it is restarted, is waited for, asked again, and must be the same.

    Args:
        host, port: its address.
        timeout_s: how long to wait for an answer, and for a server that went away.
        first_timeout_s: the same for its first answer and first action, when it may still be loading.
        api_token: sent with each request, in clear text.

    Raises:
        WireError: nothing there, no answer, or none of the known dialects.
    """

    def __init__(
        self, host: str, port: int, timeout_s: float = 15.0, first_timeout_s: float = 60.0, api_token: str | None = None
    ):
        self.host, self.port, self.api_token = host, port, api_token
        self.timeout_s, self.first_timeout_s = timeout_s, max(first_timeout_s, timeout_s)
        self._socket, self.dialect, self._checking = None, "", False
        self._warm = False  # whether it has given an action
        self._probe: dict[str, Any] | None = None
        try:
            self._connect(wait_s=0.0)
            self._read_identity()
        except BaseException:
            self.close()
            raise

    def get_action(
        self, video: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], text: str
    ) -> dict[str, np.ndarray]:
        """The actions that the policy answers with, by key, (B, horizon, D); keys and shapes are not checked here.

        Args:
            video: pictures (B, T, H, W, 3) uint8 by camera.
            state: (B, T, D) by key.
            text: what to do.
        """
        batch = len(next(iter([*state.values(), *video.values()])))
        languages = {key: [[text]] * batch for key in self.modalities["language"].keys}
        if self.dialect == "n1.5":
            data: dict[str, Any] = {f"video.{key}": frames for key, frames in video.items()}
            data |= {f"state.{key}": array.astype(np.float64) for key, array in state.items()}
            return self._actions({**data, **languages})
        state = {key: array.astype(np.float32) for key, array in state.items()}
        # a server that draws noise can be reproduced if it heeds the seed: GR00T's do not, serve_lerobot.py does
        seed = zlib.crc32(b"".join(array.tobytes() for array in state.values()))
        observation = {"video": dict(video), "state": state, "language": languages}
        return self._actions({"observation": observation, "options": {"seed": seed}})

    def identify(self, probe: dict[str, Any]) -> str:
        """SHA-256 of all that is known of the policy: it changes with the weights, as far as the wire tells.

        Weights are known by their hash where the server gives one in its answer to ping, as serve_lerobot.py does, and
        else by the answer to one fixed question, if it is the same twice. GR00T draws noise: its weights stay unknown.

        Args:
            probe: the arguments of get_action for that question.
        """
        self._probe = probe
        self._answer = self._ask_probe()
        if self._answer and self._ask_probe() != self._answer:
            self._answer = ""
        facts = [self.dialect, json.dumps(self._config, sort_keys=True), self._weights, self._answer]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._disconnect()

    # -- what the server is

    def _read_identity(self) -> None:
        """Find out dialect, modalities, and the weights' hash if it is given. Neither endpoint needs an array."""
        body = self._request("ping", None, self.timeout_s if self._warm else self.first_timeout_s)
        if body[:2] == b"PK":
            raise WireError("speaks the pickles of GR00T N1, which can run any code here; use N1.5 or later")
        reply = self._reply("ping", body)
        weights = reply.get("weights", "") if isinstance(reply, dict) else ""
        body = self._request("get_modality_config", None)
        config = self._reply("get_modality_config", body)
        if not isinstance(config, dict) or not config:
            raise WireError("does not say which cameras, states and actions its policy has")
        if b"__ModalityConfig__" in body:
            dialect = "main"
        elif b"__ModalityConfig_class__" in body:
            first = next(iter(msgpack.unpackb(body).values()))
            dialect = "n1.5" if isinstance(first, dict) and isinstance(first.get("as_json"), str) else "n1.6"
        else:
            raise WireError("describes its policy in a way that no known release of GR00T does")
        self.modalities = {}
        for kind in ("video", "state", "action", "language"):
            entry = config.get(kind) or {"modality_keys": [], "delta_indices": [0]}
            try:
                keys, deltas = entry["modality_keys"], [int(delta) for delta in entry["delta_indices"]]
            except (KeyError, TypeError, ValueError) as error:
                raise WireError(f"describes its {kind} in a way that cannot be used ({error!r})") from error
            if dialect == "n1.5" and kind != "language":
                keys = [key.removeprefix(f"{kind}.") for key in keys]
            self.modalities[kind] = Modality(keys, deltas)
        self.dialect, self._config, self._weights = dialect, config, str(weights)

    def _ask_probe(self) -> str:
        """Hash of the answer to the probe; empty where the weights are known, which makes it needless."""
        if self._weights:
            return ""
        answer = self.get_action(**self._probe)
        return hashlib.sha256(b"".join(np.asarray(answer[key]).tobytes() for key in sorted(answer))).hexdigest()

    def _check_identity(self) -> None:
        """After the connection was closed: raise WireError if this is another policy."""
        before = self.dialect, self._config, self._weights
        self._read_identity()
        same = before == (self.dialect, self._config, self._weights)
        if self._probe and self._answer:
            same = same and self._ask_probe() == self._answer
        if not same:
            raise WireError("was restarted with another policy; put the old one back")

    # -- requests

    def _actions(self, data: dict[str, Any]) -> dict[str, np.ndarray]:
        timeout_s = self.timeout_s if self._warm else self.first_timeout_s
        reply = self._reply("get_action", self._request("get_action", data, timeout_s))
        if self.dialect != "n1.5":
            if not isinstance(reply, list) or len(reply) != 2:
                raise WireError(f"get_action: answers with {type(reply).__name__} instead of [action, info]")
            reply = reply[0]
        if not isinstance(reply, dict):
            raise WireError(f"get_action: answers with {type(reply).__name__} instead of a map")
        self._warm = True
        return {key.removeprefix("action.") if self.dialect == "n1.5" else key: reply[key] for key in reply}

    def _reply(self, endpoint: str, body: bytes) -> Any:
        """The decoded answer; an answer that is an error raises WireError with the server's words."""
        try:
            reply = unpack(body)
        except WireError as error:
            raise WireError(f"{endpoint}: {error}") from error
        if isinstance(reply, dict) and "error" in reply:
            text = " ".join(str(reply["error"]).split())
            if "Unauthorized" in text:
                text += "; set its token in the environment variable SO101_API_TOKEN"
            raise WireError(f"{endpoint}: the server says {text!r}" if text else f"{endpoint}: an error without a text")
        return reply

    def _request(self, endpoint: str, data: Any, timeout_s: float | None = None) -> bytes:
        """Send one request and wait for its answer, undecoded."""
        message = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        if self.api_token is not None:
            message["api_token"] = self.api_token
        body, timeout_s = pack(message, self.dialect), timeout_s or self.timeout_s
        for _ in range(2):
            if self._went_away():
                self._reconnect(endpoint)
            try:
                self._socket.send(body, zmq.NOBLOCK)
            except zmq.Again:  # the connection was refused meanwhile: a send would wait for ever
                self._reconnect(endpoint)
                continue
            deadline = time.monotonic() + timeout_s
            while not (answered := self._socket.poll(int(1000 * PIECE_S))):
                if self._went_away():
                    break
                if time.monotonic() > deadline:
                    self._disconnect()  # a socket that waits for an answer can do nothing else any more
                    raise WireError(f"{endpoint}: no answer within {timeout_s:g} s; wait longer with --server-timeout")
            # an answer after the connection was closed may be that of another policy
            if answered and not self._went_away():
                return self._socket.recv()
            self._reconnect(endpoint)
        raise WireError(f"{endpoint}: closes the connection instead of answering")

    def _connect(self, wait_s: float) -> None:
        """Connect within wait_s. A plain connection first: ZeroMQ itself does not say that nobody is there."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=5.0).close()
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    reason = error.strerror or type(error).__name__
                    raise WireError(f"nothing answers there ({reason}); start the server first") from error
            time.sleep(PIECE_S)
        self._socket = zmq.Context.instance().socket(zmq.REQ)  # a context of its own could wait for ever when collected
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_REPLY_BYTES), (zmq.RECONNECT_IVL, -1)):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._socket.setsockopt(zmq.IPV6, int(":" in self.host))
        self._socket.connect(f"tcp://{host}:{self.port}")

    def _went_away(self) -> bool:
        """Whether the connection was closed, or is none."""
        if self._socket is None:
            return True
        gone = False
        while self._monitor.poll(0):
            gone |= recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
        return gone

    def _disconnect(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._socket = None

    def _reconnect(self, endpoint: str) -> None:
        """Connect again to the same policy."""
        if self._checking:
            raise WireError(f"{endpoint}: closes the connection instead of answering")
        if self._socket is not None:
            self._disconnect()
        try:
            self._connect(self.timeout_s)
        except WireError as error:
            raise WireError(f"{endpoint}: the server has gone away; {error}") from error
        if self.dialect:  # it has been met before
            self._warm, self._checking = False, True  # it may be loading
            try:
                self._check_identity()
            finally:
                self._checking = False


def check_action(action: Mapping[str, Any], key: str, batch: int, steps: int, width: int) -> np.ndarray:
    """The first `steps` of the action `key`, (batch, steps, width) float64. Raises WireError if it is not that."""
    if key not in action:
        raise WireError(f"get_action: the answer lacks {key}, it has {', '.join(map(str, action)) or 'nothing'}")
    array = action[key]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise WireError(f"get_action: {key} is no array of numbers")
    if array.ndim != 3 or array.shape[0] != batch or array.shape[1] < steps or array.shape[2] != width:
        wanted = f"({batch}, {steps} or more, {width})"
        raise WireError(f"get_action: {key} has shape {array.shape} instead of {wanted}")
    array = array[:, :steps].astype(np.float64)
    if not math.isfinite(array.sum()):
        raise WireError(f"get_action: {key} has numbers that are not finite")
    return array
