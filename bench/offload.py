"""Steps of AdamW on the tensors of a large language model in host memory, as offloading takes them.

    python bench/offload.py [--gb 4] [--rounds 15] [--threads 1 4 16] [--markdown FILE]
    python bench/offload.py --fsdp 1.0 [--steps 8] [--threads 1 4 16] [--markdown FILE]
    python bench/offload.py --all 10 [--gb 40] [--fsdp 1.0] [--markdown FILE]

The first compares the formats of fusedopt.torch with torch.optim.AdamW(fused=True),
DeepSpeedCPUAdam and bitsandbytes' 8-bit AdamW, where they are installed: the time of a step and the
bytes of host memory that each keeps for a parameter, on 1, 2, 4, ... threads. The tensors are those
of a model with 7B parameters in number and proportion, smaller so that all contenders fit into
`--gb` at the same time. They take turns; ratios are medians over the rounds, and rounds in which
other processes kept CPUs busy are repeated.

The second trains a decoder of so many billion parameters under FSDP2 with CPUOffloadPolicy, on one
GPU (on the CPU without one, to try it): the time of a whole step, how long the GPU waits for the
optimizer, host memory, and on which NUMA nodes that lies, for each number of threads.

The third does both within so many minutes, and the first again with all CPUs and memory of one NUMA
node, and with memory from all nodes in turn, where there are several. Each part runs in a process
of its own, which may fail or be late without harm to the others. The report is written after each
part, to bench/results/offload-MACHINE.md unless --markdown says otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt
import fusedopt.torch as fo
from fusedopt.bench import machine

BASE = "torch.optim.AdamW(fused=True)"
NAME = "fusedopt.torch.AdamW"
LAYERS, WIDTH = 32, 4096  # of Llama 2 7B
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
BYTES = 70  # for each parameter, of all contenders together


def shapes(width: int, layers: int = LAYERS) -> list[tuple[int, ...]]:
    """Return the shapes of Llama 2's tensors, all as narrow as the width."""
    hidden, words = width * 43 // 16, 32000 * width // WIDTH
    layer = [*[(width, width)] * 4, *[(hidden, width)] * 2, (width, hidden), (width,), (width,)]
    return [(words, width), *layer * layers, (width,), (words, width)]


def count(width: int) -> int:
    """Return the number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes(width))


def deepspeed(params: list[Tensor]) -> Any:
    """Return DeepSpeed's optimizer, which it compiles when it is first made."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, **OPTIONS, adamw_mode=True)


def bitsandbytes(params: list[Tensor]) -> Any:
    """Return the optimizer of bitsandbytes that keeps 8-bit state."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, **OPTIONS)


def ours(params: list[Tensor], **options: Any) -> Any:
    """Return our optimizer."""
    return fo.AdamW(params, **OPTIONS, **options)  # type: ignore[operator]


# what keeps state, the dtype of parameters and gradients, and what makes it
CONTENDERS: dict[str, tuple[torch.dtype, Callable[[list[Tensor]], Any]]] = {
    BASE: (torch.float32, lambda params: torch.optim.AdamW(params, **OPTIONS, fused=True)),
    NAME: (torch.float32, ours),
    f"{NAME}, bfloat16 state": (torch.float32, partial(ours, state_dtype="bfloat16")),
    f"{NAME}, 8-bit state": (torch.float32, partial(ours, state_dtype="int8")),
    f"{NAME}, bfloat16 weights + 16 bits": (torch.bfloat16, ours),
    f"{NAME}, bfloat16 weights + 8 bits, 8-bit state": (
        torch.bfloat16,
        partial(ours, master_bits=24, state_dtype="int8"),
    ),
    "DeepSpeedCPUAdam": (torch.float32, deepspeed),
    "bitsandbytes AdamW8bit": (torch.float32, bitsandbytes),
}


class Contender:
    """An optimizer on parameters of its own; contenders of a dtype share the gradients."""

    def __init__(self, make: Callable[[list[Tensor]], Any], grads: list[Tensor]) -> None:
        self.params = [nn.Parameter(g.detach() * 0.1) for g in grads]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.optimizer = make(list(self.params))
        self.optimizer.step()

    def kept(self) -> int:
        """Return the bytes of the parameters and of all state."""
        state = [x for own in self.optimizer.state.values() for x in own.values()]
        sizes = {x.data_ptr(): x.nbytes for x in state if torch.is_tensor(x)}  # tables are shared
        return sum(p.nbytes for p in self.params) + sum(sizes.values())


@dataclass(frozen=True)
class Round:
    """The seconds of a step of each contender, and whether other processes let it have the CPUs."""

    seconds: dict[str, float]
    is_calm: bool


def in_turns(contenders: dict[str, Contender], rounds: int, until: float) -> list[Round]:
    """Measure in turns, after one round to warm up, until enough is known or a time has come.

    In a calm round other processes kept less than a quarter of a CPU busy; others are repeated, up
    to three times as many. What takes more than ten times as long as torch's has three rounds.
    """
    made: list[Round] = []
    slow: set[str] = set()
    while len(made) <= 3 * rounds and sum(r.is_calm for r in made[1:]) < rounds:
        if len(made) > 3 and perf_counter() > until:
            break
        taken: dict[str, float] = {}
        order = [name for name in contenders if len(made) < 4 or name not in slow]
        begin, busy, own = perf_counter(), machine.busy_seconds(), process_time()
        for name in order if len(made) % 2 else reversed(order):
            start = perf_counter()
            contenders[name].optimizer.step()
            taken[name] = perf_counter() - start
        others = machine.busy_seconds() - busy - (process_time() - own)
        made.append(Round(taken, others < 0.25 * (perf_counter() - begin)))
        slow |= {name for name in taken if taken[name] > 10 * taken[BASE]}
    return made[1:]


def of(rounds: list[Round], name: str) -> list[dict[str, float]]:
    """Return the calm rounds of a contender; all of its rounds if fewer than three are calm."""
    own = [r for r in rounds if name in r.seconds]
    calm = [r for r in own if r.is_calm]
    return [r.seconds for r in (calm if len(calm) >= 3 else own)]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def use_threads(number: int) -> None:
    """Let fusedopt and torch's OpenMP, which DeepSpeed shares, use so many threads."""
    fusedopt.set_num_threads(number)
    torch.set_num_threads(number)


def described() -> list[str]:
    """Return the machine and the versions, as a table."""
    known = machine.describe()
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    own = [["NUMA nodes", str(nodes)], ["GPU", gpu], ["torch", torch.__version__]]
    own += [[p, machine.installed(p) or "absent"] for p in ("deepspeed", "bitsandbytes")]
    return table(["", ""], [[key, str(value)] for key, value in known.items()] + own)


def powers() -> list[int]:
    """Return the numbers of threads to measure: 1, 2, 4, ... and all."""
    most = fusedopt.get_num_threads()
    return sorted({*(2**k for k in range(10) if 2**k < most), most})


def in_time(numbers: list[int], seconds: float) -> Iterator[tuple[int, float]]:
    """Yield the numbers of threads, the largest first, and until when each may be measured."""
    end = perf_counter() + seconds
    for left, number in zip(range(len(numbers), 0, -1), sorted(numbers)[::-1], strict=True):
        now = perf_counter()
        yield number, now + (end - now) / left


def steps(gb: float, rounds: int, threads: list[int], seconds: float) -> Iterator[list[str]]:
    """Compare the contenders; yield the report so far for each number of threads."""
    begin = perf_counter()
    width = max(w for w in range(64, WIDTH + 1, 64) if w == 64 or count(w) * BYTES <= gb * 1e9)
    generator = torch.Generator().manual_seed(0)
    grads = {torch.float32: [torch.randn(shape, generator=generator) for shape in shapes(width)]}
    grads[torch.bfloat16] = [grad.bfloat16() for grad in grads[torch.float32]]
    contenders, absent = {}, []
    for name, (dtype, make) in CONTENDERS.items():
        try:
            contenders[name] = Contender(make, grads[dtype])
        except Exception as exc:  # whatever a package that is not there, or not built, raises
            absent.append(f"{name}: {type(exc).__name__}: {str(exc).splitlines()[0][:100]}")
    times: dict[int, list[Round]] = {}
    for number, until in in_time(threads, seconds - (perf_counter() - begin)):
        use_threads(number)
        times[number] = in_turns(contenders, rounds, until)
        yield compared(contenders, width, times, absent)


def compared(
    contenders: dict[str, Contender], width: int, times: dict[int, list[Round]], absent: list[str]
) -> list[str]:
    """Return the report of the rounds of each number of threads."""
    threads, most, n = sorted(times), max(times), count(width)
    calm = sum(r.is_calm for r in times[most])
    rows, scaling = [], []
    for name, contender in contenders.items():
        own = median(seconds[name] for seconds in of(times[most], name))
        ratios = sorted(seconds[name] / seconds[BASE] for seconds in of(times[most], name))
        quarter = len(ratios) // 4
        kept = contender.kept() / n
        rows.append(
            [name, f"{kept:.2f}", f"{kept + contender.params[0].element_size():.2f}",
             f"{1e3 * own:.1f}", f"{1e9 * own / n:.3f}",
             f"{median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"]
        )  # fmt: skip
        cells = [median(r[name] for r in of(times[number], name)) for number in threads]
        scaling.append([name, *(f"{1e3 * t:.1f} ({cells[0] / t:.2f})" for t in cells)])
    busy = [
        "Other processes had the CPUs too, and several",
        "threads wait for the latest. One thread, below, is the better comparison.",
        "",
    ]
    missing = ["Absent: " + "; ".join(absent) + ".", ""] if absent else []
    return [
        f"## A step of {n / 1e6:.0f}M parameters in {len(shapes(width))} tensors, {most} threads",
        "",
        f"The tensors of Llama 2 7B at width {width}. Bytes are of host memory for a parameter: of",
        "weights and state, and with the gradient. A ratio is of times in the same round; median",
        f"and quartiles. Of {len(times[most])} rounds {calm} were calm: other processes used less",
        "than a quarter of a CPU. Those count, and all where fewer than three were.",
        "",
        *table(
            ["", "bytes kept", "with gradient", "ms", "ns a parameter", f"ratio to {BASE}"], rows
        ),
        *missing,
        *(busy if calm < 3 else []),
        f"## Threads: ms (times as fast as on {threads[0]})",
        "",
        *table(["", *map(str, threads)], scaling),
    ]


# ---------------------------------------------------------------- FSDP2


class Decoder(nn.Module):
    """A decoder of about so many parameters."""

    def __init__(self, parameters: float) -> None:
        super().__init__()
        layers = 4 if parameters < 1e8 else 16
        width = max(64, round((parameters / layers / 12) ** 0.5 / 64) * 64)
        self.embed = nn.Embedding(1024, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 64, 4 * width, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 1024)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss of each next token."""
        x = self.embed(tokens[:, :-1])
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


def host_memory() -> float:
    """Return the resident memory of this process in GB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) * 1024 / 1e9 if found else float("nan")


def by_node() -> str:
    """Return the GB of this process on each NUMA node, "-" if the kernel does not say."""
    sums: dict[str, float] = {}
    try:
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
    except OSError:
        return "-"
    for line in lines:
        size = re.search(r"kernelpagesize_kB=(\d+)", line)
        for node, pages in re.findall(r" N(\d+)=(\d+)", line):
            sums[node] = sums.get(node, 0) + int(pages) * int(size[1] if size else 4) * 1024 / 1e9
    return ", ".join(f"{node}: {gb:.1f}" for node, gb in sorted(sums.items())) or "-"


class Training:
    """A decoder under FSDP2 with CPUOffloadPolicy, in a dtype that the host keeps."""

    def __init__(self, parameters: float, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self.has_gpu = torch.cuda.is_available()
        device = "cuda" if self.has_gpu else "cpu"
        torch.manual_seed(0)
        self.model = Decoder(parameters).to(dtype)
        mesh = init_device_mesh(device, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy(pin_memory=self.has_gpu)
        for part in [*self.model.layers, self.model]:
            fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
        self.params = list(self.model.parameters())
        self.tokens = torch.randint(1024, (4, 513 if self.has_gpu else 33), device=device)
        self.model(self.tokens).backward()  # so that gradients have memory before it is measured

    def kept(self, optimizer: Any) -> float:
        """Return the bytes of parameters and state that the host keeps, for each parameter."""
        state = [x for own in optimizer.state.values() for x in own.values() if torch.is_tensor(x)]
        own = {x.data_ptr(): x.nbytes for x in (getattr(x, "_local_tensor", x) for x in state)}
        params = sum(p.nbytes for p in self.params)
        return (params + sum(own.values())) / sum(p.numel() for p in self.params)

    def run(self, optimizer: Any, steps: int, until: float) -> tuple[float, float, int]:
        """Return the medians of a step's and of the optimizer's seconds, and how many steps."""
        whole, alone = [], []
        for number in range(-2, steps):
            if number > 2 and perf_counter() > until:
                break
            start = perf_counter()
            optimizer.zero_grad()
            self.model(self.tokens).backward()
            if self.has_gpu:
                torch.cuda.synchronize()
            waits = perf_counter()
            optimizer.step()
            end = perf_counter()
            if number >= 0:
                whole.append(end - start)
                alone.append(end - waits)
        return median(whole), median(alone), len(whole)


def fsdp(billions: float, steps: int, threads: list[int], seconds: float) -> Iterator[list[str]]:
    """Train under FSDP2 with each optimizer that takes DTensors; yield the report after each."""
    import gc

    import torch.distributed as dist

    begin, has_gpu = perf_counter(), torch.cuda.is_available()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # the one rank needs no network
        os.environ.setdefault(name, "lo")
    made = [
        (name, dtype, make)
        for dtype in (torch.float32, torch.bfloat16)  # one model of each at a time
        for name, (own, make) in CONTENDERS.items()
        if own == dtype and make not in (deepspeed, bitsandbytes)  # which take no DTensors
    ]
    where = torch.cuda.get_device_name() if has_gpu else "the CPU, as there is no GPU"
    header = [
        "", "bytes kept", "step, ms", "optimizer, ms", "share of the step",
        "host memory added, GB", "GB by NUMA node",
    ]  # fmt: skip
    rows, scaling, counts, training, last = [], [], [], None, None
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            init_method=f"file://{folder}/ranks", rank=0, world_size=1,
        )  # fmt: skip
        for left, (name, dtype, make) in zip(range(len(made), 0, -1), made, strict=True):
            if last != dtype:
                training = None  # its memory is freed before the next is made
                gc.collect()
                training, last = Training(billions * 1e9, dtype), dtype
            assert training is not None
            use_threads(max(threads))
            before, optimizer = host_memory(), make(training.params)
            times, share = {}, (seconds - (perf_counter() - begin)) / left
            for number, until in in_time(threads, share):
                use_threads(number)
                times[number] = training.run(optimizer, steps, until)
                counts.append(times[number][2])
            step, alone, _ = times[max(threads)]
            rows.append(
                [name, f"{training.kept(optimizer):.2f}", f"{1e3 * step:.0f}",
                 f"{1e3 * alone:.0f}", f"{100 * alone / step:.0f}%",
                 f"{host_memory() - before:.1f}", by_node()]
            )  # fmt: skip
            first = times[threads[0]][1]
            cells = [(1e3 * times[n][0], 1e3 * times[n][1]) for n in threads]
            scaling.append(
                [
                    name,
                    *(f"{whole:.0f}, {own:.0f} ({1e3 * first / own:.2f})" for whole, own in cells),
                ]
            )
            title = f"## FSDP2 with CPUOffloadPolicy: {billions:g}B parameters, bfloat16 on {where}"
            yield [
                title,
                "",
                f"Medians of {min(counts)} to {max(counts)} steps on {max(threads)} threads.",
                "The GPU is idle while the optimizer steps. Bytes are of parameters and state, for",
                "each parameter; the memory that is added is the optimizer's.",
                "",
                *table(header, rows),
                "## FSDP2, threads: ms of a step, of the optimizer (times as fast as on "
                f"{threads[0]})",
                "",
                *table(["", *map(str, threads)], scaling),
            ]
            del optimizer
            gc.collect()
        training = None
        dist.destroy_process_group()


# ---------------------------------------------------------------- all


@dataclass(frozen=True)
class Part:
    """A run of this file; its share of the time that is left; the CPUs it may use, if not all.

    It ends with what it has after 1.4 times its share.
    """

    title: str
    arguments: list[str]
    share: float
    prefix: tuple[str, ...] = ()
    cpus: frozenset[int] = frozenset()


def allowed() -> set[int]:
    """Return the CPUs on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def nodes() -> dict[str, frozenset[int]]:
    """Return the CPUs of each NUMA node on which this process may run."""
    found, granted = {}, allowed()
    for path in sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist")):
        cpus = set()
        for span in filter(None, path.read_text().strip().split(",")):
            first, _, last = span.partition("-")
            cpus |= set(range(int(first), int(last or first) + 1))
        if cpus & granted:
            found[path.parent.name.removeprefix("node")] = frozenset(cpus & granted)
    return found


def parts(gb: float, billions: float) -> list[Part]:
    """Return what `--all` runs."""
    found = [
        Part("FSDP2", ["--fsdp", f"{billions:g}", "--steps", "6"], 0.5),
        Part("steps", ["--gb", f"{gb:g}", "--rounds", "11"], 0.7),
    ]
    placed = nodes()
    if len(placed) > 1:
        numactl = shutil.which("numactl")
        node, cpus = next(iter(placed.items()))
        short = ["--gb", f"{gb / 2:g}", "--rounds", "7", "--threads"]
        bound = (numactl, f"--membind={node}") if numactl else ()
        found.append(Part(f"steps on NUMA node {node}", [*short, str(len(cpus))], 0.5, bound, cpus))
        if numactl:
            every = str(sum(map(len, placed.values())))
            wide = (numactl, "--interleave=all")
            found.append(Part("steps, memory of all nodes in turn", [*short, every], 1.0, wide))
    return found


def run(part: Part, seconds: float) -> list[str]:
    """Run a part in a process of its own; return its report, or why there is none."""
    all_cpus = allowed()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "part.md")
        command = [
            *part.prefix, sys.executable, __file__, *part.arguments,
            "--seconds", f"{seconds * part.share:.0f}", "--part", "--markdown", str(file),
        ]  # fmt: skip
        try:
            if part.cpus:
                os.sched_setaffinity(0, part.cpus)  # which the new process inherits
            most = seconds * min(1.0, 1.4 * part.share)
            done = subprocess.run(command, capture_output=True, text=True, timeout=most)
            fault = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        except subprocess.TimeoutExpired:
            fault = ["it took too long"]
        except OSError as exc:
            fault = [f"{type(exc).__name__}: {exc}"]
        finally:
            if part.cpus:
                os.sched_setaffinity(0, all_cpus)
        if file.exists():
            text = file.read_text().splitlines()
            return (
                [f"## {part.title}", "", *text[2:], ""] if part.cpus or part.prefix else [*text, ""]
            )
    return [f"## {part.title}", "", f"No figures: {fault[0][:200]}", ""]


def everything(minutes: float, gb: float | None, billions: float | None) -> Iterator[list[str]]:
    """Run all parts within a time; yield the report so far."""
    end = perf_counter() + 60 * minutes
    has_gpu = torch.cuda.is_available()
    free = (machine.available_memory() or 16e9) / 1e9
    gb = min(40.0, free / 3) if gb is None else gb
    # 20 bytes for each parameter, pinned memory, and gradients
    billions = min(1.0 if has_gpu else 0.01, free / 40) if billions is None else billions
    report: list[str] = []
    for part in parts(gb, billions):
        left = end - perf_counter()
        if left < 15:
            report += [f"## {part.title}", "", "No figures: the time was over.", ""]
        else:
            report += run(part, left)
        yield report
    if len(nodes()) < 2:
        yield [*report, "This machine has one NUMA node: nothing to place.", ""]


def named() -> Path:
    """Return the file of a report of all parts, with the machine's name."""
    kind = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else machine.describe()["processor"]
    )
    name = re.sub(r"[^a-z0-9]+", "-", f"{kind} {len(allowed())} cpus".lower())
    return Path(__file__).parent / "results" / f"offload-{name.strip('-')}.md"


def main() -> None:
    """Measure, and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, help="memory for all contenders; 4 by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", help="1, 2, 4, ... by default")
    parser.add_argument("--fsdp", type=float, metavar="BILLIONS", help="train under FSDP2 instead")
    parser.add_argument("--steps", type=int, default=8, help="of a run under FSDP2")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after these, fewer rounds")
    parser.add_argument("--all", type=float, metavar="MINUTES", help="both, in this time")
    parser.add_argument("--part", action="store_true", help="leave out the machine")
    parser.add_argument("--markdown", type=Path, help="write the report to this file")
    options = parser.parse_args()
    command = " ".join(["python bench/offload.py", *sys.argv[1:]])
    head = ["# Steps in host memory", "", f"`{command}`", "", *described()]
    threads = sorted(set(options.threads or powers()))
    path = options.markdown
    if options.all is not None:
        path = path or named()
        reports = everything(options.all, options.gb, options.fsdp)
    elif options.fsdp is not None:
        reports = fsdp(options.fsdp, options.steps, threads, options.seconds)
    else:
        reports = steps(options.gb or 4.0, options.rounds, threads, options.seconds)
    text = ""
    for report in reports:
        text = "\n".join([*([] if options.part else head), *report]).rstrip() + "\n"
        if path is not None:
            path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
