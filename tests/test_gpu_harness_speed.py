"""`make gpu` without a GPU: its clocks on pretended time, its record, its targets and its table."""

from __future__ import annotations

import json

import pytest
from fused_adam.bench.gpu import clock, record, session, speed, summary
from fused_adam.bench.gpu.peers import Tensors
from fused_adam.bench.gpu.worker import Skipped

ABOUT = {"device": {"name": "NVIDIA H200"}, "versions": {}, "installed": "no"}


# --- clocks -----------------------------------------------------------------------------------------------------------


class Time:
    """A host and a device whose clocks only these calls move."""

    def __init__(self, spins: bool = True) -> None:
        self.host = self.device = 0.0
        self.spins = spins
        self.flushes = 0

    def now(self):
        return self.host

    def work(self, seconds):
        self.device = max(self.device, self.host) + seconds

    def record(self):
        self.work(0)
        return self.device

    def elapsed(self, start, end):
        return end - start

    def synchronize(self):
        self.host = max(self.host, self.device)

    def spin(self, seconds):
        self.work(seconds if self.spins else 0)

    def flush(self):
        self.flushes += 1
        self.work(1e-4)

    def call(self, host, device):
        def call():
            self.host += host
            self.work(device)

        return call


COSTS = {"light": (1e-5, 2e-3), "heavy": (4e-4, 1e-5)}  # seconds of the host and of the device


def test_device_times_leave_the_host_out():
    for cold in (False, True):
        t = Time()
        found = clock.device_times(t, {name: t.call(*cost) for name, cost in COSTS.items()}, 5, cold=cold)
        assert found == {name: pytest.approx([device] * 5) for name, (_, device) in COSTS.items()}
        assert t.flushes == (10 if cold else 0)
    t = Time(spins=False)
    found = clock.device_times(t, {name: t.call(*cost) for name, cost in COSTS.items()}, 5, cold=False)
    assert max(found["heavy"]) > 1e-4, "the spin is what keeps the host out"


def test_wall_and_host_times():
    t = Time()
    calls = {name: t.call(*cost) for name, cost in COSTS.items()}
    found = clock.wall_times(t, calls, 3)
    assert found == {name: pytest.approx([max(cost)] * 3, rel=0.03) for name, cost in COSTS.items()}
    found = clock.host_times(t, calls, 3)
    assert found == {name: pytest.approx([host] * 3) for name, (host, _) in COSTS.items()}


def pretended(t, cost, built):
    def build(x):
        built.append(x)
        return t.call(*cost)

    return build


def test_a_race():
    t, built = Time(), []

    def absent(x):
        raise RuntimeError("no kernel image")

    candidates = speed.Candidates(
        steps={"cupy": pretended(t, (1e-5, 1e-3), built), "numba-cuda": absent},
        bounds={"roof": pretended(t, (1e-5, 9.8e-4), []), "copy": absent},
        graphs={
            "cupy": (pretended(t, (0, 1e-3), []), lambda calls: lambda: [call() for call in calls]),
            "torch fused": (pretended(t, (0, 1), []), absent),
        },
    )
    found = speed.race(t, Tensors(1, 2**20), candidates, lambda: 2**60, 5)
    assert len(built) == found["sets"] == 8 and t.flushes
    assert found["absent"] == dict.fromkeys(
        ("numba-cuda", "copy", "torch fused, graph"), "RuntimeError: no kernel image"
    )
    samples = found["samples"]
    assert set(samples["device"]) == {"cupy", "roof"} and samples["device"]["roof"] == pytest.approx([9.8e-4] * 5)
    assert samples["end to end"] == {"cupy": pytest.approx([1e-3] * 5, rel=0.02)}
    assert samples["graph"] == {"cupy": pytest.approx([1e-3] * 5)}
    with pytest.raises(Skipped, match="it needs 8 GiB, and 0 are free"):
        speed.race(t, Tensors(1, 2**10), candidates, lambda: 1000, 5)


# --- the record and its table -----------------------------------------------------------------------------------------


def speed_entry(x, ours, fused, roof=0.98, rounds=5):
    """As of a race: seconds of ours and of torch's in every way, and the share of the roof."""
    device = {"cupy": ours, "cupy list": ours, "numba-cuda": 2 * ours, "torch fused": fused, "roof": roof * ours}
    device["copy"] = 0.95 * ours * min(1, 2**32 / (14 * x.elements))
    ways = {"device": device, "end to end": device, "graph": {"cupy": ours, "torch fused": fused}}
    samples = {
        way: {n: [s * (1 + k / 100) for k in range(rounds)] for n, s in some.items()} for way, some in ways.items()
    }
    return {
        "part": "speed", "shard": "0/1", "case": speed.name_of(x), "status": "ok", "elements": x.elements, "sets": 1,
        "tensors": x.count, "groups": x.groups, "copied": min(14 * x.elements, 2**32), "samples": samples,
        "absent": {"torch foreach": "RuntimeError: why not"},
    }  # fmt: skip


def full(slow=()):
    """Entries of a whole run; AdamW is slower than torch's at the sizes in `slow`."""
    shapes = [Tensors(1, n) for n in speed.SIZES] + [Tensors(c, n, g) for c, n in speed.MANY for g in (1, 8)]
    entries = [speed_entry(x, 1e-3, 0.9e-3 if speed.name_of(x) in slow else 1.2e-3) for x in shapes]
    kinds = {"flat buffer of 20": 12e-6, "list of 1,000": 80e-6 if "host" in slow else 39e-6}
    values = {"random": 1.0, "zero gradients": 1.04, "subnormal": 1.01}
    stored = {"torch fused": 2.7, "12 bytes": 1.2, "bf16": 1.3, "copy, 12 bytes": 1.1, "copy, bf16": 1.24}
    stored |= {f"{kind}, {v}": 1.4 for kind in ("12 bytes", "bf16") for v in ("zeros", "subnormal")}
    for case, way, times in (
        ("host time", "host", kinds),
        ("values", "device", values),
        ("stored", "device", stored),
    ):
        samples = {way: {name: [s] * 3 for name, s in times.items()}}
        entries.append({"part": "speed", "shard": "0/1", "case": case, "status": "ok", "samples": samples})
    for seconds in (1.2, 1.4, 9.0):
        starts = {"empty": {"first step": seconds}, "full": {"first step": seconds / 10}}
        case = {"case": f"cupy, run {seconds}", "backend": "cupy", "starts": starts, "status": "ok"}
        entries.append({"part": "first-step", "shard": "0/1", **case})
    for part in ("bits-cupy", "bits-numba-cuda"):
        entries += [{"part": part, "shard": "0/1", "case": f"{k}", "status": "ok"} for k in range(200)]
        entries.append({"part": part, "shard": "0/1", "case": "long", "status": "dropped", "reason": "no time"})
    return entries


def test_targets():
    found = summary.targets(record.collect(ABOUT, full()))
    assert len(found) == 14 and [t for t in found if not t.passed] == []
    by_name = {t.name: t for t in found}
    assert by_name["of the roof, 2^26 up"].measured == pytest.approx(0.98)
    assert by_name["of the copy rate, 2^26 up"].measured == pytest.approx(0.95)
    assert by_name["torch fused, many, list"].measured == pytest.approx(1.2)
    assert (
        by_name["first step, empty cache"].measured == 1.4 and by_name["zeros, subnormals to random"].measured == 1.04
    )
    assert by_name["12 bytes over torch fused"].measured == pytest.approx(2.25)
    assert by_name["bf16 of the copy rate"].measured == pytest.approx(1.24 / 1.3)
    assert by_name["stored zeros, subnormals"].measured == pytest.approx(1.4 / 1.2)
    slow = ("2^10", "2^24", "1,000 x 2^16", "host")
    missed = {t.name: t.missed for t in summary.targets(record.collect(ABOUT, full(slow))) if not t.passed}
    assert missed == {
        "torch fused, end to end": ("2^24", "2^10"),
        "torch fused, many, flat": ("1,000 x 2^16",),
        "torch fused, many, list": ("1,000 x 2^16",),
        "torch fused, graph, 2^22 up": ("2^24", "1,000 x 2^16"),
        "step(), 1,000 arrays": ("cupy",),
    }


def test_the_table(capsys):
    for slow in ((), ("2^30", "1,000 x 2^16, 8 groups", "host")):
        found = record.collect(ABOUT, full(slow))
        summary.show(found, summary.targets(found))
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80, out
        assert ("MISS (1)" in out) == bool(slow)
        for text in ("2^28", "200 x 2^20, 8 groups", "98 %", "95 %", "1.20", "of the roof, 2^26 up", "bits numba-cuda"):
            assert text in out, out
        assert "torch foreach: RuntimeError: why not" in out
    json.dumps(found)


@pytest.mark.parametrize("n", [0, 1, 3, 20])
def test_any_part_of_a_record_makes_a_table(n, capsys):
    found = record.collect(ABOUT, full()[:n])
    targets = summary.targets(found)
    summary.show(found, targets)
    out = capsys.readouterr().out
    assert "cases (NVIDIA H200)" in out and ("not measured" in out) == (n < 20)
    assert len(targets) == 14 and (n > 0 or not any(t.passed for t in targets))
    json.dumps(summary.as_json(targets), allow_nan=False)


def test_only_the_medians_are_committed():
    found = record.collect(ABOUT, full())["speed"]["cases"]["2^28"]
    assert found["device"]["cupy"] == {"median_s": 1.02e-3, "quartiles_s": [1.01e-3, 1.03e-3], "samples": 5}
    assert "samples" not in found and found["ratios"]["cupy over torch fused, end to end"] == pytest.approx(1.2)
    assert found["copied bytes a second"] == pytest.approx(28 * 2**28 / (0.95 * 1.02e-3))


def test_files_stay_small(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"begin" + b"x" * 10_000 + b"end")
    session.trim(path, 1000)
    text = path.read_bytes()
    assert len(text) < 1000 and text.startswith(b"begin") and text.endswith(b"end") and b"[...]" in text
    session.trim(path, 1000)
    assert path.read_bytes() == text
    assert record.slug("NVIDIA H200 NVL (80GB)") == "nvidia-h200-nvl-80gb" and record.slug("") == "gpu"
