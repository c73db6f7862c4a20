"""Atomic writes and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from so101_sim.errors import SO101Error

DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EISDIR,
    errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ESTALE,
}  # fmt: skip


class DiskError(SO101Error):
    """A file cannot be written."""


SHOWN = 40  # characters of a name that its temporary file begins with: the whole name may be the longest possible


def disk_error(path: str | bytes | Path, error: OSError) -> DiskError:
    """The error message for a file that cannot be written."""
    reason = error.strerror or str(error).splitlines()[0]  # FFmpeg's own message has many lines
    full = "free the disk, or " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None) else ""
    return DiskError(f"{os.fsdecode(path)}: cannot be written ({reason}); {full}name another place")


def is_file(path: str | Path) -> bool:
    """Whether there is a file to read: not a directory, pipe or device, nor a name that no file can have."""
    return "\0" not in str(path) and Path(path).is_file()


def check_file(path: str | Path, flag: str = "") -> None:
    """Raise SO101Error, naming the flag if there is one, unless there is a file to read."""
    if is_file(path):
        return
    reason = "no such file"
    if "\0" not in str(path) and Path(path).exists():
        reason = "is a directory; name a file in it" if Path(path).is_dir() else "is not a file"
    raise SO101Error(f"{flag} {path}: {reason}".lstrip())


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new file beside path, flush it, and rename it: path is either complete or unchanged.

    Raises DiskError if it is full or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    if os.path.lexists(path) and not path.is_file():
        raise DiskError(f"{path}: exists and is not a file; name another place")
    try:
        descriptor, name = tempfile.mkstemp(path.suffix, f"{path.stem[:SHOWN]}.tmp", path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


CHECKSUM_BYTES = 64  # SHA-256 in hexadecimal digits


def checksum(content: bytes) -> bytes:
    """The checksum that ends a policy file: of everything before it."""
    return hashlib.sha256(content).hexdigest().encode()


def has_checksum(content: bytes) -> bool:
    """Whether a file's content ends in the checksum of everything before it."""
    return checksum(content[:-CHECKSUM_BYTES]) == content[-CHECKSUM_BYTES:]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Save as indented JSON."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; target is either complete or unchanged."""
    write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))
