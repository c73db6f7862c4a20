"""Protocol of policy servers: ZeroMQ and msgpack as in NVIDIA's GR00T servers, in the dialects of three releases.

One request at a time: a msgpack map {"endpoint", "data", "api_token"} in one frame, answered by one frame. The dialects
differ in how arrays are encoded, in the arguments and the result of get_action, and in how the policy describes its
inputs and outputs:

    n1.5   release N1.5
    n1.6   releases N1.6, N1.6.1 and N1.7, and so101.serve
    main   since May 2026

Nothing is unpickled. so101.serve uses this file in LeRobot's environment, so it imports only so101.groot of the
project. Formats: gr00t/eval/service.py and gr00t/policy/server_client.py of NVIDIA/Isaac-GR00T.
"""

from __future__ import annotations

import hashlib
import io
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from so101.groot import KINDS, Modality, PolicyError, identity_of, make_request

MAX_MESSAGE_BYTES = 2**28
MAX_ERROR_LETTERS = 500  # longest part of a server's error message that is shown
MAX_STEPS = 10_000  # largest distance of a time step from now
FIRST_TIMEOUT_S = 60.0  # for the first answer and the first action, when the server may still be loading
POLL_S = 0.2  # while waiting for an answer, how often to check that the connection still exists


# ---------------------------------------------------------------------------------------------------------------------
# messages


def pack(message: Any, dialect: str) -> bytes:
    """Encode a message as bytes, with arrays in the form of the dialect."""

    def default(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray) or value.dtype.hasobject or value.dtype.names:
            raise TypeError(f"{type(value).__name__} cannot be sent")
        if dialect == "main":  # the format of the package msgpack-numpy
            head = {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": list(value.shape)}
            return head | {b"data": np.ascontiguousarray(value).tobytes()}
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    return msgpack.packb(message, default=default)


def unpack(body: bytes) -> Any:
    """Decode a message of any dialect, with its arrays and modality configs. Raises PolicyError for invalid bytes."""
    try:
        return msgpack.unpackb(body, object_hook=_decode)
    except Exception as error:  # msgpack and numpy raise many types of exceptions for invalid bytes
        raise PolicyError(f"the answer is not a message of a policy server ({type(error).__name__})") from error


def _decode(value: dict[Any, Any]) -> Any:
    """Decode one map of a message: an array, a modality config, or a plain map."""
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


class PolicyClient:
    """A connection to a policy server.

    If the server closes the connection, for example because it restarts, the client waits for it, checks that it serves
    the same policy, and repeats the request.

    Args:
        host, port: address of the server.
        timeout_s: how long to wait for an answer, and for a server that is restarting.
        api_token: sent with each request, in clear text.

    Raises:
        PolicyError: there is no server, it does not answer, or it uses none of the known dialects.
    """

    def __init__(self, host: str, port: int, timeout_s: float = 15.0, api_token: str | None = None):
        self.host, self.port, self.api_token = host, port, api_token
        self.timeout_s, self.first_timeout_s = timeout_s, max(FIRST_TIMEOUT_S, timeout_s)
        self._socket, self.dialect, self._checking = None, "", False
        self._warm = False  # whether the server has returned an action
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
        """The policy's actions by key, (B, horizon, D), in the server's unit; keys and shapes are not checked here.

        Args:
            video: pictures (B, T, H, W, 3) uint8 by camera.
            state: joint positions (B, T, D) by joint group, in the server's unit.
            text: instruction for the policy.

        Raises:
            PolicyError: the server does not answer, or reports an error.
        """
        data = make_request(self.modalities, video, state, text)
        if self.dialect != "n1.5":
            return self._actions(data)
        flat: dict[str, Any] = {f"video.{key}": frames for key, frames in video.items()}
        flat |= {f"state.{key}": array.astype(np.float64) for key, array in state.items()}
        return self._actions({**flat, **data["observation"]["language"]})

    def identify(self, probe: dict[str, Any]) -> str:
        """SHA-256 of everything known about the policy. It changes with the weights as far as they can be identified.

        Weights are identified by their hash if the server's answer to ping has one, as that of so101.serve does.
        Otherwise they are identified by the answer to one fixed request, if asking twice gives the same answer. GR00T's
        policies draw noise, so their weights remain unidentified.

        Args:
            probe: the arguments of get_action for that request.
        """
        self._probe = probe
        self._answer = self._ask_probe()
        if self._answer and self._ask_probe() != self._answer:
            self._answer = ""
        return identity_of(self.dialect, self._config, self._weights, self._answer)

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._disconnect()

    # -- identity of the server

    def _read_identity(self) -> None:
        """Find out the dialect, the modalities, and the hash of the weights if there is one.

        The two requests contain no arrays, which the dialects encode differently.
        """
        body = self._request("ping", None, self.timeout_s if self._warm else self.first_timeout_s)
        if body[:2] == b"PK":
            raise PolicyError(
                "answers with a pickle, as GR00T N1 does, which could run any code here; use N1.5 or later"
            )
        reply = self._reply("ping", body)
        weights = reply.get("weights", "") if isinstance(reply, dict) else None
        if not isinstance(weights, str):
            raise PolicyError("ping: the answer is not a map with a hash of the weights as text, or without one")
        body = self._request("get_modality_config", None)
        config = self._reply("get_modality_config", body)
        if not isinstance(config, dict) or not config:
            raise PolicyError("does not report the cameras, states and actions of its policy")
        if b"__ModalityConfig__" in body:
            dialect = "main"
        elif b"__ModalityConfig_class__" in body:
            first = next(iter(msgpack.unpackb(body).values()))
            dialect = "n1.5" if isinstance(first, dict) and isinstance(first.get("as_json"), str) else "n1.6"
        else:
            raise PolicyError("describes its policy in a format that is not one of GR00T N1.5, N1.6, N1.7 and main")
        self.modalities = {kind: _modality(config, kind, dialect) for kind in KINDS}
        try:
            self._config = json.dumps(config, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise PolicyError(f"its description of its policy cannot be used ({type(error).__name__})") from error
        self.dialect, self._weights = dialect, weights

    def _ask_probe(self) -> str:
        """Hash of the answer to the fixed request; empty if the server reports the hash of its weights instead."""
        if self._weights:
            return ""
        answer = self.get_action(**self._probe)
        return hashlib.sha256(b"".join(answer[key].tobytes() for key in sorted(answer))).hexdigest()

    def _check_identity(self) -> None:
        """Raise PolicyError if the server, after it closed the connection, serves another policy."""
        before = self.dialect, self._config, self._weights
        self._read_identity()
        same = before == (self.dialect, self._config, self._weights)
        if self._probe and self._answer:
            same = same and self._ask_probe() == self._answer
        if not same:
            raise PolicyError("was restarted with another policy; put the old one back")

    # -- requests

    def _actions(self, data: dict[str, Any]) -> dict[str, np.ndarray]:
        """Actions (B, horizon, D) by key, for the data of a get_action request."""
        timeout_s = self.timeout_s if self._warm else self.first_timeout_s
        reply = self._reply("get_action", self._request("get_action", data, timeout_s))
        if self.dialect != "n1.5":
            if not isinstance(reply, list) or len(reply) != 2:
                raise PolicyError(f"get_action: the answer is a {type(reply).__name__} instead of [action, info]")
            reply = reply[0]
        if not isinstance(reply, dict):
            raise PolicyError(f"get_action: the answer is a {type(reply).__name__} instead of a map")
        for key, array in reply.items():
            if not isinstance(key, str) or not key.isprintable():
                raise PolicyError(f"get_action: the answer has the key {key!r:.80}, which is not plain text")
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                raise PolicyError(f"get_action: {key!r:.80} is not an array of numbers")
        self._warm = True
        return {key.removeprefix("action.") if self.dialect == "n1.5" else key: reply[key] for key in reply}

    def _reply(self, endpoint: str, body: bytes) -> Any:
        """Decode an answer. Raises PolicyError, with the server's message, if the answer is an error."""
        try:
            reply = unpack(body)
        except PolicyError as error:
            raise PolicyError(f"{endpoint}: {error}") from error
        if isinstance(reply, dict) and "error" in reply:
            text = " ".join(str(reply["error"])[:MAX_ERROR_LETTERS].split())
            if "Unauthorized" in text:
                text += "; set its token in the environment variable SO101_API_TOKEN"
            raise PolicyError(
                f"{endpoint}: the server reports " + (repr(text) if text else "an error without a message")
            )
        return reply

    def _request(self, endpoint: str, data: Any, timeout_s: float | None = None) -> bytes:
        """Send one request; returns the bytes of its answer."""
        message = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        if self.api_token is not None:
            message["api_token"] = self.api_token
        body, timeout_s = pack(message, self.dialect), timeout_s or self.timeout_s
        for _ in range(2):
            if self._went_away():
                self._reconnect(endpoint)
            try:
                self._socket.send(body, zmq.NOBLOCK)
            except zmq.Again:  # the connection was refused in the meantime: a blocking send would never return
                self._reconnect(endpoint)
                continue
            deadline = time.monotonic() + timeout_s
            while not (answered := self._socket.poll(int(1000 * POLL_S))):
                if self._went_away():
                    break
                if time.monotonic() > deadline:
                    self._disconnect()  # a ZeroMQ socket that waits for an answer cannot be used for anything else
                    raise PolicyError(
                        f"{endpoint}: no answer within {timeout_s:g} s; wait longer with --server-timeout"
                    )
            # if the connection was closed in between, the answer may come from another policy
            if answered and not self._went_away():
                body, *more = self._socket.recv_multipart()
                if more:
                    raise PolicyError(f"{endpoint}: the answer has {1 + len(more)} parts instead of one")
                return body
            self._reconnect(endpoint)
        raise PolicyError(f"{endpoint}: closes the connection instead of answering")

    def _connect(self, wait_s: float) -> None:
        """Connect within wait_s. A plain socket goes first, because ZeroMQ does not report that there is no server."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=5.0).close()
                break
            except (OSError, UnicodeError) as error:  # UnicodeError: what cannot be the name of a machine
                if time.monotonic() >= deadline:
                    reason = getattr(error, "strerror", None) or type(error).__name__
                    raise PolicyError(f"nothing answers there ({reason}); start the server first") from error
            time.sleep(POLL_S)
        self._socket = zmq.Context.instance().socket(zmq.REQ)  # a separate context can hang when collected
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES), (zmq.RECONNECT_IVL, -1)):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._socket.setsockopt(zmq.IPV6, int(":" in self.host))
        self._socket.connect(f"tcp://{host}:{self.port}")

    def _went_away(self) -> bool:
        """Whether the server has closed the connection, or there is no connection."""
        if self._socket is None:
            return True
        gone = False
        while self._monitor.poll(0):
            gone |= recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
        return gone

    def _disconnect(self) -> None:
        """Close the socket and its monitor."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._socket = None

    def _reconnect(self, endpoint: str) -> None:
        """Connect again, and check that the policy is the same."""
        if self._checking:
            raise PolicyError(f"{endpoint}: closes the connection instead of answering")
        if self._socket is not None:
            self._disconnect()
        try:
            self._connect(self.timeout_s)
        except PolicyError as error:
            raise PolicyError(f"{endpoint}: the server has gone away; {error}") from error
        if self.dialect:  # not the first connection
            self._warm, self._checking = False, True  # the server may be loading
            try:
                self._check_identity()
            finally:
                self._checking = False


def _modality(config: Mapping[str, Any], kind: str, dialect: str) -> Modality:
    """The inputs or outputs of one kind in a server's description of its policy; none if it lacks the kind.

    Raises PolicyError unless the keys are texts, each once, and the deltas are ascending whole numbers.
    """
    if kind not in config:
        return Modality([], [0])
    entry = config[kind]
    if not isinstance(entry, dict) or not {"modality_keys", "delta_indices"} <= {*entry}:
        raise PolicyError(f"its description of {kind} is not a map with modality_keys and delta_indices")
    keys, deltas = entry["modality_keys"], entry["delta_indices"]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PolicyError(f"its description of {kind}: modality_keys is not a list of texts")
    if dialect == "n1.5" and kind != "language":
        keys = [key.removeprefix(f"{kind}.") for key in keys]
    if not all(key.isprintable() and key.strip() for key in keys) or len({*keys}) < len(keys):
        raise PolicyError(
            f"its description of {kind}: modality_keys has a key that is empty, unprintable or there twice"
        )
    if not isinstance(deltas, list) or not all(type(step) is int and abs(step) <= MAX_STEPS for step in deltas):
        raise PolicyError(f"its description of {kind}: delta_indices is not a list of whole numbers up to {MAX_STEPS}")
    if not deltas or deltas != sorted({*deltas}):
        raise PolicyError(f"its description of {kind}: delta_indices is empty or not in ascending order")
    return Modality(keys, deltas)
