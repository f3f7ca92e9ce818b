"""Two optimizers that step one model, for a rule that steps only matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fusedopt import StepResult, StepStats
from fusedopt.cli.model import Params
from fusedopt.optimizer import Optimizer


class Pair:
    """Two optimizers as one: of the matrices of a model, and of all else.

    Parameters
    ----------
    params : dict of dict of array
    matrices, rest : callable(params) -> Optimizer
    """

    def __init__(
        self,
        params: Params,
        matrices: Callable[[Params], Optimizer],
        rest: Callable[[Params], Optimizer],
    ) -> None:
        """Make both, each on its part."""
        first, second = _parts(params)
        self._opts = (matrices(first), rest(second))
        self.rule = self._opts[0].rule

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [group for opt in self._opts for group in opt.param_groups]

    def step(self, grads: Params, *, stats: bool = False) -> StepResult:
        """Take a step of each."""
        parts = zip(self._opts, _parts(grads), strict=True)
        first, second = (opt.step(part, stats=stats) for opt, part in parts)
        if first.stats is None or second.stats is None:
            return first
        both = copy.copy(first.stats)
        both.names += second.stats.names
        for column in StepStats.COLUMNS:
            columns = [getattr(result.stats, column) for result in (first, second)]
            setattr(both, column, np.concatenate(columns))
        return first._replace(updated=len(both), stats=both)

    def _rehearsal(self) -> tuple[list[tuple[Any, ...]], Callable[[], None]]:
        """Return what undoes steps of both, and what to call before the first."""
        (undo, begin), (more, begin_rest) = (opt._rehearsal() for opt in self._opts)

        def begin_both() -> None:
            begin()
            begin_rest()

        return undo + more, begin_both

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both in the form of one's."""
        first, second = (opt.state_dict() for opt in self._opts)
        return first | {
            "state": first["state"] | second["state"],
            "param_groups": first["param_groups"] + second["param_groups"],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for i, opt in enumerate(self._opts):
            own = {name: state_dict["state"][name] for name in opt.state}
            part = {"step": state_dict["step"], "state": own}
            opt.load_state_dict(part | {"param_groups": state_dict["param_groups"][i : i + 1]})


def _parts(tree: Params) -> tuple[Params, Params]:
    """Return the matrices of a nesting, and all else."""
    matrices, rest = (
        {
            name: {key: array for key, array in layer.items() if (array.ndim == 2) is wanted}
            for name, layer in tree.items()
        }
        for wanted in (True, False)
    )
    return matrices, rest
