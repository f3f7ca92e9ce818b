"""`python -m fusedopt bench` with contenders that few have installed, each in its own process.

    pip install deepspeed ninja tensorflow
    python bench/compare.py --quick

It has the options of that command. DeepSpeed compiles its optimizer when it is first used (C++).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fusedopt import cli
from fusedopt.bench.cases import Problem
from fusedopt.bench.contenders import ROWS, Contender, Row, keras_row
from fusedopt.bench.contenders.torch import OnTensors


class DeepSpeed(OnTensors):
    """DeepSpeedCPUAdam, in torch's Adam or AdamW form."""

    def __init__(self, problem: Problem, params: list[np.ndarray]) -> None:
        super().__init__(problem, params)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self.optimizer = DeepSpeedCPUAdam(
            self.tensors, **problem.options, adamw_mode=problem.optimizer == "adamw"
        )


class TensorFlow(Contender):
    """The operations behind TensorFlow's optimizers, for all variables in one tf.function.

    ResourceApplyAdam adds epsilon to a root without bias correction, so epsilon is adapted.
    """

    def __init__(self, problem: Problem, params: list[np.ndarray]) -> None:
        import tensorflow as tf

        self.tf, self.problem, self.count = tf, problem, 0
        self.variables = [tf.Variable(p) for p in params]
        self.grads = [tf.Variable(p, trainable=False) for p in params]
        self.states = [
            [tf.Variable(tf.zeros_like(p), trainable=False) for p in params]
            for _ in range(1 if problem.optimizer == "sgd" else 2)
        ]
        self.call = tf.function({"adam": self.adam, "sgd": self.sgd}[problem.optimizer])

    def load(self, grads: list[np.ndarray]) -> None:
        for held, g in zip(self.grads, grads, strict=True):
            held.assign(g)

    def leaves(self) -> Any:
        return zip(self.variables, self.grads, *self.states, strict=True)

    def adam(self, power1: Any, power2: Any, epsilon: Any) -> None:
        o = self.problem.options
        for p, g, m, v in self.leaves():
            self.tf.raw_ops.ResourceApplyAdam(
                var=p.handle, m=m.handle, v=v.handle, beta1_power=power1, beta2_power=power2,
                lr=o["lr"], beta1=o["betas"][0], beta2=o["betas"][1], epsilon=epsilon, grad=g,
            )  # fmt: skip

    def sgd(self) -> None:
        o = self.problem.options
        for p, g, b in self.leaves():
            self.tf.raw_ops.ResourceApplyMomentum(
                var=p.handle, accum=b.handle, lr=o["lr"], grad=g, momentum=o["momentum"]
            )

    def step(self) -> None:
        self.count += 1
        if self.problem.optimizer == "sgd":
            self.call()
            return
        o = self.problem.options
        power1, power2 = (beta**self.count for beta in o["betas"])
        scalars = (power1, power2, o["eps"] * (1 - power2) ** 0.5)
        self.call(*(self.tf.constant(x, self.problem.dtype) for x in scalars))

    def params(self) -> list[np.ndarray]:
        return [p.numpy() for p in self.variables]

    def state_bytes(self) -> int:
        return sum(s.numpy().nbytes for column in self.states for s in column)


def main() -> int:
    """Add the rows and run the command."""
    for row in (
        Row("deepspeed", "DeepSpeedCPUAdam", DeepSpeed, ("deepspeed", "torch"), process="deepspeed",
            optimizers=("adam", "adamw"), dtypes=("float32",)),
        Row("tensorflow", "TensorFlow, raw operation", TensorFlow, ("tensorflow",),
            process="tensorflow", optimizers=("adam", "sgd")),
        keras_row("tensorflow"),
    ):  # fmt: skip
        ROWS[row.name] = row
    cli.bench.PROGRAM = "python bench/compare.py"
    return cli.main(["bench", *sys.argv[1:]])


if __name__ == "__main__":
    import compare  # workers can import classes from there, but not from __main__

    sys.exit(compare.main())
