"""Upload a dataset or a policy to the Hugging Face Hub, for --push-to-hub; and again after an upload that failed:

    python -m so101.hub --path demos --repo NAME/demos
    python -m so101.hub --path policy.onnx --repo NAME/policy

Log in first, with `hf auth login` or the variable HF_TOKEN. A new repository is private. One commit has all files, so a
repository is either complete or as it was. A repository with other content is refused.
"""

import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from so101 import __version__
from so101.cli import command_of, parse, run_script
from so101.dataset import read_info
from so101.extras import import_extra
from so101.files import is_file
from so101_env import ACTION, STATE
from so101_sim.errors import SO101Error

CARD = "README.md"
OWN_FILES = {".gitattributes"}  # what the hub puts into a new repository


@dataclasses.dataclass
class HubArgs:
    """An upload."""

    path: str
    """directory of a dataset or of a policy, or ONNX file"""
    repo: str
    """repository on the hub, as NAME/REPOSITORY"""


@dataclasses.dataclass
class Hub:
    """A repository that can be written to, as `connect` found."""

    api: Any  # huggingface_hub.HfApi
    flag: str
    repo: str
    kind: str  # "dataset" or "model"

    def _call(self, name: str, **arguments: Any) -> Any:
        """Call a method of the API for this repository. Raises SO101Error if that fails."""
        from huggingface_hub.errors import HfHubHTTPError

        errors = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)  # its HTTP library's, also connections
        try:
            return getattr(self.api, name)(**arguments)
        except errors as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            ways = {
                401: "the hub does not accept the token; log in with `hf auth login`",
                403: "the token may not write there; name your own repository, or make a token that can write",
                404: "the hub does not have it, or the token may not see it; check the name",
                409: "the hub has something else of this name, or is busy; name another one, or try later",
            }
            lines = str(error).strip().splitlines() or [type(error).__name__]
            way = ways.get(status) or f"{lines[0]:.200}; check the network and try later"
            raise SO101Error(f"{self.flag} {self.repo}: {way}" + (f" (HTTP {status})" if status else "")) from error

    def check_content(self, files: set[str] | None = None) -> None:
        """Raise SO101Error if the repository has content that an upload would replace.

        Args:
            files: names of the files to upload; a dataset's repository with these and no version tag is one that an
                upload did not complete.
        """
        if not self._call("repo_exists", repo_id=self.repo, repo_type=self.kind):
            return
        content = {*self._call("list_repo_files", repo_id=self.repo, repo_type=self.kind)} - OWN_FILES
        if content and self.kind == "dataset" and files is not None and content <= files:
            if not self._call("list_repo_refs", repo_id=self.repo, repo_type=self.kind).tags:
                return
        if content:
            raise SO101Error(f"{self.flag} {self.repo}: has files already; name another repository, or delete this one")

    def push(self, path: str | Path) -> str:
        """Create the repository if needed, and upload path to it; returns its address.

        Args:
            path: a directory, of which hidden files are left out, or a file.

        Raises:
            SO101Error: the upload failed. path is unchanged, and the message has the command that uploads it again.
        """
        from huggingface_hub import CommitOperationAdd

        path = Path(path)
        files: dict[str, Any] = {**files_of(path)}
        files.setdefault(CARD, card(path, self.repo).encode())
        try:
            self.check_content({*files})
            self._call("create_repo", repo_id=self.repo, repo_type=self.kind, private=True, exist_ok=True)
            operations = [CommitOperationAdd(name, each) for name, each in files.items()]
            self._call(
                "create_commit", repo_id=self.repo, repo_type=self.kind, operations=operations,
                commit_message=f"{path.name}, by ppo-residual-so101 {__version__}",
            )  # fmt: skip
            if self.kind == "dataset":  # LeRobot's loader looks for the tag of the format
                version = read_info(path, (STATE, ACTION))["codebase_version"]
                self._call("create_tag", repo_id=self.repo, repo_type="dataset", tag=version, exist_ok=True)
        except SO101Error as error:
            again = upload_command(path, self.repo)
            raise SO101Error(f"{error}; {path} is complete here, upload it again: {again}") from error
        address = f"{self.api.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"
        print(f"uploaded {path}: {address}")
        return address


def upload_command(path: str | Path, repo: str) -> str:
    """The command that uploads what is at path, for messages."""
    return f"{command_of('so101.hub')} --path {shlex.quote(str(path))} --repo {repo}"


def files_of(path: Path) -> dict[str, Path]:
    """The files to upload by their names on the hub: path itself or, without hidden ones, what is in that directory.

    Raises SO101Error for a symbolic link that leads out of the directory: what it names may be private.
    """
    if path.is_file():
        return {path.name: path}
    found = {each.relative_to(path).as_posix(): each for each in sorted(path.rglob("*")) if each.is_file()}
    for each in found.values():
        if not each.resolve().is_relative_to(path.resolve()):
            raise SO101Error(f"{each}: is a link to a file outside of {path}; copy the file, or remove the link")
    return {name: each for name, each in found.items() if not any(part[0] == "." for part in name.split("/"))}


def connect(flag: str, repo: str, kind: str, files: set[str] | None = None) -> Hub:
    """Find out, before any work is done, whether an upload can work; creates nothing.

    Args:
        flag: the flag that names the repository, for messages.
        repo: NAME/REPOSITORY, with the name of a user or an organisation.
        kind: "dataset" or "model".
        files: names of the files to upload, if they are known; see `Hub.check_content`.

    Raises:
        SO101Error: huggingface_hub is missing; the name cannot be one; there is no token, or not one that can write
            there; the hub cannot be reached; the repository has content.
    """
    hub = import_extra("huggingface_hub", "hub", flag)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        text = "is not the name of a repository; give NAME/REPOSITORY, of letters, digits and -_."
        raise SO101Error(f"{flag} {repo!r}: {text}") from error
    if not hub.get_token():
        raise SO101Error(f"{flag} {repo}: needs a token; log in with `hf auth login`, or set HF_TOKEN")
    found = Hub(hub.HfApi(), flag, repo, kind)
    user = found._call("whoami")
    names = {user["name"], *(each["name"] for each in user.get("orgs", []))}
    if repo.split("/")[0] not in names:
        raise SO101Error(f"{flag} {repo}: the token is for {', '.join(sorted(names))}; begin with one of these names")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise SO101Error(f"{flag} {repo}: the token can only read; make one that can write")
    found.check_content(files)
    return found


def kind_of(path: Path) -> str:
    """Kind of repository for what is at path: "dataset" or "model"."""
    return "dataset" if (path / "meta" / "info.json").is_file() else "model"


def card(path: Path, repo: str) -> str:
    """The card (README.md with metadata) of a dataset's directory, or of a policy without one."""
    if kind_of(path) == "dataset":
        info = read_info(path, (STATE, ACTION))
        head = (
            "license: apache-2.0\ntask_categories:\n- robotics\ntags:\n- LeRobot\n- so101\n"
            "configs:\n- config_name: default\n  data_files: data/*/*.parquet\n"
        )
        features = ", ".join(f"`{name}`" for name in info["features"] if re.fullmatch(r"[\w.]+", name, re.ASCII))
        own = "unit" in info["features"][ACTION]  # only so101.record writes the unit
        where = 'It was recorded in simulation, at the task "paper in square".\n' if own else ""
        body = (
            f"A LeRobotDataset {info['codebase_version']} with {info['total_episodes']} episodes at {info['fps']} fps, "
            f"robot `{info['robot_type']}`.\n{where}Features: {features}.\n\n"
            f"```python\nfrom lerobot.datasets.lerobot_dataset import LeRobotDataset\n\n"
            f'dataset = LeRobotDataset("{repo}")\n```\n'
        )
    else:
        head = "license: mit\nlibrary_name: onnx\npipeline_tag: robotics\ntags:\n- robotics\n- so101\n"
        body = (
            'A residual policy for the SO-101 arm at the task "paper in square". It was trained in simulation. The '
            "metadata of the\nONNX file contain its interface, its task and its base policy.\n\n"
            f"```bash\nhf download {repo} {path.name} --local-dir .\n"
            f"python -m so101.drive --model {path.name}   # on a simulated arm\n```\n"
        )
    made = f"\nMade with ppo-residual-so101 {__version__} (`pip install ppo-residual-so101`).\n"
    return f"---\n{head}---\n\n# {repo.split('/')[-1]}\n\n{body}{made}"


def main() -> int:
    """Upload; returns the exit code."""
    args = parse(HubArgs, __doc__)
    path = Path(args.path)
    if not (path.is_dir() or (is_file(path) and path.suffix == ".onnx")):
        raise SO101Error(f"--path {args.path}: is neither a directory nor an ONNX file; name one")
    if path.is_dir() and kind_of(path) == "model" and not (path / "config.json").is_file():
        raise SO101Error(f"--path {args.path}: has neither meta/info.json of a dataset nor config.json of a policy")
    hub = connect("--repo", args.repo, kind_of(path), {*files_of(path), CARD})
    hub.push(os.path.normpath(path))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
