"""What torchrun tells the processes that it starts, read without torch. so101.distributed then joins them."""

from __future__ import annotations

import os

from so101_sim.errors import SO101Error


class RankError(SO101Error):
    """An error that only this rank has, and so reports itself; errors of all ranks are reported by rank 0."""


def torchrun_numbers() -> dict[str, int]:
    """The numbers in the variables that torchrun sets; empty without torchrun.

    Raises SO101Error for variables that are not torchrun's, but for example left over in the shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # as torch.distributed.is_torchelastic_launched does
        return {}
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")}
    numbers = {name: int(text) for name, text in given.items() if text.isascii() and text.isdecimal()}
    fits = len(numbers) == len(given) and numbers["RANK"] < numbers["WORLD_SIZE"] and os.environ.get("MASTER_ADDR")
    if not fits or not numbers["LOCAL_WORLD_SIZE"] or not 1 <= numbers["MASTER_PORT"] <= 65535:
        text = " ".join(f"{name}={value!r}" for name, value in given.items())
        raise SO101Error(f"{text}: cannot be torchrun's; unset TORCHELASTIC_RUN_ID, or start it with torchrun")
    return numbers


def is_launched() -> bool:
    """Whether torchrun has started this process as one of several; not if its variables make no sense."""
    try:
        return torchrun_numbers().get("WORLD_SIZE", 1) > 1
    except SO101Error:  # so101.distributed.World raises it, and this process reports it
        return False


def is_main() -> bool:
    """Whether this is rank 0, which evaluates, logs and saves."""
    return not is_launched() or torchrun_numbers()["RANK"] == 0
