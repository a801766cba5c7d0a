"""A benchmark's file drawn, and printed again."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET

import pytest
from conftest import require
from fused_adam.bench import plot, show
from fused_adam.bench.results import Report, Row, save

from fused_adam.cli import main

PNG = b"\x89PNG\r\n\x1a\n"
FIELD = (("fused_adam numba", "ours", 1.0), ("torch fused", "peer", 0.9), ("memory roof", "roof", 1.25))
SIZES = (2**10, 2**16, 2**20, 2**25)


def row(candidate, kind, speed, size, dtype="float32", mode="e2e", tensors=1, **more):
    """Its median is exactly at `speed` GB/s."""
    each = 56 if dtype == "float64" else 28
    seconds = each * size / (speed * 1e9)
    backend = "numba" if kind == "ours" else None
    samples = [seconds * x for x in (0.9, 1.0, 1.1, 1.0, 1.0)]
    return Row(candidate, kind, backend, "adamw", dtype, mode, size, tensors, each, samples=samples, **more)


def report(field=FIELD, sizes=SIZES, dtypes=("float32",), modes=("e2e",), device="AMD EPYC", rates=None, **more):
    rows = [row(*c, size, d, m, **more) for d in dtypes for m in modes for size in sizes for c in field]
    rates = {"copy": 21.3e9, "roof": 23.4e9, "peak": 51.2e9} if rates is None else rates
    return Report(device, "cpu", "2026-11-21T11:00", "0123456789abcdef", ["bench", "run"], {}, rates, rows)


TWELVE = tuple((f"candidate {k}", "peer", 1.0 + k) for k in range(12))
DRAWN = {
    "usual": [report()],
    "one size": [report(sizes=SIZES[:1])],
    "one candidate": [report(FIELD[:1])],
    "one point": [report(FIELD[:1], SIZES[:1], rates={})],
    "twelve": [report(TWELVE)],
    "two dtypes and modes": [report(dtypes=("float32", "float64"), modes=("e2e", "cold"))],
    "two devices": [report(), report(device="NVIDIA H200")],
    "the same device twice": [report(), report()],
    "no power of two": [report(sizes=(1000, 1_234_567))],
    "many tensors": [report(tensors=200)],
}


# --- plot -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, with what is in them."""
    figure = require("matplotlib.figure").Figure
    found = []

    def savefig(self, path, original=figure.savefig):
        found.append(self)
        original(self, path)

    monkeypatch.setattr(figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_hidden_or_clipped(figures, tmp_path, name):
    reports = DRAWN[name]
    plot.draw(reports, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    (figure,) = figures
    renderer, legend = figure.canvas.get_renderer(), figure.legends[0]
    box = legend.get_window_extent(renderer)
    assert all(box.x0 >= axes.get_window_extent(renderer).x1 for axes in figure.axes)  # beside, not over
    drawn, room = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= room[0] and drawn.y1 <= room[1]
    for axes in figure.axes:
        labels = [label for label in axes.get_yticklabels(which="both") if label.get_text()]
        assert sum(axes.get_ylim()[0] <= label.get_position()[1] <= axes.get_ylim()[1] for label in labels) >= 2
    labels = [t.get_text() for t in legend.get_texts()]
    assert len(set(labels)) == len(labels) == len(plot.series(reports)) + len(plot.rates(reports))


def test_what_is_drawn(figures, tmp_path):
    plot.draw([report()], tmp_path / "x.svg")
    ET.parse(tmp_path / "x.svg")
    left, right = figures[0].axes
    assert left.get_ylabel() == "achieved GB/s" and right.get_ylabel() == "time of a step (us)"
    assert left.get_xlabel() == right.get_xlabel() == "parameters"
    assert figures[0]._suptitle.get_text() == "adamw, float32, AMD EPYC; 28 bytes a parameter"
    speeds = {c.get_label(): c.lines[0].get_xydata() for c in left.containers}
    assert set(speeds) == {name for name, *_ in FIELD}
    assert speeds["torch fused"] == pytest.approx(speeds["torch fused"] * 0 + [[n, 0.9] for n in SIZES])
    (times,) = [c.lines[0].get_ydata() for c in right.containers if c.get_label() == "fused_adam numba"]
    assert times == pytest.approx([28 * n / 1e3 for n in SIZES])
    lines = {line.get_label(): line.get_ydata()[0] for line in left.lines if "GB/s" in str(line.get_label())}
    expected = {"copy rate 21.3 GB/s": 21.3, "stream roof 23.4 GB/s": 23.4, "theoretical peak 51.2 GB/s": 51.2}
    assert lines == pytest.approx(expected)
    labels = [t.get_text() for t in left.get_xticklabels()]
    assert labels[0] == "$2^{10}$" and len(labels) <= 9


def test_only_what_differs_is_in_a_label():
    labels = [s.label for s in plot.series(DRAWN["two dtypes and modes"])]
    assert labels[0] == "fused_adam numba, float32, e2e" and labels[-1] == "memory roof, float64, cold"
    assert [s.label for s in plot.series(DRAWN["two devices"])][-1] == "memory roof, NVIDIA H200"
    assert [s.label for s in plot.series(DRAWN["the same device twice"])][-1] == "memory roof, file 2"


def command(capsys, *argv):
    status = main(["bench", *map(str, argv)])
    return status, *capsys.readouterr()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.json"
    save(path, report())
    return path


def test_the_command_draws(capsys, tmp_path, monkeypatch, file):
    require("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert command(capsys, "plot", file) == (0, "drawn in run.png\n", "")
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)
    assert command(capsys, "plot", file, file, "-o", "both.svg")[0] == 0
    assert "<svg" in (tmp_path / "both.svg").read_text()


def test_in_the_terminal(capsys, file):
    require("plotext")
    status, out, err = command(capsys, "plot", file, "--term")
    lines = out.splitlines()
    assert status == 0 and err == "" and "\x1b" not in out
    assert max(map(len, lines)) <= 80
    assert {"2^10", "2^22"} <= set(out.split()) and "copy rate 21.3 GB/s" in out
    assert "a  fused_adam numba" in lines and any("a" in line and line[4:5] in "│┤" for line in lines[2:20])


@pytest.mark.parametrize(
    ("target", "said"), [("x.pdf", ".png or .svg"), ("no/x.png", "no folder"), ("x.png", "cannot be written")]
)
def test_where_a_plot_cannot_go(capsys, tmp_path, monkeypatch, file, target, said):
    require("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").mkdir()
    status, _, err = command(capsys, "plot", file, "-o", target)
    assert status == 2 and said in err


def test_nothing_to_draw(capsys, tmp_path, monkeypatch):
    require("matplotlib")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "empty.json", report(sizes=()))
    assert command(capsys, "plot", "empty.json")[0] == 1


# --- show -------------------------------------------------------------------------------------------------------------


def noted():
    """As after an interrupted run on a busy machine, with a peer that was not there."""
    made = report(sizes=(2**10, 2**20))
    made.rows[0].refused, made.rows[0].disturbed, made.interrupted = 7, 2, True
    made.rows[0].launches, made.rows[0].host = 1, [9e-6, 9e-6]
    for size in (2**10, 2**20):
        made.rows.append(Row("optax", "peer", None, "adamw", "float32", "e2e", size, 1, 28, status="skipped: no optax"))
    made.rows.append(Row("other", "peer", None, "adamw", "float32", "e2e", 2**20, 1, 28, status="wrong: p is off"))
    return made


def test_tables(capsys):
    show.tables(noted())
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "adamw, float32, 2^20, end to end; 28 bytes a parameter" in lines
    ours = next(line for line in lines if line.startswith("fused_adam numba"))
    assert ours.split()[2:] == "28.67 us 0 % 1.0 80 % 1 9.0 1.11".split()
    assert lines[-7:-3] == [
        "optax: skipped: no optax",
        "other at 2^20: wrong: p is off",
        "others used the machine: 7 samples refused, 2 of 30 kept all the same",
        "interrupted: this is as much as there was",
    ]
    assert "launches" not in lines[lines.index("adamw, float32, 2^20, end to end; 28 bytes a parameter") + 1]


def test_markdown_and_csv(capsys, tmp_path):
    path = tmp_path / "run.json"
    save(path, noted())
    status, out, _ = command(capsys, "show", path, "--md")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert status == 0 and len(table) == 2 + 6 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith(
        "| fused_adam numba | numba | 2^10 | float32 | adamw | e2e | 28.67 us | 0 % | 1.0 | 80 % |"
    )
    status, out, _ = command(capsys, "show", path, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and len(rows) == 9
    assert float(rows[0]["median_s"]) == 28.672e-6 and float(rows[0]["of_roof"]) == pytest.approx(0.8)
    assert rows[-1]["status"] == "wrong: p is off" and rows[-1]["median_s"] == ""
    status, out, _ = command(capsys, "show", path)
    show.tables(noted())
    assert status == 0 and out == capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.500 s"),
        (0.0125, "12.50 ms"),
        (9.99e-4, "999.0 us"),
        (1e-6, "1.000 us"),
        (5e-9, "5.000 ns"),
        (2e-10, "0.200 ns"),
    ],
)
def test_durations(seconds, text):
    assert show.duration(seconds) == text


def test_without_a_roof_row_the_rate_counts():
    (case,) = show.lines(report(FIELD[:1], SIZES[:1]))
    assert case[0].of_roof == pytest.approx(1 / 23.4) and case[0].over_peer is None
    (case,) = show.lines(report(FIELD[:1], SIZES[:1], rates={}))
    assert case[0].of_roof is None
