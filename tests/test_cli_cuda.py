"""The commands and a GPU: on one that is not there (see fake_cupy), and what they say without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import fake_cupy
import fake_numba
import numpy as np
import pytest
from cli_cases import COMMAND, run, run_json
from conftest import require

import fused_adam
from fused_adam._cuda_arrays import no_device
from fused_adam.backends import ON_GPU, reason
from fused_adam.cli import info, oracle, verify

NO_GPU = pytest.mark.skipif(not no_device(), reason="there is a GPU")
CUPY = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")


@pytest.fixture
def cupy(monkeypatch):
    with fake_cupy.installed(monkeypatch) as module:
        fake_cupy.allow_arithmetic(monkeypatch)
        yield module


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "task", [["regression", "--steps", 30], ["digits", "--steps", 50, "--rule", "lion"]], ids=lambda task: task[0]
)
def test_training_prints_the_numbers_of_the_cpu(cupy, capsys, task, dtype):
    """Of the fake, whose arithmetic is NumPy's."""
    argv = ["train", *task, "--dtype", dtype]
    expected = run_json(capsys, *argv, "--backend", "numpy")[1]
    assert not fake_cupy.launches and expected["device"] == "cpu"
    status, result = run_json(capsys, *argv, "--device", "cuda")
    assert status == 0
    assert (result["device"], result["backend"], expected["backend"]) == ("cuda", "cupy", "numpy")
    assert [result[k] for k in ("losses", "points", "steps")] == [expected[k] for k in ("losses", "points", "steps")]
    assert [name for name, *_ in fake_cupy.launches] == [f"{result['rule']}_f{dtype[-2:]}"] * result["steps"]

    table, on_gpu = run(capsys, *argv), run(capsys, *argv, "--device", "cuda")
    assert on_gpu[:2] == table[:2]
    assert "backend cupy" in on_gpu[2]


def test_losses_are_read_a_hundred_at_a_time(cupy, capsys):
    assert run(capsys, "train", "regression", "--steps", 2000, "--batch", 5, "--device", "cuda")[0] == 0
    assert fake_cupy.reads == [100, 100, 1] * 10  # losses, losses, and that of all samples for each row of the table


def test_a_training_that_diverges_ends_where_it_does_on_the_cpu(cupy, capsys):
    argv = ["train", "regression", "--rule", "sgd", "--lr", 1e6]
    status, expected = run_json(capsys, *argv)
    assert status == 1 and 1 < expected["steps"] < 100
    status, result = run_json(capsys, *argv, "--device", "cuda")
    assert status == 1
    assert result["losses"] == expected["losses"] and result["points"] == expected["points"] == []


def test_training_on_numba_cuda_keeps_cupys_arrays(monkeypatch, capsys):
    require("numba")
    with fake_numba.installed(monkeypatch), monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake_cupy._module())
        fake_cupy.allow_arithmetic(patch)
        argv = ["train", "regression", "--steps", 20]
        expected = run_json(capsys, *argv)[1]
        status, result = run_json(capsys, *argv, "--device", "cuda", "--backend", "numba-cuda")
    assert (status, result["backend"]) == (0, "numba-cuda")
    assert result["losses"] == expected["losses"]
    assert len(fake_cupy.launches) == 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--backend", "cupy"], "'cupy' steps over arrays on a GPU; add --device cuda"),
        (["--device", "cuda", "--backend", "numba"], "'numba' steps over arrays in host memory; leave out --device"),
        (["--device", "cuda", "--backend", "numpy"], "or name cupy or numba-cuda"),
    ],
)
def test_a_backend_that_does_not_fit_the_device(cupy, capsys, argv, message):
    status, out, err = run(capsys, "train", "regression", *argv)
    assert (status, out) == (3, "")
    assert message in err


def test_what_fails_on_the_gpu_is_told(cupy, capsys, monkeypatch):
    def broken(*_, **__):
        raise fake_cupy.CompileException("error: no such instruction")

    monkeypatch.setattr(cupy, "RawModule", broken)
    for argv in (["train", "regression", "--device", "cuda"], ["verify", "--backend", "cupy", "--size", 5]):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (3, "")
        assert re.search(r"compiling \w+_f32 failed:\nerror: no such instruction", err)


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_verify_finds_a_gpu_right(monkeypatch, capsys, backend):
    require("numba")
    with (fake_cupy if backend == "cupy" else fake_numba).installed(monkeypatch):
        status, report = run_json(capsys, "verify", "--backend", backend, "--seed", 3, "--size", 700)
        assert status == 0
        assert report["right"] and report["backends"] == ["numpy", backend]
        assert {r["rule"].split(",")[0] for r in report["results"]} == set(oracle.RULES)
        assert len(fake_cupy.launches) == 2 * len(report["results"])


def test_verify_takes_every_backend_there_is(cupy, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba_cuda", None)  # the real one, where it is installed, sees no GPU
    status, out, _ = run(capsys, "verify", "--seed", 3, "--size", 300)
    available = [name for name, ok, _ in fused_adam.backends() if ok and name != "numpy"]
    assert status == 0 and "cupy" in available
    assert f"bits: bit-identical on numpy, {', '.join(available)}" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("right", "wrong", "rules"),
    [
        (
            "v = (v - c2 * v) + (c2 * g) * g;",
            "v.x = std::fma((c2 * g).x, g.x, (v - c2 * v).x);",
            ["adam"],
        ),  # contracted
        ("pass<Number, 2 * UNROLL>(s, g, c, middle, hi, unmoved);", "", ["adam", "lion"]),  # without its tail
    ],
)
def test_verify_catches_a_wrong_kernel(cupy, capsys, monkeypatch, right, wrong, rules):
    class Wrong(fake_cupy.RawModule):
        def __init__(self, *, code, options):
            assert right in code
            super().__init__(code=code.replace(right, wrong), options=options)

    two = [case for case in verify._cases() if case.name in ("adam", "lion")]
    monkeypatch.setattr(verify, "_cases", lambda: two)
    monkeypatch.setattr(cupy, "RawModule", Wrong)
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    status, out, _ = run(capsys, "verify", "--seed", 3, "--size", 3001)
    assert status == 4
    different = re.findall(r"^(\w+) +(float..) .* DIFFERENT: cupy$", out, re.MULTILINE)
    assert different == [(rule, dtype) for rule in rules for dtype in ("float32", "float64")]
    assert re.findall(r"^WRONG: (\w+), (float..); run again with --seed 3 --size 3001$", out, re.MULTILINE) == different


def test_verify_catches_a_copy_that_loses_a_byte(cupy, capsys, monkeypatch):
    """Not only kernels: whatever lies between the caller's arrays and the result."""
    right = fake_cupy.ndarray.get

    def wrong(a):
        host = right(a)
        if host.size:
            host.reshape(-1).view(np.uint8)[0] ^= 1
        return host

    monkeypatch.setattr(fake_cupy.ndarray, "get", wrong)
    status, report = run_json(capsys, "verify", "--backend", "cupy", "--seed", 3, "--size", 50)
    assert status == 4
    assert not any(r["identical"]["cupy"] for r in report["results"])


# --- info, kernel -----------------------------------------------------------------------------------------------------

DRIVER = """
#include <cstring>
#define API extern "C" int
API cuInit(unsigned) { return FAILURE; }
API cuDriverGetVersion(int* a) { *a = 13020; return 0; }
API cuDeviceGetCount(int* a) { *a = 2; return 0; }
API cuDeviceGet(int* a, int k) { *a = 40 + k; return 0; }
API cuDeviceGetName(char* a, int, int device) { std::strcpy(a, device == 40 ? "NVIDIA One" : "NVIDIA Two"); return 0; }
API cuDeviceTotalMem_v2(unsigned long* a, int device) { *a = (device - 39) * (80ul << 30); return 0; }
API cuDeviceGetAttribute(int* a, int which, int) { *a = which == 75 ? 12 : 1; return 0; }
"""


@pytest.fixture
def driver(tmp_path):
    """Environment of a process with an NVIDIA driver whose cuInit returns what it is called with."""

    def build(failure):
        if not shutil.which("g++"):
            pytest.skip("needs g++")
        (tmp_path / "driver.cpp").write_text(DRIVER)
        command = ["g++", "-shared", "-fPIC", f"-DFAILURE={failure}", "-o", tmp_path / "libcuda.so.1"]
        subprocess.run([*command, tmp_path / "driver.cpp"], check=True)
        return os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}

    return build


def command(*argv, env=None):
    done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


def test_info_asks_the_driver_for_its_gpus(driver):
    status, out, _ = command("info", env=driver(0))
    assert status == 0
    assert re.search(r"^driver +(.*, )?for CUDA 13\.2$", out, re.MULTILINE)
    assert re.search(r"^GPU 0 +NVIDIA One, 80\.0 GiB, compute capability 12\.1$", out, re.MULTILINE)
    assert re.search(r"^GPU 1 +NVIDIA Two, 160\.0 GiB, compute capability 12\.1$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


@NO_GPU
def test_without_a_gpu_info_imports_no_cuda_package_and_says_what_is_missing():
    code = (
        "import json, sys; from fused_adam.cli import info; report = info.collect();"
        "print(json.dumps([report['backends'][:2], report['gpu'], sorted({'cupy', 'numba_cuda'} & set(sys.modules))]))"
    )
    backends, gpu, imported = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert gpu == {} and imported == []
    for b, package in zip(backends, ("cupy", "numba-cuda"), strict=True):
        assert not b["available"]
        missing = f"{package} is not installed|no NVIDIA driver is installed|the NVIDIA driver finds no GPU"
        assert re.match(missing, b["reason"])
        assert re.match(r"pip install 'fused-adam\[|install one|check nvidia-smi", b["fix"])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CUPY_CACHE_DIR": "{}/named"}, "2 compiled functions, 0.0 MB, under {}/named (CUPY_CACHE_DIR)"),
        ({"HOME": "{}"}, "1 compiled functions, 0.0 MB, under {}/.cupy/kernel_cache"),
        ({"CUPY_CACHE_IN_MEMORY": "1"}, "in memory only, compiled anew in each process (CUPY_CACHE_IN_MEMORY)"),
    ],
)
def test_info_says_where_cupy_keeps_its_kernels(monkeypatch, tmp_path, variables, expected):
    for path in ("named/a.cubin", "named/b.cubin", "named/b.txt", ".cupy/kernel_cache/c.cubin"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    for name in ("CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.setattr(info, "_version", lambda name: "14.2.0" if name == "cupy-cuda13x" else None)
    report = info.collect()
    assert report["versions"]["cupy"] == "14.2.0"
    assert report["caches"]["cupy kernels"] == expected.format(tmp_path)


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_kernel_prints_all_that_cupy_compiles(cupy, capsys, rule):
    for dtype, argv in (("float32", []), ("float64", ["--dtype", "float64"])):
        status, out, _ = run(capsys, "kernel", rule, "--full", *argv)
        assert status == 0
        p, g = (cupy.zeros(3, dtype) for _ in range(2))
        (fused_adam.AdamW if rule == "adamw" else fused_adam.Lion)([p]).step([g])
        assert fake_cupy.compiled[-1] == out
    assert run(capsys, "kernel", rule, "--dtype", "float64")[:2] == (2, "")


def test_kernel_prints_any_format(cupy, capsys):
    argv = "--full --dtype bfloat16 --state-dtype int8 --master split8 --stochastic-rounding".split()
    status, out, _ = run(capsys, "kernel", "adamw", *argv)
    p, g = (cupy.zeros(3, np.uint16) for _ in range(2))
    how = {"state_dtype": "int8", "master": "split8", "stochastic_rounding": True}
    fused_adam.AdamW([p], dtype="bfloat16", **how).step([g])
    assert status == 0 and fake_cupy.compiled[-1] == out
    argv = "--full --dtype bfloat16 --gradient-dtype float32".split()
    status, out, _ = run(capsys, "kernel", "lion", *argv)
    fused_adam.Lion([p], dtype="bfloat16").step([cupy.zeros(3, np.float32)])
    assert status == 0 and fake_cupy.compiled[-1] == out


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("adamw --master split8", "formats need --full"),
        ("rmsprop --full --dtype bfloat16", "the rule rmsprop is not offered with bfloat16 parameters"),
        ("adamw --full --dtype float16 --master split8", "float16 parameters .* is not offered; there are"),
        ("adamw --full --gradient-dtype bfloat16", "float32 parameters alone have float32 gradients"),
        ("adamw --full --dtype bfloat16 --gradient-dtype float16", "bfloat16 parameters with float16 gradients"),
    ],
)
def test_kernel_refuses_formats_that_are_not_offered(capsys, argv, why):
    status, out, said = run(capsys, "kernel", *argv.split())
    assert (status, out) == (2, "") and re.search(why, said)


# --- without a GPU ----------------------------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize(
    "argv",
    [
        ["train", "digits", "--device", "cuda"],
        ["train", "regression", "--device", "cuda", "--backend", "numpy"],
        ["train", "regression", "--backend", "cupy"],
        ["train", "regression", "--device", "cuda", "--backend", "numba-cuda"],
        ["verify", "--backend", "cupy"],
        ["verify", "--backend", "numba-cuda"],
    ],
)
def test_no_gpu_exits_3_with_the_reason_and_the_fix(argv):
    status, out, err = command(*argv)
    assert (status, out) == (3, "")
    assert re.fullmatch(
        r"fused-adam: .*(not installed; pip install 'fused-adam|no NVIDIA driver|finds no GPU).*\n", err
    )
    assert "Traceback" not in err


@NO_GPU
@CUPY
def test_a_driver_without_a_gpu_exits_3_too(driver):
    status, out, err = command("train", "digits", "--device", "cuda", env=driver(100))
    assert (status, out) == (3, "")
    assert "the NVIDIA driver finds no GPU (CUDA error 100); check nvidia-smi" in err


@NO_GPU
@CUPY
def test_a_driver_that_cupy_cannot_use_exits_3_too(driver):
    """One that is too old for this CuPy, for example."""
    status, out, err = command("train", "regression", "--device", "cuda", env=driver(0))
    assert (status, out) == (3, "")
    assert re.match(r"fused-adam: .* CuPy cannot use the driver: cudaError\w+: ", err)


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(reason("cupy") != "", reason="needs CuPy and a GPU")
def test_digits_reach_97_percent_on_a_gpu(capsys):
    backends = [name for name in ON_GPU if not reason(name)]
    results = [run_json(capsys, "train", "digits", "--device", "cuda", "--backend", name) for name in backends]
    assert all(status == 0 and result["test_accuracy"] >= 0.97 for status, result in results)
    assert [result["backend"] for _, result in results] == backends
    assert all(result["losses"] == results[0][1]["losses"] for _, result in results)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["--device {cpu,cuda}", "CuPy", "numba-cuda"]),
        (["verify"], ["--backend {cupy,numba-cuda,numba,numpy}"]),
        (["kernel"], ["--full", "--dtype {float32,float64,float16,bfloat16}"]),
    ],
)
def test_the_help_names_them(capsys, argv, words):
    status, out, _ = run(capsys, *argv, "--help")
    assert status == 0
    assert all(word in out for word in words)
