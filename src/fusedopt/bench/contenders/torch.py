"""Contenders on torch tensors: torch.optim's variants, bitsandbytes."""

from __future__ import annotations

from typing import Any

from fusedopt._check import Array
from fusedopt.bench.cases import CLASSES, Problem
from fusedopt.bench.contenders._base import Contender, nbytes


def settle(dtype: str) -> None:
    """Make MKL choose its square root in one thread: a first call in several may be wrong."""
    import torch

    torch.ones(1, dtype=getattr(torch, dtype)).sqrt()


class OnTensors(Contender):
    """Parameters as torch keeps them; `optimizer` is any object with torch's interface."""

    optimizer: Any

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        import torch

        torch.set_num_threads(problem.threads)
        settle(problem.dtype)
        self.problem = problem
        self.tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]

    def load(self, grads: list[Array]) -> None:
        import torch

        for p, g in zip(self.tensors, grads, strict=True):
            if p.grad is None:
                p.grad = torch.tensor(g)
            else:
                p.grad.copy_(torch.from_numpy(g))

    def step(self) -> object:
        return self.optimizer.step()

    def params(self) -> list[Array]:
        return [p.detach().numpy() for p in self.tensors]

    def state_bytes(self) -> int:
        import torch

        states = (leaf.values() for leaf in self.optimizer.state.values())
        return nbytes(x for leaf in states for x in leaf if torch.is_tensor(x))


class FusedoptTorch(OnTensors):
    """`fusedopt.torch.Adam` and the like."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        import fusedopt.torch

        fusedopt.set_num_threads(problem.threads)
        self.optimizer = getattr(fusedopt.torch, CLASSES[problem.optimizer])(
            self.tensors, **problem.options
        )
        if self.optimizer._rule.average is not None:
            self.optimizer.train()


class Torch(OnTensors):
    """`torch.optim.Adam` and the like in one implementation; with `compiled`, torch's choice."""

    def __init__(
        self, problem: Problem, params: list[Array], compiled: bool = False, **implementation: bool
    ) -> None:
        super().__init__(problem, params)
        import torch

        cls = getattr(torch.optim, CLASSES[problem.optimizer])
        self.optimizer = cls(self.tensors, **problem.options, **implementation)
        if compiled:
            self.step = torch.compile(self.optimizer.step)  # type: ignore[method-assign]


class BitsAndBytes(OnTensors):
    """bitsandbytes' optimizers with 8-bit state; leaves below 4,096 elements keep float32."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        super().__init__(problem, params)
        import bitsandbytes

        cls = getattr(bitsandbytes.optim, CLASSES[problem.optimizer] + "8bit")
        self.optimizer = cls(self.tensors, **problem.options)

    def moved(self) -> int:
        return 3 * nbytes(self.tensors) + 2 * self.state_bytes()

    def state_bytes(self) -> int:
        # without the code table, which all leaves share
        import torch

        states = (leaf.items() for leaf in self.optimizer.state.values())
        return nbytes(
            x for leaf in states for name, x in leaf if torch.is_tensor(x) and "qmap" not in name
        )
