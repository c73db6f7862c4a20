"""The residual of an arm that practises: it explores, or repeats a demonstration, and keeps what the learner needs."""

from __future__ import annotations

import numpy as np
import torch

from so101.base import BaseObservation, BasePolicy, StackedPolicy, extend_observation, flat_observation
from so101.sac import Agent
from so101_env import Task
from so101_sim.control import ACT_DIM


class PractisingPolicy(StackedPolicy):
    """A residual that explores, on the base policy of an arm; it keeps the episode's observations and residuals.

    Args:
        base: the policy that it corrects; None: there is none.
        task: with scale and observation of the residual.
        agent: gives the residual.
        observe_base: whether the residual observes the base policy's action.
        seed: seed of the exploration.
    """

    def __init__(self, base: BasePolicy | None, task: Task, agent: Agent, observe_base: bool, seed: int):
        super().__init__(base)
        self.task, self.agent, self.observe_base = task, agent, observe_base
        self.fingerprint = "" if base is None else base.fingerprint
        self.scale_rad = task.alpha * task.act_scale
        self.generator = torch.Generator().manual_seed(seed)
        self.exploring = False  # otherwise the base acts alone
        self.demonstrated_rad: np.ndarray | None = None  # joint deltas (6,) of a demonstration, in its next step
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []  # observation and residual of each step

    def reset(self, mask: np.ndarray) -> None:
        """Forget the last episode."""
        super().reset(mask)
        self.rows = []

    def residual_rad(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See StackedPolicy, (1, 6)."""
        seen_base = base_delta if self.observe_base else None
        flat = extend_observation(flat_observation(obs), obs, self.task.observe_load, seen_base)
        residual = np.zeros((len(mask), ACT_DIM), np.float32)
        if self.demonstrated_rad is not None:
            residual = ((self.demonstrated_rad - base_delta) / self.scale_rad).astype(np.float32)
        elif self.exploring:
            residual = self.agent.explore(flat, torch.randn(len(mask), ACT_DIM, generator=self.generator))
        self.rows.append((flat[0].astype(np.float32), residual[0]))
        return self.scale_rad * residual.astype(np.float64)

    def steps(self, moves: int, complete: bool) -> tuple[np.ndarray, np.ndarray]:
        """Observations (T + 1, D) and residuals (T, 6) of the episode.

        Args:
            moves: control steps that the arm has made.
            complete: whether the arm was seen after the last of them; otherwise that step is left out.
        """
        rows = self.rows[len(self.rows) - moves - complete :]  # what was seen before, from aside, does not belong to it
        if moves + complete == 0:
            return np.zeros((1, 0), np.float32), np.zeros((0, ACT_DIM), np.float32)
        return np.stack([obs for obs, _ in rows]), np.array([a for _, a in rows[:-1]]).reshape(-1, ACT_DIM)
