"""Adam without PyTorch's compiler: the same numbers, and no import of it."""

import subprocess
import sys

import torch
from conftest import ROOT, SMALL
from torch import nn

from so101.optimizer import Adam


def trained(kind: type[torch.optim.Adam], **settings: object) -> tuple[nn.Module, dict]:
    """A network after steps with two groups of parameters, and the optimiser's state loaded on the way."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    groups = [{"params": net[0].parameters(), "weight_decay": 0.1}, {"params": net[2].parameters(), "lr": 0.1}]
    optimizer = kind(groups, lr=0.01, eps=1e-5, **settings)
    for step in range(10):
        if step == 5:
            state = optimizer.state_dict()
            optimizer = kind(groups, lr=0.5, **settings)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        net(torch.randn(7, 5, generator=generator)).square().mean().backward()
        optimizer.step()
    return net, optimizer.state_dict()


def test_it_computes_what_torch_adam_computes():
    for settings in ({"fused": True}, {"amsgrad": True}):
        (net, state), (expected, expected_state) = trained(Adam, **settings), trained(torch.optim.Adam, **settings)
        for one, other in zip(net.parameters(), expected.parameters()):
            assert torch.equal(one, other)
        assert state["param_groups"] == expected_state["param_groups"]
        for key, values in expected_state["state"].items():
            assert all(torch.equal(state["state"][key][name], value) for name, value in values.items())


def test_a_run_does_not_import_the_compiler(tmp_path):
    """It would take 1.5 s; sympy is only imported by it."""
    words = ["ppo_residual_so101.py", "--log-dir", str(tmp_path), *SMALL.split()]
    code = (
        f"import runpy, sys; sys.argv = {words!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(*sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
