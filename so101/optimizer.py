"""Adam without PyTorch's compiler, whose import takes as long as 5,000 steps of training."""

from __future__ import annotations

from inspect import unwrap

import torch


class Adam(torch.optim.Adam):
    """torch.optim.Adam, in everything it does and computes.

    Several methods of PyTorch's optimisers are wrapped so that torch.compile leaves them out, and the wrappers import
    the whole compiler when they are first called: 1.5 s and 70 MB. Nothing here is compiled.
    """

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    zero_grad = unwrap(torch.optim.Adam.zero_grad)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    load_state_dict = unwrap(torch.optim.Adam.load_state_dict)
