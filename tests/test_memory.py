"""`fusedopt.memory` says what an optimizer takes; names of formats and options."""

import importlib.util

import numpy as np
import pytest
from ml_dtypes import bfloat16

import fusedopt
from fusedopt import cli

SHAPES = {"W": (300, 64), "inner": [(64, 70), (5,)]}
MATRICES = [(300, 64), (64, 70)]
OPTIONS = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "int8"},
    {"state_dtype": "int8", "min_8bit_size": 0},
    {"ema": 0.9},
]
EVERY = [name for name in fusedopt.__all__ if hasattr(getattr(fusedopt, name), "rule")]


def made(node, dtype):
    if isinstance(node, dict):
        return {key: made(inner, dtype) for key, inner in node.items()}
    if isinstance(node, list):
        return [made(inner, dtype) for inner in node]
    return np.zeros(node, dtype)


def of(opt, grad_itemsize=None):
    """What `Optimizer.memory` says, in bytes of all parameters."""
    size = sum(param.size for param in opt._work.params)
    return {
        name: {column: round(value * size) for column, value in row.items()}
        for name, row in opt.memory(grad_itemsize).items()
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", EVERY)
def test_is_what_the_optimizer_takes(name, dtype, options):
    cls = getattr(fusedopt, name)
    shapes = SHAPES if cls.rule.demand_shape is None else MATRICES
    kind = bfloat16 if dtype == "bfloat16" else dtype
    try:
        opt = cls(made(shapes, kind), **options)
    except ValueError as exc:
        with pytest.raises(ValueError) as found:
            fusedopt.memory(shapes, name, dtype=dtype, **options)
        assert str(found.value).split(": ")[-1] == str(exc).split(": ")[-1]
        return
    assert fusedopt.memory(shapes, name, dtype=dtype, **options) == of(opt)
    assert fusedopt.memory(shapes, name, dtype=kind, grad_dtype="f2", **options) == of(opt, 2)
    assert fusedopt.memory(made(shapes, kind), name, **options) == of(opt)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_master_bits(bits):
    opt = fusedopt.AdamW(made(SHAPES, bfloat16), master_bits=bits)
    assert fusedopt.memory(SHAPES, dtype="bfloat16", master_bits=bits) == of(opt)


def test_bad_input():
    for params, message in [
        ([], "params: no shapes"), ([(3, -1)], r"params\[0\]: a shape"), ("x", "params: expected"),
        ({"W": [2.0]}, r"params\['W'\]\[0\]: expected a shape"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            fusedopt.memory(params)
    with pytest.raises(ValueError, match="optimizer: expected one of ADOPT, .*got 'Adan'"):
        fusedopt.memory(3, "Adan")
    with pytest.raises(TypeError, match="dtype: dtype int32 is not supported"):
        fusedopt.memory(3, dtype=np.int32)
    with pytest.raises(TypeError, match=r"unknown option 'betass' \(is betas meant\?\)"):
        fusedopt.memory(3, betass=1)


def test_command(capsys):
    assert cli.main(["memory", "30000x64,64x256,256", "--state-dtype", "int8"]) == 0
    table = fusedopt.memory([(30000, 64), (64, 256), 256], state_dtype="int8")
    shown = capsys.readouterr().out
    for name, row in table.items():
        assert f"{name:12} {row['resident'] / 1e6:12,.3f} {row['moved'] / 1e6:12,.3f}" in shown
    for arguments in ([], ["3x"], ["3", "--model", "a:b"], ["--model", "no_such_module:x"]):
        assert cli.main(["memory", *arguments]) == 2
        assert capsys.readouterr().err.startswith("fusedopt memory: ")


def test_models():
    torch = pytest.importorskip("torch")
    import fusedopt.torch as fo

    model = torch.nn.Linear(64, 100)
    table = fusedopt.memory(model, state_dtype="int8")
    assert table == fusedopt.memory([(100, 64), (100,)], state_dtype="int8")
    assert table == fusedopt.memory(model.parameters(), state_dtype="int8")
    opt = fo.AdamW(model.parameters(), state_dtype="int8")
    model(torch.ones(1, 64)).sum().backward()
    opt.step()
    state = [t for s in opt.state.values() for name, t in s.items() if name != "step"]
    assert sum(t.nbytes for t in state) == sum(
        table[name]["resident"] for name in ("exp_avg", "exp_avg_sq")
    )
    with torch.device("meta"):
        assert fusedopt.memory(torch.nn.Linear(64, 100), state_dtype="int8") == table


def test_a_model_by_its_name(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "one_model.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Linear(100_000, 100_000)\n"  # 40 GB
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["memory", "--model", "one_model:net"]) == 0
    assert "120,001.200" in capsys.readouterr().out


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name, given",
    [
        ("bfloat16", "bf16"), ("bfloat16", bfloat16), ("bfloat16", np.dtype(bfloat16)),
        ("float32", "fp32"), ("float32", np.float32), ("int8", np.int8), ("int8", np.dtype("i1")),
        ("bfloat16", "torch.bfloat16"), ("int8", "torch.int8"), ("float32", "torch.float32"),
    ],
)  # fmt: skip
def test_names_of_state_dtypes(name, given):
    torch = None
    if importlib.util.find_spec("torch"):
        import torch
    if isinstance(given, str) and given.startswith("torch."):
        if torch is None:
            pytest.skip("needs torch")
        given = getattr(torch, given.removeprefix("torch."))
    opt = fusedopt.AdamW([np.zeros(5000, "f4")], state_dtype=given)
    assert opt.param_groups[0]["state_dtype"] == name
    opt.param_groups[0]["state_dtype"] = given  # in place of the same name
    opt.step([np.ones(5000, "f4")])
    plain = fusedopt.AdamW([np.zeros(5000, "f4")], state_dtype=name)
    assert opt.memory() == plain.memory()
    if torch is not None:
        import fusedopt.torch as fo

        p = torch.nn.Parameter(torch.zeros(5000))
        p.grad = torch.ones(5000)
        tensor = fo.AdamW([p], state_dtype=given)
        assert tensor.param_groups[0].get("state_dtype") == name
        tensor.step()
        state = tensor.state[p]
        assert ("exp_avg_codes" in state) == (name == "int8")
        if name == "bfloat16":
            assert state["exp_avg"].dtype == torch.bfloat16


def test_other_state_dtypes_are_refused():
    for given in ("float16", np.float64, 8, "bf8"):
        with pytest.raises(ValueError, match="state_dtype: expected None or 'float32'"):
            fusedopt.AdamW([np.zeros(3, "f4")], state_dtype=given)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("clip", "max_grad_norm or clip_value"), ("learning_rate", "lr"), ("beta1", "betas"),
        ("weigth_decay", "weight_decay"), ("epsilon", "eps"), ("max_norm", "max_grad_norm"),
        ("zzz", None),
    ],
)  # fmt: skip
def test_an_unknown_option_suggests_the_nearest(name, meant):
    said = rf"unknown option '{name}'" + (rf" \(is {meant} meant\?\)" if meant else "") + "; known"
    with pytest.raises(TypeError, match=f"AdamW: {said}"):
        fusedopt.AdamW([np.zeros(3, "f4")], **{name: 1})
    if importlib.util.find_spec("torch"):
        import torch

        import fusedopt.torch as fo

        with pytest.raises(TypeError, match=f"AdamW: {said}"):
            fo.AdamW([torch.zeros(3)], **{name: 1})


def test_master_bits_without_16_bits_are_refused():
    wide, narrow = np.zeros(3, "f4"), np.zeros(3, bfloat16)
    for make in (fusedopt.AdamW, fusedopt.memory):
        with pytest.raises(ValueError, match="master_bits=24: no parameter is bfloat16"):
            make([wide], master_bits=24)
        make([wide, narrow], master_bits=24)  # as where biases are wide
    if importlib.util.find_spec("torch"):
        import torch

        import fusedopt.torch as fo

        with pytest.raises(ValueError, match="master_bits=24: no parameter is bfloat16"):
            fo.AdamW([torch.zeros(3)], master_bits=24)
        fo.AdamW([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)], master_bits=24)


# ------------------------------------------------------------------ defaults of a step


@pytest.mark.parametrize("module", [fusedopt, fusedopt.reference], ids=["fast", "reference"])
@pytest.mark.parametrize(
    "own, over",
    [
        ({"max_grad_norm": 0.5}, {"max_grad_norm": None}),
        ({"clip_value": 0.1}, {"clip_value": 2.0}),
        ({"max_grad_norm": 0.5, "norm_type": np.inf, "per_tensor": True},
         {"norm_type": 2.0, "per_tensor": False}),
        ({"stats": True}, {"stats": False}), ({"zero_grads": True}, {"zero_grads": False}),
    ],
    ids=str,
)  # fmt: skip
def test_the_class_takes_defaults_of_its_steps(module, own, over):
    def start():
        return [np.linspace(-1, 1, 70, dtype="f4"), np.ones(3, "f4")]

    def grads():
        return [np.linspace(-3, 3, 70, dtype="f4"), np.ones(3, "f4")]

    ours, theirs = start(), start()
    opt, plain = module.AdamW(ours, **own), module.AdamW(theirs)
    for now in ({}, over, {}):
        a, b = grads(), grads()
        first, second = opt.step(a, **now), plain.step(b, **{**own, **now})
        assert first._replace(stats=None) == second._replace(stats=None)
        assert (first.stats is None) == (second.stats is None)
        for x, y in zip(ours + a, theirs + b, strict=True):
            assert x.tobytes() == y.tobytes()
    assert not own.keys() & opt.param_groups[0].keys()


def test_nonfinite_of_the_class():
    w = np.ones(3, "f4")
    opt = fusedopt.SGD(w, lr=0.1, nonfinite="skip")
    assert opt.step(np.full(3, np.nan, "f4")).skipped
    assert not opt.step(np.full(3, np.nan, "f4"), nonfinite="propagate").skipped
    assert np.isnan(w).all()


def test_bad_defaults_of_steps():
    for own, error in [
        ({"max_grad_norm": -1}, ValueError), ({"per_tensor": True}, ValueError),
        ({"nonfinite": "ignore"}, ValueError), ({"stats": 1}, TypeError),
        ({"grad_scale": 2.0}, TypeError),
    ]:  # fmt: skip
        with pytest.raises(error, match=next(iter(own))):
            fusedopt.AdamW([np.zeros(3, "f4")], **own)
