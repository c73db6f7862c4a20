"""A policy server of our own for each dialect of the wire, and each way of failing. It shares no code with the client.

The formats are those of NVIDIA/Isaac-GR00T: gr00t/eval/service.py in release N1.5, gr00t/policy/server_client.py later.
"""

import io
import json
import threading
import time
from typing import Any

import msgpack
import numpy as np
import zmq

HORIZON = 16


def encode(message: Any, dialect: str) -> bytes:
    """A reply's bytes."""

    def default(array: np.ndarray) -> dict:
        if dialect == "main":
            head = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape)}
            return {**head, b"data": array.tobytes()}
        file = io.BytesIO()
        np.lib.format.write_array(file, array, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    return msgpack.packb(message, default=default)


def decode(body: bytes, dialect: str) -> Any:
    """A request; an array in the form of another dialect stays a map, as with NVIDIA's decoders."""

    def hook(value: dict) -> Any:
        if dialect == "main" and (value.get(b"nd") is True or value.get("nd") is True):
            kind, shape, data = (value.get(key, value.get(key.decode())) for key in (b"type", b"shape", b"data"))
            return np.frombuffer(data, kind).reshape(shape)
        if dialect != "main" and "__ndarray_class__" in value:
            return np.lib.format.read_array(io.BytesIO(value["as_npy"]), allow_pickle=False)
        return value

    return msgpack.unpackb(body, object_hook=hook)


class FakeServer:
    """Answers in a thread until it is closed.

    Args:
        dialect: n1.5, n1.6 or main.
        port: 0 takes a free one.
        cameras: that its policy sees.
        deltas: steps of the observation that it sees, and `horizon` steps that it predicts.
        gain: its policy adds this share of each picture's mean brightness to the state: its weights.
        fault: what goes wrong with every get_action from the number `after` on: see `_broken`.
        noise: whether answers to the same question differ, as GR00T's do.
        weights: a hash that ping tells, as serve_lerobot.py does.
    """

    def __init__(
        self, dialect: str = "n1.6", port: int = 0, cameras: tuple[str, ...] = ("top", "wrist"),
        deltas: tuple[int, ...] = (0,), horizon: int = HORIZON, gain: float = 0.01, fault: str = "", after: int = 0,
        noise: bool = False, weights: str = "", token: str = "", config: Any = ...,
    ):  # fmt: skip
        self.dialect, self.cameras, self.deltas, self.horizon, self.gain = dialect, cameras, deltas, horizon, gain
        self.fault, self.after, self.noise, self.weights, self.token = fault, after, noise, weights, token
        self.config = self._config() if config is ... else config
        self.endpoints: list[str] = []  # of all requests
        self.questions: list[dict[str, Any]] = []  # what each get_action saw, by plain names
        self.failed = False  # whether something went wrong in this thread
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 200)
        for _ in range(50):  # of a server that was just closed
            try:
                self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
                break
            except zmq.ZMQError:
                time.sleep(0.1)
        self.port = int(self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rpartition(":")[2])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def spec(self) -> str:
        return f"server:127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _config(self) -> dict[str, Any]:
        prefix = (lambda kind: f"{kind}.") if self.dialect == "n1.5" else (lambda kind: "")
        kinds = {
            "video": (list(self.cameras), list(self.deltas)), "state": (["single_arm", "gripper"], list(self.deltas)),
            "action": (["single_arm", "gripper"], list(range(self.horizon))),
        }  # fmt: skip
        config = {}
        for kind, (keys, deltas) in kinds.items():
            config[kind] = {"delta_indices": deltas, "modality_keys": [prefix(kind) + key for key in keys]}
        config["language"] = {"delta_indices": [0], "modality_keys": ["annotation.human.task_description"]}
        if self.dialect == "n1.5":
            return {k: {"__ModalityConfig_class__": True, "as_json": json.dumps(c)} for k, c in config.items()}
        marker = "__ModalityConfig__" if self.dialect == "main" else "__ModalityConfig_class__"
        return {kind: {marker: True, "as_json": each} for kind, each in config.items()}

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(20):
                body = self._reply(self._socket.recv())
                if body is None:
                    break
                self._socket.send(body)
        self._socket.close()
        self._context.term()

    def _reply(self, body: bytes) -> bytes | None:
        """The reply's bytes; None dies instead."""
        request = decode(body, self.dialect)
        endpoint = request.get("endpoint", "get_action")
        self.endpoints.append(endpoint)
        if self.token and request.get("api_token") != self.token:
            return encode({"error": "Unauthorized: Invalid API token"}, self.dialect)
        if endpoint == "ping":
            if self.fault == "pickle":
                return b"PK\x03\x04" + bytes(40)
            pong = {"status": "ok", "message": "Server is running"}
            return encode(pong | ({"weights": self.weights} if self.weights else {}), self.dialect)
        if endpoint == "get_modality_config":
            return encode(self.config, self.dialect)
        if endpoint != "get_action":
            return encode({"error": f"Unknown endpoint: {endpoint}"}, self.dialect)
        if self.fault and len(self.questions) >= self.after:
            self.questions.append({})
            return self._broken()
        try:
            return encode(self._act(request["data"]), self.dialect)
        except Exception as error:
            self.failed = True
            return encode({"error": repr(error)}, self.dialect)

    def _act(self, data: dict[str, Any]) -> Any:
        """The policy: hold the state, and rise with the brightness of the pictures. Strict, as NVIDIA's is."""
        if self.dialect == "n1.5":
            video = {key: data[f"video.{key}"] for key in self.cameras}
            state = {key: data[f"state.{key}"] for key in ("single_arm", "gripper")}
            kind = np.float64
        else:
            video, state = data["observation"]["video"], data["observation"]["state"]
            kind = np.float32
        text = (data if self.dialect == "n1.5" else data["observation"]["language"])[
            "annotation.human.task_description"
        ]
        n, steps = state["single_arm"].shape[:2]
        assert set(video) == set(self.cameras) and set(state) == {"single_arm", "gripper"}
        assert (
            isinstance(text, list) and len(text) == n and all(isinstance(row, list) and len(row) == 1 for row in text)
        )
        assert steps == len(self.deltas) and all(array.dtype == kind for array in state.values())
        for frames in video.values():
            assert frames.dtype == np.uint8 and frames.ndim == 5 and frames.shape[:2] == (n, steps)
        self.questions.append({"video": video, "state": state, "text": text})
        rise = sum(self.gain * frames[:, -1].mean((1, 2, 3)) for frames in video.values())[:, None, None]
        rise = rise + np.random.default_rng().normal() * self.noise
        # degrees; the later in the chunk, the farther
        later = 0.1 * np.arange(self.horizon)[:, None]
        action = {key: (array[:, -1:] + rise + later).astype(np.float32) for key, array in state.items()}
        return {f"action.{key}": action[key] for key in action} if self.dialect == "n1.5" else [action, {}]

    def _broken(self) -> bytes | None:
        arm, gripper = np.zeros((1, HORIZON, 5), np.float32), np.zeros((1, HORIZON, 1), np.float32)
        answers = {
            "error": {"error": "'video'"},
            "empty error": {"error": ""},
            "no pair": {"single_arm": arm, "gripper": gripper},
            "no gripper": [{"single_arm": arm}, {}],
            "shape": [{"single_arm": arm[:, :, :4], "gripper": gripper}, {}],
            "short": [{"single_arm": arm[:, :3], "gripper": gripper[:, :3]}, {}],
            "nan": [{"single_arm": arm * np.nan, "gripper": gripper}, {}],
            "text": [{"single_arm": "left", "gripper": gripper}, {}],
            "units": [{"single_arm": arm + 4000.0, "gripper": gripper}, {}],
        }
        if self.fault in answers:
            return encode(answers[self.fault], self.dialect)
        if self.fault == "slow":
            self._stop.wait(5.0)
            return encode({}, self.dialect)
        if self.fault == "array bomb":
            return msgpack.packb({b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2**40], b"data": b"1234"})
        if self.fault == "pickled array":
            file = io.BytesIO()
            np.save(file, np.array([{}], object), allow_pickle=True)
            return msgpack.packb([{"single_arm": {"__ndarray_class__": True, "as_npy": file.getvalue()}}, {}])
        assert self.fault in ("garbage", "dies")
        return b"\xc1garbage" if self.fault == "garbage" else None
