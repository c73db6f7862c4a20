"""Data-parallel training with torch.distributed (gloo): ranks, all-reduce, gather."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from so101.torchrun import is_launched, torchrun_numbers
from so101_sim.errors import SO101Error


class World:
    """The ranks that train one policy; without torchrun, this process alone.

    Every rank must call the methods in the same order. If a rank is lost, they raise SO101Error in the others.
    Also raises SO101Error if the variables that torchrun sets make no sense.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.num_threads = 0, 1, None
        numbers = torchrun_numbers()
        if is_launched():
            self.rank, self.size = numbers["RANK"], numbers["WORLD_SIZE"]
            # physics threads: the ranks of a machine share its cores
            self.num_threads = max(1, (os.cpu_count() or 1) // numbers["LOCAL_WORLD_SIZE"])
            self._call(dist.init_process_group, "gloo")
            atexit.register(dist.destroy_process_group)  # its threads can abort the process if they outlive Python
        elif os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1"):
            print("WORLD_SIZE is ignored: this process trains alone; torchrun starts several", flush=True)
        self.is_main = self.rank == 0

    def share(self, total: int, name: str) -> int:
        """This rank's share of a total over all ranks. Raises SO101Error if it is not divisible."""
        if total % self.size:
            raise SO101Error(f"{name} {total}: must be divisible by the number of ranks, {self.size}")
        return total // self.size

    def own(self, items: list[Any]) -> Any:
        """This rank's item of a list with one item per rank. Raises SO101Error for another number of ranks."""
        if len(items) != self.size:
            raise SO101Error(f"it was written by {len(items)} ranks, and {self.size} resume it")
        return items[self.rank]

    def seed(self, seed: int) -> torch.Generator:
        """Seed torch, make it deterministic, and return this rank's own random generator."""
        torch.set_num_threads(1)  # these networks are too small for more, and one thread adds up in one order
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms also imports PyTorch's compiler
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs 3 % of an update
        torch.manual_seed(seed)  # the same weights on all ranks
        return torch.Generator().manual_seed(seed + self.rank)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace the gradients by their mean over all ranks, in one all-reduce; frozen parameters have none."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._call(dist.all_reduce, flat)
        for gradient, mean in zip(gradients, (flat / self.size).split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank, on all ranks."""
        values = [value] * self.size
        if self.size > 1:
            self._call(dist.all_gather_object, values, value)
        return values

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except RuntimeError as error:  # from gloo, or from the store in which ranks find each other
            if self.rank:
                raise SystemExit(2) from error  # rank 0 reports it
            raise SO101Error("a rank of this run was lost; resume from the newest checkpoint") from error
