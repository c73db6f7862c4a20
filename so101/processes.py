"""Processes of the project's own: Ctrl+C leaves them alone, and they do not import the main program again."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import types
from collections.abc import Callable, Collection
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any


def spawn(
    target: Callable[..., None], *args: Any, blocked: Collection[int] = (signal.SIGINT,)
) -> tuple[multiprocessing.process.BaseProcess, Connection]:  # fmt: skip
    """Start `target(pipe, *args)` in a new process; it ends when the other end of its pipe is closed.

    Args:
        target: a function of a module.
        args: its further arguments.
        blocked: signals that do not interrupt the new process.

    Returns:
        The process and this end of the pipe.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    # The new process inherits the signal mask, so Ctrl+C interrupts only this process. Its end closes the pipe, and
    # that ends the new process, without a traceback.
    resource_tracker.ensure_running()  # first, because starting it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    # The new process would import the main program again. For LeRobot's commands that takes half a minute.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    except BaseException:
        pipe.close()
        raise
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return process, pipe
