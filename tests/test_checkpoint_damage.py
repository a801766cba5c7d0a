"""Damaged and hostile checkpoints: a clean error that names the file, and nothing is changed."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import checksums, put, replace_shard, rewrite, sign, stepped
from watch import memory, refused

import fused_adam
from fused_adam import checkpoint
from fused_adam.checkpoint import CheckpointError
from fused_adam.checkpoint._format import LARGEST_JSON
from fused_adam.checkpoint._manifest import BLOCK

MUTATIONS = int(os.environ.get("FUSED_ADAM_MUTATIONS", "5000"))


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Any, Any]:
    """The folder of a save, and an optimizer of other values with its parameters."""
    shapes = {"W": (3, 5), "b": (2,), "s": ()}
    p, q = ({k: np.full(shape, x, np.float32) for k, shape in shapes.items()} for x in (1, 2))
    first = stepped(fused_adam.AdamW(p, backend="numpy"), p, 2)
    save = checkpoint.save(tmp_path / "run", first, extra={"epoch": 3, "history": [0.5, {"a": None}]})
    return save, q, stepped(fused_adam.AdamW(q, backend="numpy"), q, 1)


def test_a_flipped_bit_anywhere_is_found_and_named(case):
    save, q, opt = case
    before = memory([q, opt])
    rng = random.Random(0)
    for path in sorted(save.iterdir()):
        data = path.read_bytes()
        named = re.escape(f"{path} is damaged" + (": block 0 (" if path.suffix == ".safetensors" else ""))
        for k in range(len(data)):
            put(path, data[:k] + bytes([data[k] ^ 1 << rng.randrange(8)]) + data[k + 1 :])
            with pytest.raises(CheckpointError, match=f"^{named}"):
                checkpoint.load(save, opt)
        put(path, data)
    assert memory([q, opt]) == before
    checkpoint.load(save, opt)


def test_each_damaged_block_is_named(tmp_path):
    p = np.arange(700_000, dtype=np.float32)
    save = checkpoint.save(tmp_path, opt := fused_adam.Adam(p, backend="numpy"))
    shard = save / "shard-00000.safetensors"
    data = shard.read_bytes()
    p[:] = -1
    rng = random.Random(1)
    for _ in range(20):
        hit = sorted(rng.sample(range(len(data)), 2))
        with open(shard, "r+b") as file:
            for k in hit:
                file.seek(k)
                file.write(bytes([data[k] ^ 1 << rng.randrange(8)]))
        blocks = sorted({k // BLOCK for k in hit})
        last = [min((b + 1) * BLOCK, len(data)) for b in blocks]
        lines = [
            f"{shard} is damaged: block {b} (bytes {b * BLOCK} to {end}) does not have its checksum"
            for b, end in zip(blocks, last, strict=True)
        ]
        with refused(re.escape(lines[0]), p, opt, errors=CheckpointError):
            checkpoint.load(tmp_path, opt)
        if blocks[0] > 0:  # the header is needed to go on
            with pytest.raises(CheckpointError) as caught:
                checkpoint.verify(tmp_path)
            assert str(caught.value).splitlines() == lines
        shard.write_bytes(data)
    checkpoint.verify(tmp_path)


# --- what a file may not be -------------------------------------------------------------------------------------------


def shard(save: Path) -> Path:
    return save / "shard-00000.safetensors"


def header(save: Path) -> dict[str, Any]:
    data = shard(save).read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def with_header(save: Path, text: bytes | dict[str, Any], length: int | None = None) -> None:
    """The same tensors under another header, all checksums right."""
    data = shard(save).read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    text += b" " * (-(8 + len(text)) % 64)
    replace_shard(save, (len(text) if length is None else length).to_bytes(8, "little") + text + data[8 + n :])


def tensor(name: str, **change: Any) -> Any:
    return lambda save: with_header(save, {k: v | change if k == name else v for k, v in header(save).items()})


def manifest(**change: Any) -> Any:
    return lambda save: rewrite(save, lambda d: d | change)


def in_shard(**change: Any) -> Any:
    return lambda save: rewrite(save, lambda d: d | {"shards": [d["shards"][0] | change]})


def swapped(save: Path, to: Any) -> None:
    """Another thing in the place of the shard."""
    path = shard(save)
    aside = path.rename(save.parent / "aside")
    to(path, aside)


def renamed(save: Path) -> None:
    with_header(save, {("../../x" if k == "0.p" else k): v for k, v in header(save).items()})


def without(key: str) -> Any:
    return lambda save: rewrite(save, lambda d: {k: v for k, v in d.items() if k != key})


DAMAGE: dict[str, tuple[Any, str]] = {
    "no manifest": (lambda s: (s / "manifest.json").unlink(), "manifest.json is missing"),
    "no shard": (lambda s: shard(s).unlink(), "shard-00000.safetensors is missing"),
    "an empty manifest": (lambda s: (s / "manifest.json").write_bytes(b""), "or of another program"),
    "a long manifest": (lambda s: os.truncate(s / "manifest.json", 2 * LARGEST_JSON + 1), "more than any manifest"),
    "a short shard": (lambda s: os.truncate(shard(s), 100), "has 100 bytes, and should have"),
    "an empty shard": (lambda s: replace_shard(s, b""), "0 bytes are no safetensors file"),
    "a shard of 8 bytes": (lambda s: replace_shard(s, b"\1" + b"\0" * 7), "a header of 1 bytes in a file of 8"),
    "bytes behind the tensors": (
        lambda s: replace_shard(s, shard(s).read_bytes() + bytes(8)),
        r"the header of .* accounts for \d+ bytes of \d+",
    ),
    "a longer shard": (lambda s: os.truncate(shard(s), 10**4), "has 10000 bytes, and should have"),
    "a sparse shard": (lambda s: os.truncate(shard(s), 2**43), "has 8796093022208 bytes, and should have"),
    "a link": (lambda s: swapped(s, lambda path, aside: path.symlink_to(aside)), "is a symbolic link"),
    "a pipe": (lambda s: swapped(s, lambda path, _: os.mkfifo(path)), "is no regular file"),
    "a folder": (lambda s: swapped(s, lambda path, _: path.mkdir()), "is no regular file"),
    "a traversal": (in_shard(file="../aside"), "shard 0 should be called shard-00000.safetensors, not '../aside'"),
    "an absolute name": (in_shard(file="/etc/passwd"), "should be called shard-00000"),
    "a device": (in_shard(file="/dev/zero"), "should be called shard-00000"),
    "a tensor like a path": (renamed, r"has '../../x', of which manifest.json knows nothing"),
    "a size": (in_shard(size=2**62), "should have a checksum of each of its blocks"),
    "a negative size": (in_shard(size=-1), r"size should be an integer in \[0, 2\*\*63\), got -1"),
    "a checksum that is none": (in_shard(crc32="0x12ab\n!"), "should have a checksum of each"),
    "no checksum": (in_shard(crc32=""), "should have a checksum of each"),
    "a version": (manifest(version=2), "is of version 2, but this fused_adam reads 1"),
    "another format": (manifest(format="x"), "is of version 1, but"),
    "a block": (manifest(block=2**40), "block should be 1048576"),
    "t": (manifest(t=2**63), r"t should be an integer in \[0, 2\*\*63\), got 9223372036854775808"),
    "t that is true": (manifest(t=True), "t should be an integer"),
    "hyperparameters": (
        lambda s: rewrite(s, lambda d: d["param_groups"][0].update(betas=0.5)),
        "is damaged: betas should be a pair of numbers, got 0.5",
    ),
    "no groups": (manifest(param_groups=[]), "should have each of 3 parameters in turn"),
    "a group": (manifest(param_groups=[3]), "a group should be an object, got a int"),
    "no extra": (without("extra"), "'extra' should be an object, got None"),
    "no optimizer": (without("optimizer"), "'optimizer' should be a string, got None"),
    "no shards": (manifest(shards=[]), r"has not each element of 0.p once: 0 to 15 are missing"),
    "a second shard": (lambda s: rewrite(s, lambda d: d["shards"].append(d["shards"][0])), "shard 1 should be called"),
    "a list": (lambda s: (s / "manifest.json").write_bytes(sign(b'{"crc32":"00000000",[]}')), "should be JSON, but"),
    "a key twice": (
        lambda s: (s / "manifest.json").write_bytes(sign(b'{"crc32":"00000000","t":1,"t":1}')),
        "should be JSON, but a key comes twice",
    ),
    "depth": (
        lambda s: (s / "manifest.json").write_bytes(sign(b'{"crc32":"00000000","a":' + b"[" * 10**6)),
        "manifest.json is damaged: it should be JSON, but",
    ),
    "digits": (
        lambda s: (s / "manifest.json").write_bytes(sign(b'{"crc32":"00000000","t":' + b"9" * 10**5 + b"}")),
        "should be JSON, but",
    ),
    "not UTF-8": (lambda s: (s / "manifest.json").write_bytes(sign(b'{"crc32":"00000000","\xff":1}')), "JSON, but"),
    "a long header": (lambda s: with_header(s, header(s), 2**63), "a header of 9223372036854775808 bytes in a file of"),
    "a header of nothing": (lambda s: with_header(s, b""), "the header of .* should be JSON, but"),
    "a header that is a list": (lambda s: with_header(s, b"[]"), "should be a JSON object, got a list"),
    "a tensor twice": (lambda s: with_header(s, b'{"a":1,"a":2}'), "a key comes twice"),
    "a tensor that is none": (lambda s: with_header(s, {"0.p": 1}), "it should have dtype, shape and data_offsets"),
    "a dtype": (tensor("0.p", dtype="F31"), "'0.p' in the header of .*: the dtype 'F31' is none of F64"),
    "another dtype": (tensor("0.p", dtype="I8", shape=[60]), r"'0.p' in .* is I8 of shape \(60,\), and should be F32"),
    "a shape": (tensor("0.p", shape=[5, 3]), r"is F32 of shape \(5, 3\), and should be F32 of \(3, 5\)"),
    "a negative shape": (tensor("0.p", shape=[-3, -5]), "each number of a shape should be an integer in .* got -3"),
    "a shape of floats": (tensor("0.p", shape=[3.0, 5]), "each number of a shape should be an integer"),
    "a huge shape": (tensor("0.p", shape=[2**62, 4]), "the size of an array in bytes should be an integer in"),
    "many axes": (tensor("0.p", shape=[1] * 65), "a shape has 65 axes, more than 64"),
    "offsets": (tensor("0.p", data_offsets=[0, 2**62]), "do not hold F32 of shape"),
    "an overlap": (tensor("0.p", data_offsets=[4, 64]), r"begins at byte .*, not at"),
    "three offsets": (tensor("0.p", data_offsets=[0, 30, 60]), "data_offsets should be two integers, got 3"),
    "a gap": (
        lambda s: with_header(s, {k: v for k, v in header(s).items() if k != "1.m"}),
        "begins at byte .*, not at|accounts for",
    ),
    "a part that is missing": (
        lambda s: with_header(s, {("0.p[1:16]" if k == "0.p" else k): v for k, v in header(s).items()}),
        r"'0.p\[1:16\]' in .* is F32 of shape \(3, 5\), and should be F32 of \(15,\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused(damage, message, case):
    save, q, opt = case
    damage(save)
    with refused(message, q, opt, errors=CheckpointError):
        checkpoint.load(save.parent, opt)


def test_a_save_that_is_a_link_is_refused(case):
    save, q, opt = case
    save.rename(save.parent.parent / "aside")
    save.symlink_to(save.parent.parent / "aside")
    with refused("save-00000001 is a symbolic link, or no folder", q, opt, errors=CheckpointError):
        checkpoint.load(save.parent, opt)
    (save.parent / ".lock").unlink()
    (save.parent / ".lock").symlink_to(save.parent.parent / "elsewhere")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        checkpoint.save(save.parent, opt)
    (save.parent / ".lock").unlink()
    again = checkpoint.save(save.parent, opt)  # which neither follows nor removes it
    assert again.name == "save-00000002" and save.is_symlink() and not (save.parent.parent / "elsewhere").exists()
    checkpoint.load(save.parent, opt)


def test_steps_of_rows_beyond_t(tmp_path):
    p = np.ones((4, 2))
    opt = fused_adam.Adam(p, per_row_step=True, backend="numpy")
    opt.step(p.copy())
    save = checkpoint.save(tmp_path, opt)
    data = shard(save).read_bytes()
    at = next(k for k, x in enumerate(np.frombuffer(data, "<i8")) if x == 1) * 8
    replace_shard(save, data[:at] + b"\2" + data[at + 1 :])
    with refused(r"0.row_steps\[0:\] should be in \[0, 1\], the optimizer's t, got 1 to 2", p, opt, errors=ValueError):
        checkpoint.load(tmp_path, opt)


def test_changes_while_it_is_loaded_are_noted(case, monkeypatch):
    save, _, opt = case
    data = shard(save).read_bytes()

    def progress(done: int, total: int) -> None:
        if done == total // 2:
            with open(shard(save), "r+b") as file:
                file.write(bytes(len(data)))

    with pytest.raises(CheckpointError, match="block 0") as caught:
        checkpoint.load(save, opt, progress=progress)
    assert caught.value.__notes__ == ["the optimizer now holds a part of the checkpoint; load again before you use it"]


# --- mutations --------------------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**300, -(2**70), 0.5, -0.0, 1e308, 1e-9,
    "", "p", "F32", "BF16", "U8", "../../etc/passwd", "/dev/zero", "\0", "\ud800", "x" * 5000, "00000000", "AdamW",
    [], {}, [[]], [0], [0, 1, 2], [-1], [2**62] * 40, [[[[[]]]]], {"params": []}, {"dtype": "F64", "shape": [2**40]},
]  # fmt: skip


def mutated_document(d: Any, rng: random.Random) -> Any:
    """A copy with some nodes replaced, removed, doubled or exchanged."""
    d = json.loads(json.dumps(d))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        nodes = [(parent, key) for parent, key in walk(d)]
        parent, key = rng.choice(nodes)
        how = rng.randrange(5)
        if how < 2:
            parent[key] = json.loads(json.dumps(rng.choice(JUNK)))
        elif how == 2:
            del parent[key]
        elif how == 3:
            other, name = rng.choice(nodes)
            copied = json.loads(json.dumps(other[name])) if in_range(other, name) else None
            parent[key] = copied
        elif isinstance(parent, list):
            parent.append(json.loads(json.dumps(parent[key])))
        else:
            parent[rng.choice(("0.p", "2.v", "0.p[0:3]", "0.p[3:15]", "params", "t", "x"))] = parent[key]
        if not isinstance(d, dict) or not d:
            return d
    return d


def in_range(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def walk(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from walk(node[key])


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 1, 2, 8, 64, len(data))))
    junk = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
    edge = rng.choice((b"\xff" * 8, b"\0" * 8, b"9" * 30, b"[" * 3000, b"{" * 2000, b'"', b",", b"-", b"1e999", b"NaN"))
    bit = bytes([data[a % len(data)] ^ 1 << rng.randrange(8)])
    return rng.choice(
        (
            data[:a] + data[b:],
            data[:a] + junk + data[a:],
            data[:a] + edge + data[b:],
            data[:b] + data[a:],
            data[:a],
            data[: a % len(data)] + bit + data[a % len(data) + 1 :],
        )
    )


def mutate(save: Path, original: dict[str, bytes], rng: random.Random) -> None:
    """Write the files of a save anew, one of them changed; mostly with checksums that say that all is well."""
    for name, data in original.items():
        put(save / name, data)
    text, data = original["manifest.json"], original["shard-00000.safetensors"]
    n = int.from_bytes(data[:8], "little")
    how = rng.randrange(5)
    if how == 0:
        d = json.loads(text)
        del d["crc32"]
        changed = json.dumps(mutated_document(d, rng), separators=(",", ":")).encode()
        put(save / "manifest.json", sign(b'{"crc32":"00000000",' + changed[1:]))
    elif how == 1:
        start = len(b'{"crc32":"00000000",')
        put(save / "manifest.json", sign(text[:start] + mutated_bytes(text[start:], rng)))
    elif how == 2:
        new = json.dumps(mutated_document(json.loads(data[8 : 8 + n]), rng), separators=(",", ":")).encode()
        new += b" " * (-(8 + len(new)) % 64)
        replace_shard(save, len(new).to_bytes(8, "little") + new + data[8 + n :])
    elif how == 3:
        new = mutated_bytes(data[: 8 + n], rng)
        replace_shard(save, new + data[8 + n :])
    else:
        name = rng.choice(sorted(original))
        put(save / name, mutated_bytes(original[name], rng))


def peak() -> int:
    """The most memory that this process has had since `forget`, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the largest memory in use")
def test_mutations_give_clean_errors(case):
    """Each loads what fits, or is refused by a ValueError and changes nothing; none takes memory that it names."""
    save, q, opt = case
    original = {path.name: path.read_bytes() for path in save.iterdir()}
    rng = random.Random(2)
    checkpoint.load(save, opt)
    untouched = memory([q, opt])
    loaded, errors = 0, set()
    forget()
    at_first = peak()
    for k in range(MUTATIONS):
        mutate(save, original, rng)
        try:
            checkpoint.load(save, opt)
            loaded += 1
        except FileNotFoundError:
            raise AssertionError(f"mutation {k} was not found") from None
        except ValueError as error:
            errors.add(re.sub(r"[\d'\"].*", "", str(error).replace(str(save), "")))
            assert memory([q, opt]) == untouched, k
        else:
            for name, data in original.items():
                put(save / name, data)
            checkpoint.load(save, opt)
    assert loaded < MUTATIONS / 4 and len(errors) > 15
    assert peak() - at_first < 64 * 2**20


def test_the_mutations_do_sign(case):
    """Or all of them would fail at the first checksum."""
    save, _, opt = case
    data = shard(save).read_bytes()
    replace_shard(save, data)
    rewrite(save, lambda d: d["extra"].update(epoch=4))
    assert checkpoint.load(save, opt)["epoch"] == 4
    assert checksums(b"a" * (BLOCK + 1)) == checksums(b"a" * BLOCK) + checksums(b"a")
