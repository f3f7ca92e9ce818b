"""Hostile checkpoint files against `load`: loaded completely, or refused by name.

    python tests/campaigns/checkpoints.py [files] [seed]

Each file is a valid one, damaged at one of several levels: bytes, members of the archive with
correct checksums, headers of arrays, metadata. A load that raises must leave every byte of
parameters and state; after one that does not, a step must work. Memory stays bounded.
"""

import io
import json
import random
import resource
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

import fusedopt
from fusedopt import _disk
from fusedopt.formats import Stored

SUFFIXES = (".npz", ".safetensors")
MOST_MEMORY = 200 << 20  # bytes that all loads together may add to the process


# ---------------------------------------------------------------- optimizers


KINDS = 3  # and as many with state on disk, which maps the files that it loads


def make(kind, folder=None):
    """An optimizer of one of several kinds after a few steps, and its gradients."""
    rng = np.random.default_rng(kind)
    f4 = rng.standard_normal((5, 7)).astype("f4")
    params = [
        {"W": f4, "F": np.asfortranarray(rng.standard_normal((4, 3))), "e": np.ones((0, 3), "f4")},
        {"W": rng.standard_normal(130).astype("f4"), "h": np.ones(9, "f2")},
        {"b": f4.astype(ml_dtypes.bfloat16), "c": np.ones(65, ml_dtypes.bfloat16)},
    ][kind]
    opt = [
        lambda: fusedopt.Adam(params, amsgrad=True, state_dir=folder),
        lambda: fusedopt.AdamW(params, state_dtype="int8", min_8bit_size=0, state_dir=folder),
        lambda: fusedopt.SGD(params, momentum=0.9, master_bits=24, state_dir=folder),
    ][kind]()
    grads = {k: np.ones(p.shape, p.dtype) for k, p in params.items()}
    for _ in range(2):
        opt.step(grads)
    return opt, grads


def arrays_of(opt):
    found = list(opt.param_groups[0]["params"].values())
    for state in opt.state.values():
        for key, value in state.items():
            if key != "step":
                found += value.parts() if isinstance(value, Stored) else [value]
    return found


def contents(opt):
    steps = [state["step"] for state in opt.state.values()]
    options = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    return [a.tobytes() for a in arrays_of(opt)] + [steps, opt.state_dict()["step"], options]


# ---------------------------------------------------------------- bytes


def spoil_bytes(r, data, other):
    """Flips, cuts, copies or zeros bytes; or joins the head of one file to the tail of another."""
    data = bytearray(data)
    at = r.randrange(len(data))
    piece = data[at : at + r.choice([1, 4, 50, 1000])]
    match r.randrange(8):
        case 0 | 1:
            for _ in range(r.choice([1, 1, 3, 20])):
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + len(piece)]
        case 4:
            to = r.randrange(len(data))
            data[to:to] = piece
        case 5:
            data[at : at + len(piece)] = bytes(len(piece))
        case 6:
            data[at:] = other[r.randrange(len(other)) :]
        case _:
            data[at : at + 8] = r.choice([b"\xff" * 8, bytes(7) + b"\x7f", r.randbytes(8)])
    return bytes(data)


# ---------------------------------------------------------------- metadata

VALUES = [
    None, True, False, 0, 1, -1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5,
    1e308, float("inf"), float("nan"), "", "int8", "float32", "x" * 1000, "\ud800", [], [1],
    [0.9, 1.0], [0.9, 0.999], [[]], {}, {"a": 1}, {"params": []},
]  # fmt: skip


def spoil_json(r, node):
    """Replaces, drops, renames or repeats a random node of a tree."""
    if isinstance(node, (dict, list)) and node and r.random() < 0.85:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = r.choice(list(keys))
        match r.randrange(12):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[r.choice(["x", "step", "lr", "extra", ""])] = node.pop(key)
            case 1 | 2:
                if isinstance(node, list):
                    node.append(node[key])
            case 3:
                for _ in range(r.choice([10, 900])):
                    node[key] = [node[key]]
            case _:
                node[key] = spoil_json(r, node[key])
        return node
    return r.choice(VALUES)


def spoil_text(r, text):
    """Damages the metadata, as a tree or as characters."""
    if r.random() < 0.8:
        try:
            return json.dumps(spoil_json(r, json.loads(text)))
        except RecursionError:
            return "[" * 100_000
    at = r.randrange(len(text))
    return text[:at] + r.choice(["", "{", '"', "1e999", "\x00", "9" * 5000]) + text[at + 1 :]


# ---------------------------------------------------------------- .npz

DESCRS = [
    "<f4", ">f4", "<f8", "<f2", "|u1", "|i1", "<u2", "<i8", "|O", "|S4", "<U9", "|V4", "<c8", "|b1",
    "<M8[s]", "<f16", "nonsense", "", [("a", "<f4")], "<f4\\x00",
]  # fmt: skip
SHAPES = ["()", "(0,)", "(5, 7)", "(7, 5)", "(35,)", "(-1,)", "(1,)*40", "(2**40,)", "(10**10, 0)",
          "(1000000000,)", "(4611686018427387904, 4)", "None", "(1.5,)", "(True,)"]  # fmt: skip


def spoil_npy(r, data):
    """Damages the header of an array, and corrects its length; or the bytes of the array."""
    if r.random() < 0.3:
        return spoil_bytes(r, data, data)
    end = 10 + struct.unpack("<H", data[8:10])[0]
    header = data[10:end].decode("latin1")
    fields = [header.split("'")[3], header.split("'fortran_order': ")[1].split(",")[0]]
    shape = header[header.index("(") : header.index(")") + 1]
    match r.randrange(4):
        case 0:
            fields[0] = r.choice(DESCRS)
        case 1:
            shape = eval_shape(r.choice(SHAPES))
        case 2:
            fields[1] = r.choice(["True", "False", "None", "2"])
        case _:
            shape += r.choice([" " * 60_000, "(" * 5000, "-" * 9000 + "1", ", 'x': 1", "\n#"])
    header = f"{{'descr': {fields[0]!r}, 'fortran_order': {fields[1]}, 'shape': {shape}, }}\n"
    raw = header.encode("latin1")[:65_535]
    return data[:8] + struct.pack("<H", len(raw)) + raw + data[end:]


def eval_shape(text):
    return text if text == "None" else repr(eval(text))


def text_of_npy(data):
    return str(np.load(io.BytesIO(data))[()])


def npy_of_text(text):
    out = io.BytesIO()
    try:
        np.save(out, np.array(text))
    except UnicodeEncodeError:
        np.save(out, np.array("\ufffd"))
    return out.getvalue()


def bomb():
    """A hundred million zeros, which compress to a few hundred kilobytes."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<f4", "fortran_order": False, "shape": (100_000_000,)}
    )
    return out.getvalue() + bytes(400_000_000)


BOMB = []  # made once


def spoil_npz(r, data, other):
    """Renames, drops, swaps, repeats, damages or compresses members; checksums are correct."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    k, j = r.randrange(len(members)), r.randrange(len(members))
    name, content = members[k]
    method = zipfile.ZIP_STORED
    match r.randrange(12):
        case 0:
            del members[k]
        case 1:
            members[k] = (members[j][0], content)
            members[j] = (name, members[j][1])
        case 2:
            members.append((name, members[j][1]))
        case 3:
            members[k] = (r.choice(["x.npy", "fusedopt.npy", name[:-4], "../" + name]), content)
        case 4:
            method = r.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        case 5:
            with zipfile.ZipFile(io.BytesIO(other)) as file:
                members[k] = (name, file.read(r.choice(file.namelist())))
        case 6 | 7 | 8:
            members[k] = (name, spoil_npy(r, content))
        case 9 if r.random() < 0.02:
            BOMB.extend([] if BOMB else [bomb()])
            members[k], method = (name, BOMB[0]), zipfile.ZIP_DEFLATED
        case _:
            at = next(i for i, (name, _) in enumerate(members) if name == "fusedopt.npy")
            text = spoil_text(r, text_of_npy(members[at][1]))
            members[at] = ("fusedopt.npy", npy_of_text(text))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    data = out.getvalue()
    return spoil_bytes(r, data, other) if r.random() < 0.1 else data


# ---------------------------------------------------------------- .safetensors

DTYPES = [
    "F32",
    "F64",
    "F16",
    "BF16",
    "U8",
    "I8",
    "I16",
    "U16",
    "F8_E4M3",
    "F4",
    "BOOL",
    "C64",
    "X",
    1,
]


def spoil_safetensors(r, data, other):
    """Damages header fields, offsets, lengths or the metadata in the header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = r.choice([k for k in header if k != "__metadata__"])
    entry = header[name]
    match r.randrange(9):
        case 0:
            entry["dtype"] = r.choice(DTYPES)
        case 1:
            entry["shape"] = r.choice([[], [0], [-1], [2**63], [2**32, 2**32], [1] * 70, "x", None])
        case 2:
            entry["data_offsets"] = [r.choice([0, 4, -1, 2**63, len(body)]) for _ in range(2)]
        case 3:
            header[r.choice(["x", "", name + ":extra"])] = header.pop(name)
        case 4:
            body = body[: r.randrange(len(body))] + bytes(r.randrange(9))
        case 5:
            header = spoil_json(r, header)
        case 6:
            twin = r.choice([k for k in header if k != "__metadata__"])
            header[name], header[twin] = header[twin], header[name]
        case _:
            header["__metadata__"]["fusedopt"] = spoil_text(r, header["__metadata__"]["fusedopt"])
    try:
        raw = json.dumps(header).encode()
    except RecursionError:
        raw = b"[" * 100_000
    length = r.choice([0, 2**62, len(raw) + 1, 10**8 + 1]) if r.random() < 0.05 else len(raw)
    data = struct.pack("<Q", length) + raw + body
    return spoil_bytes(r, data, other) if r.random() < 0.1 else data


# ---------------------------------------------------------------- the campaign


class Campaign:
    """Valid files, the optimizers that saved them, and counts of the outcomes of hostile ones."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.made = [make(kind) for kind in range(KINDS)]
        least, _disk.LEAST = _disk.LEAST, 1
        try:
            self.made += [make(kind, self.folder / "state") for kind in range(KINDS)]
        finally:
            _disk.LEAST = least
        self.good = {}
        for kind, (opt, _) in enumerate(self.made):
            for suffix in SUFFIXES:
                path = self.folder / f"good{kind}{suffix}"
                opt.save(path, params=kind % 2 == 0)
                self.good[kind, suffix] = path.read_bytes()
        self.loaded = self.refused = 0
        self.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(self, seed):
        """Makes hostile file number `seed`, and loads it."""
        r = random.Random(seed)
        kind, suffix = r.randrange(2 * KINDS), r.choice(SUFFIXES)
        data, other = self.good[kind, suffix], self.good[r.randrange(2 * KINDS), suffix]
        spoil = spoil_npz if suffix == ".npz" else spoil_safetensors
        data = r.choice([spoil_bytes, spoil, spoil])(r, data, other)
        path = self.folder / f"hostile{suffix}"
        path.write_bytes(data)
        opt, grads = self.made[kind]
        before = contents(opt)
        try:
            opt.load(path, convert=r.random() < 0.2)
        except (ValueError, OSError, TypeError) as exc:
            assert str(path) in str(exc), f"file {seed}: {exc!r} does not name it"
            assert contents(opt) == before, f"file {seed}: refused, but a part of it loaded"
            self.refused += 1
        else:
            self.loaded += 1
            with np.errstate(all="ignore"):
                self.step(seed, opt, grads)
            opt.load(self.folder / f"good{kind}{suffix}")
            for a in opt.param_groups[0]["params"].values():
                a[...] = 1

    def step(self, seed, opt, grads):
        """A step must work, or raise before any write if constants cannot be computed."""
        before = contents(opt)
        try:
            opt.step(grads)
        except (ValueError, OverflowError, ZeroDivisionError) as exc:
            assert contents(opt) == before, f"file {seed}: {exc!r} after a write"

    def check_memory(self):
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.base) << 10
        assert more < MOST_MEMORY, f"loads took {more >> 20} MiB"


def main(files=100_000, seed=0):
    import warnings

    from record import record

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(folder)
        for i in range(files):
            campaign.one(seed + i)
            if i % 5000 == 0:
                print(i, "files,", campaign.refused, "refused", flush=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    record(
        f"{files:,} hostile files: {campaign.refused:,} refused by name, {campaign.loaded:,} "
        f"loaded completely; no crash, no partial write; at most {memory} MiB of memory"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
