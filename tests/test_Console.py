import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
LOADED = subprocess.check_output(  # as Python begins: a package in site-packages may load more
    [sys.executable, "-c", "import sys; print(*sys.modules)"], text=True
).split()


@pytest.fixture
def lesson(load):
    return load("Console.py")


@pytest.fixture
def fast(lesson, monkeypatch):
    """Without measuring speeds, another Python, and a driver, whatever the machine has."""
    monkeypatch.setattr(lesson, "gflops", lambda device, dtype: 1.0)
    monkeypatch.setattr(lesson, "import_alone", lambda module: None)
    monkeypatch.setattr(lesson, "ask_driver", lambda: None)
    return lesson


def installed(monkeypatch, versions=(), requires=()):
    """Let metadata tell other versions (None: not installed) and other requirements."""
    versions, requires = dict(versions), dict(requires)
    true_version, true_requires = metadata.version, metadata.requires

    def version(name):
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or true_version(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda n: requires.get(n) or true_requires(n))


def printed(show, *args):
    """What show(*args) prints, line by line."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show(*args)
    return out.getvalue().splitlines()


def run(*arguments, script=ROOT / "Console.py", **environment):
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, encoding="utf-8",
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_lowest_versions_are_those_of_the_requirements(lesson):
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert dict(re.findall(r"^(\w+)>=([\d.]+)", text, re.MULTILINE)) == lesson.LOWEST


@pytest.mark.parametrize("bounds", ["==2.7.0", ">=2.14.0", "<3,>=2.7", ">=2.7.1", "==2.8.*", ""])
@pytest.mark.parametrize("version", ["2.7", "2.7.0", "2.7.1+cu126", "2.8.3", "2.14.0", "3.0.1"])
def test_versions_fit_as_packaging_says(lesson, version, bounds):
    assert lesson.fits(version, bounds) == SpecifierSet(bounds).contains(version)


@pytest.mark.parametrize(("version", "wanted"), [
    ("2.15.0+cu126", (2, 15, 0)), ("2.7rc1", (2, 7, 1)), ("13", (13,)), ("1.2.3.4", (1, 2, 3)),
])  # fmt: skip
def test_the_numbers_of_a_version(lesson, version, wanted):
    assert lesson.numbers(version) == wanted


@pytest.mark.parametrize("line", ["torch==2.7.0", "torch (==2.7.0)"])
def test_needs_reads_both_spellings_and_no_extras(lesson, monkeypatch, line):
    lines = [line, "Pillow!=8.3.*,>=5.3.0", "gdown; extra == 'x'", "numpy; extra == 'x'", "scipy"]
    installed(monkeypatch, requires={"torchvision": lines})
    assert lesson.needs("torchvision") == {"torch": "==2.7.0", "pillow": "!=8.3.*,>=5.3.0"}


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16", "int64"])
def test_products_are_exact_on_the_cpu(lesson, name):
    row = lesson.inspect_dtype(CPU, name)
    assert row["exact"] and row["GFLOP/s"] > 0 and "error" not in row


def test_a_dtype_that_does_not_multiply_is_a_fact(fast):
    row = fast.inspect_dtype(CPU, "uint16")
    assert list(row) == ["not supported"] and "not implemented" in row["not supported"]


@pytest.mark.parametrize("wrong", [lambda y: y + 1, lambda y: 0 * y, lambda y: y.roll(1, 0)])
def test_a_wrong_product_is_wrong(fast, monkeypatch, wrong):
    def matmul(a, b):
        return wrong(torch.mm(a, b)) if a.is_floating_point() else torch.mm(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    row = fast.inspect_dtype(CPU, "bfloat16")
    assert row["error"] == "ArithmeticError: a wrong product" and "install" in row["type"]


def test_gflops_counts_two_n_cubed_at_the_first_size_that_takes_long_enough(lesson, monkeypatch):
    clock = iter([0.0, 0.002, 1.0, 1.02])
    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert lesson.gflops(CPU, torch.float32) == pytest.approx(4 * 2 * 128**3 / 0.02 / 1e9)


def products_of(monkeypatch, work, *args):
    """The pairs of matrices that work(*args) multiplies."""
    pairs, real = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: pairs.append((a, b)) or real(a, b))
    work(*args)
    return pairs


def test_the_products_that_are_checked_have_no_sum_above_8(lesson, monkeypatch):
    for a, b in products_of(monkeypatch, lesson.check_product, CPU, torch.float32):
        assert a.shape == (64, 8) and b.shape == (8, 64)
        assert set(a.unique().tolist()) == set(b.unique().tolist()) == {0, 1}


def test_gflops_times_four_products_after_one_that_is_not_timed(lesson, monkeypatch):
    clock = iter([0.0, 0.002, 1.0, 1.02])
    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pairs = products_of(monkeypatch, lesson.gflops, CPU, torch.float32)
    assert [a.shape for a, _ in pairs] == [(64, 64)] * 5 + [(128, 128)] * 5


def test_gflops_stops_at_the_largest_size(lesson, monkeypatch):
    clock = iter([0.0, 1e-6] * 2)
    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    speed = lesson.gflops(CPU, torch.float32, largest=128)
    assert speed == pytest.approx(4 * 2 * 128**3 / 1e-6 / 1e9)


@pytest.mark.parametrize("header", [
    "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |",
    "| NVIDIA-SMI 610.43.03   KMD Version: 550.54.15   CUDA UMD Version: 12.4 |",
])  # fmt: skip
def test_the_driver_is_read_from_old_and_new_headers(lesson, monkeypatch, header):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    done = SimpleNamespace(returncode=0, stdout=f"Mon Jan  1\n{header}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    assert lesson.ask_driver() == {"version": "550.54.15", "cuda": "12.4"}


def test_a_driver_that_does_not_answer_is_wrong(lesson, monkeypatch):
    def silent(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", silent)
    row = lesson.inspect_cuda(with_torch=True)["driver"]
    assert "timed out after 20" in row["error"] and row["type"] == lesson.NEW_DRIVER
    done = SimpleNamespace(returncode=9, stdout="Driver/library version mismatch\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    error = lesson.inspect_cuda(with_torch=True)["driver"]["error"]
    assert error == "RuntimeError: Driver/library version mismatch"


@pytest.mark.parametrize("wheel", [None, "12.6", "13.2"])
def test_no_driver_is_a_fact_whatever_the_wheel(fast, monkeypatch, wheel):
    monkeypatch.setattr(torch.version, "cuda", wheel)
    rows = fast.inspect_cuda(with_torch=True)
    assert rows["driver"] == {"nvidia-smi": "not on the PATH"} and rows["wheel"]["cuda"] == wheel
    assert not any("type" in row for row in rows.values())


@pytest.mark.parametrize(
    ("wheel", "runs", "wrong", "fix"),
    [
        (None, None, "built without CUDA", '"torchvision>=0.22"'),
        ("13.0", None, "it did not start", "restart"),  # the driver says N/A, ERR!, or nothing
        (None, "12.4", "built without CUDA", "/whl/cu126"),
        (None, "12.9", "built without CUDA", "/whl/cu128"),
        ("13.2", "12.2", "the driver runs up to 12.2", "/whl/cu126"),
        ("12.6", "11.4", "the driver runs up to 11.4", "/whl/cu118"),
        ("12.8", "12.2", "it did not start", "restart"),  # the same major version is no clash
        ("12.6", "13.0", "it did not start", "restart"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_explained(lesson, monkeypatch, wheel, runs, wrong, fix):
    def init():
        raise RuntimeError("it did not start")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(lesson, "ask_driver", lambda: {"version": "1", "cuda": runs})
    monkeypatch.setattr(torch.version, "cuda", wheel)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "error" not in lesson.inspect_cuda(with_torch=True)["wheel"]
    monkeypatch.setattr(torch.cuda, "init", init)
    row = lesson.inspect_cuda(with_torch=True)["wheel"]
    assert wrong in row["error"] and fix in row["type"]


@pytest.mark.parametrize("value", ["", "-1", " -1"])
def test_a_hidden_gpu_is_named_as_such(lesson, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    wrong, fix = lesson.unused_gpu("13.0", "13.1", "no GPU")
    assert wrong == f"CUDA_VISIBLE_DEVICES={value!r} hides the GPU"
    assert fix.startswith("set" if os.name == "nt" else "unset CUDA_VISIBLE_DEVICES")
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        fix = lesson.unused_gpu("13.0", "13.1", "no GPU")[1]
    assert fix.startswith('set "CUDA_VISIBLE_DEVICES=" ') and "Remove-Item Env:CUDA_VIS" in fix


def test_a_gpu_that_is_chosen_but_does_not_start_is_not_called_hidden(lesson, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    wrong, fix = lesson.unused_gpu("13.0", "13.1", "no GPU")
    assert wrong == "no GPU; CUDA_VISIBLE_DEVICES='0' is set"
    assert "CUDA_VISIBLE_DEVICES" in fix and fix.endswith(f"; then {lesson.NEW_DRIVER}")


def test_what_to_type_names_the_python_that_was_asked(lesson, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my programs/python3")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/python")
    assert lesson.install("tqdm").startswith('"/my programs/python3" -m pip install --upgrade')
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    assert lesson.install("tqdm").startswith("python -m pip install --upgrade")


def test_a_missing_torchvision_stops_nothing_else(fast, monkeypatch, capsys):
    installed(monkeypatch, {"torchvision": None})
    facts = fast.main()
    assert [p["wrong"] for p in facts["problems"]] == ["torchvision: not installed"]
    assert facts["problems"][0]["type"].endswith('--upgrade "torch>=2.7" "torchvision>=0.22"')
    assert facts["devices"]["cpu float32"]["exact"]
    out = capsys.readouterr().out
    assert facts["problems"][0]["type"] == out.splitlines()[-2].strip()
    assert out.endswith("   -> one thing is wrong\n") and "-> 6 of 7 packages can be used\n" in out
    assert re.search(r"\n   torchvision   0.22     -        not installed\n", out)


def test_an_old_tensorboard_is_told_before_it_is_imported(fast, monkeypatch):
    installed(monkeypatch, {"tensorboard": "2.10.1"})
    row = fast.inspect_packages()["tensorboard"]
    assert row["error"] == "older than 2.21" and "imports" not in row
    assert row["type"].endswith('-m pip install --upgrade "tensorboard>=2.21"')


@pytest.mark.parametrize(("tag", "index"), [("", ""), ("+cpu", "/cpu"), ("+cu126", "/cu126")])
def test_torch_and_torchvision_that_do_not_belong_together(fast, monkeypatch, tag, index):
    versions = {"torch": f"2.8.0{tag}", "torchvision": "0.22.0"}
    installed(monkeypatch, versions, {"torchvision": ["numpy", "torch==2.7.0"]})
    row = fast.inspect_packages()["torchvision"]
    assert row["error"] == f"needs torch==2.7.0, here is 2.8.0{tag}"
    wanted = '"torch>=2.7" "torchvision>=0.22"'
    host = f" --index-url https://download.pytorch.org/whl{index}" if index else ""
    assert row["type"].endswith(f"--upgrade {wanted}{host}")


def test_without_numpy_those_that_need_it_wait_and_torch_multiplies(fast, monkeypatch):
    installed(monkeypatch, {"numpy": None})
    facts = fast.inspect_machine(seed=0)
    assert [p["wrong"] for p in facts["problems"]] == ["numpy: not installed"]
    for name in ("torchvision", "tensorboard"):
        assert facts["packages"][name]["error"] == "waits for numpy"
    assert facts["devices"]["cpu float32"]["exact"]


def test_whatever_an_import_ends_with_is_the_finding(fast, monkeypatch):
    def broken(module):
        return "it ends Python with status 3" if module == "torchvision.transforms.v2" else None

    monkeypatch.setattr(fast, "import_alone", broken)
    row = fast.inspect_packages()["torchvision"]
    assert row["error"] == "it ends Python with status 3" and "imports" not in row
    assert "--force-reinstall" in row["type"]


@pytest.mark.parametrize(("source", "told"), [
    ("x = 1", None),
    ("print('hello')", None),
    ("raise OSError('libcudart.so: not found\\nand more')", "OSError: libcudart.so: not found"),
    ("raise ImportError", "ImportError"),
    ("raise SystemExit", "it ends Python with status 0"),
    ("raise SystemExit('no licence')", "no licence"),
    ("import sys, os; sys.stderr = None; os._exit(7)", "it ends Python with status 7"),
])  # fmt: skip
def test_a_module_is_imported_in_a_python_of_its_own(lesson, monkeypatch, tmp_path, source, told):
    (tmp_path / "fragile.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert lesson.import_alone("fragile") == told
    assert "fragile" not in sys.modules


@pytest.mark.skipif(sys.platform == "win32", reason="abort() opens a window there")
def test_an_import_that_aborts_python_is_told(lesson, monkeypatch, tmp_path):
    (tmp_path / "fragile.py").write_text("import os; os.abort()", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert lesson.import_alone("fragile") == "it ends Python with status -6"


def test_files_that_hide_a_module_are_named_and_nothing_else(fast, monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "ROOT", tmp_path)
    (tmp_path / "queue").mkdir()
    for name in ("random.py", "queue/__init__.py", "sympy.py", "typing_extensions.py"):
        (tmp_path / name).touch()
    for name in ("model.py", "time.py", "os.py", "logging.txt", "gdown.py"):
        (tmp_path / name).touch()  # no module; built in; loaded before; no script; of an extra
    (tmp_path / "json").mkdir()  # without an __init__.py it hides nothing
    facts = fast.inspect_machine(seed=0)
    wrong = [problem["wrong"] for problem in facts["problems"]]
    hides = "hides the module {} from all that is imported here"
    assert wrong == [
        f"{name}: {hides.format(name.removesuffix('.py'))}"
        for name in ("queue", "random.py", "sympy.py", "typing_extensions.py")
        if name.removesuffix(".py") not in LOADED
    ]
    assert facts["problems"][-1]["type"] == f"rename {tmp_path / 'typing_extensions.py'}"


def test_the_notes_themselves_hide_no_module(lesson):
    assert lesson.hiding_files() == {}


@pytest.mark.parametrize("name", ["random", "types", "queue", "logging", "re", "json", "pathlib"])
def test_console_survives_a_file_that_hides_a_module(tmp_path, name):
    hides, folder = name not in LOADED, tmp_path / "notes"
    folder.mkdir()
    (folder / f"{name}.py").write_text("raise RuntimeError('mine')", encoding="utf-8")
    shutil.copy(ROOT / "Console.py", folder)
    for name in ("torch", "torchvision", "tensorboard", "numpy", "pillow", "tqdm", "pytest"):
        (tmp_path / f"{name}-0.1.dist-info").mkdir()  # all of them older than the lowest
        lines = f"Name: {name}\nVersion: 0.1\n"
        (tmp_path / f"{name}-0.1.dist-info" / "METADATA").write_text(lines, encoding="utf-8")
    done = run(script=folder / "Console.py", PYTHONPATH=str(tmp_path), PATH="")
    assert done.returncode == 1 and done.stderr == ""
    assert (f"rename {folder}" in done.stdout) == hides and "older than 2.7" in done.stdout


def test_a_torch_hidden_by_a_file_is_not_asked_anything(fast, monkeypatch, tmp_path):
    (tmp_path / "torch.py").touch()
    monkeypatch.setattr(fast, "ROOT", tmp_path)
    facts = fast.inspect_machine(seed=0)
    assert [p["wrong"] for p in facts["problems"]] == ["torch: hidden by torch.py"]
    assert facts["devices"] == {} and "wheel" not in facts["cuda"]


def test_devices_that_cannot_be_listed_are_wrong_and_stop_nothing(fast, monkeypatch):
    monkeypatch.delattr(torch.accelerator, "current_accelerator")
    facts = fast.inspect_machine(seed=0)
    assert facts["devices"]["cpu"]["error"].startswith("AttributeError")
    assert len(facts["problems"]) == 1 and facts["cuda"]["wheel"]["version"] == torch.__version__


def test_every_accelerator_gets_its_rows(fast, monkeypatch):
    gpu = SimpleNamespace(
        get_device_name=lambda device: f"GPU {device.index}",
        mem_get_info=lambda device: (2**30, 3 * 2**30),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(fast, "inspect_dtype", lambda device, name: {"exact": True})
    rows = fast.inspect_devices(seed=0)
    assert rows["cuda:1"] == {"name": "GPU 1", "free GiB": 1.0, "GiB": 3.0}
    assert len(rows) == 3 * (1 + len(fast.DTYPES)) and "cuda:0 int8" in rows


def test_memory_is_told_in_units_of_two_to_the_30(lesson, monkeypatch):
    pages = {"SC_PHYS_PAGES": 3 * 2**18, "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", pages.get, raising=False)
    assert lesson.inspect_memory(CPU)["GiB"] == 3.0


def test_an_accelerator_that_tells_nothing_still_has_a_row(lesson, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    row = lesson.inspect_memory(torch.device("mps"))
    assert row == {"name": None, "free GiB": None, "GiB": None}


def test_float32_that_fails_is_wrong_on_every_device(fast, monkeypatch):
    def fail(device, dtype):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(fast, "check_product", fail)
    assert "install" in fast.inspect_dtype(CPU, "float32")["type"]
    assert fast.inspect_dtype(torch.device("cuda"), "float32")["type"] == fast.NEW_BUILD
    assert "type" not in fast.inspect_dtype(CPU, "float64")


def test_an_old_python_is_wrong(fast, monkeypatch):
    monkeypatch.setattr(fast.platform, "python_version", lambda: "3.10.4")
    rows = fast.inspect_packages()
    assert rows["python"]["error"] == "older than 3.11"
    assert rows["tqdm"]["error"] == "waits for python"


def test_try_and_a_badly_broken_install_told_in_valid_json(tmp_path):
    folder, library = tmp_path / "notes", tmp_path / "library"
    (library / "tensorboard-2.10.0.dist-info").mkdir(parents=True)
    (library / "tensorboard-2.10.0.dist-info" / "METADATA").write_text(
        "Name: tensorboard\nVersion: 2.10.0\n", encoding="utf-8"
    )
    (library / "torch.py").write_text("raise OSError('libcudart.so: not found')", encoding="utf-8")
    (library / "tqdm.py").write_text("print('hello')", encoding="utf-8")
    folder.mkdir()
    (folder / "numpy.py").touch()
    shutil.copy(ROOT / "Console.py", folder)
    done = run("--json", script=folder / "Console.py", PYTHONPATH=str(library), PATH="")
    facts = json.loads(done.stdout)
    errors = {name: row.get("error") for name, row in facts["packages"].items()}
    assert errors == {
        "python": None,
        "torch": "OSError: libcudart.so: not found",
        "torchvision": "waits for numpy, torch",
        "tensorboard": "older than 2.21",
        "numpy": "hidden by numpy.py",
        "pillow": None,
        "tqdm": None,
        "pytest": None,
    }
    assert facts["devices"] == {} and "wheel" not in facts["cuda"]
    assert len(facts["problems"]) == 3 and done.returncode == 1 and done.stderr == ""
    assert {p["type"] for p in facts["problems"]} >= {f"rename {folder / 'numpy.py'}"}


def test_a_class_is_shown_by_signature_help_and_members(lesson, capsys):
    found = lesson.main(name="torch.nn.Linear")
    assert found["signature"].startswith("(in_features: int, out_features: int, bias: bool = True")
    assert found["help"].startswith("Applies an affine linear transformation")
    assert {"forward", "reset_parameters"} <= set(found["members"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "torch.nn.Linear   class",
        f"   signature   {found['signature']}",
        f"   help        {found['help']}",
    ]
    assert lines[3].startswith("   members     ") and lines[4].startswith(" " * 15)
    members = [line[15:].split() for line in lines[3:]]
    assert [name for four in members for name in four] == found["members"]
    assert all(1 <= len(four) <= 4 for four in members) and len(members[0]) == 4


def test_a_compiled_function_carries_its_signature_in_its_help(lesson):
    found = lesson.look_up("torch.add")
    assert found["signature"] == "add(input, other, *, alpha=1, out=None) -> Tensor"
    assert found["help"].startswith("Adds")


def test_nothing_is_executed_but_imports_and_getattr(lesson, monkeypatch):
    class Trap:
        def __init__(self):
            raise AssertionError("it was made")

        @property
        def value(self):
            raise AssertionError("it was read")

    monkeypatch.setitem(sys.modules, "trap", SimpleNamespace(Trap=Trap))
    assert lesson.look_up("trap.Trap")["members"] == ["value"]


@pytest.mark.parametrize(
    "name", ["torch.nn.Linaer", "torch.nn.Linear.foo", "no_such_package", "..x", "torch."]
)
def test_a_name_that_does_not_exist_is_one_clear_line(lesson, name):
    with pytest.raises(LookupError) as stop:
        lesson.main(name=name)
    assert str(stop.value).startswith(f"no name {name} (") and "\n" not in str(stop.value)


@pytest.mark.parametrize(("name", "meant"), [
    ("torch.nn.Linaer", ": do you mean torch.nn.Linear?"),
    ("torch.nn.functional.crossentropy", ": do you mean torch.nn.functional.cross_entropy?"),
    ("torch.nn.qqqqqq", ""),
    ("torhc.nn", ""),
    ("torhc", ""),
])  # fmt: skip
def test_a_name_that_is_nearly_right_is_told(lesson, name, meant):
    with pytest.raises(LookupError) as stop:
        lesson.main(name=name)
    assert str(stop.value).endswith(f"){meant}")


def test_on_the_command_line_a_wrong_name_is_status_2_and_a_right_one_json():
    done = run("json.lods")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    done = run("json.loads", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "function"
    assert run("--no-such-option").returncode == 2


def test_a_table_has_words_to_the_left_and_numbers_to_the_right(lesson):
    rows = [("a", 7, 1234.56, None, 3), ("bcd", None, 0.04, "x", None)]
    assert printed(lesson.print_table, ["name", "n", "GFLOP/s", "fact", "free, GiB"], rows) == [
        "   name   n   GFLOP/s   fact   free, GiB",
        "   a      7   1,234.6   -              3",
        "   bcd    -       0.0   x              -",
    ]


def test_the_plain_calls_answer_without_torch(lesson, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    calls = lesson.everyday()
    assert calls["platform.python_version()"] == lesson.platform.python_version()
    assert calls['importlib.metadata.version("torch")'] == metadata.version("torch")
    assert calls['shutil.which("nvidia-smi")'] == "/bin/nvidia-smi"
    told = f"   -> torch {metadata.version('torch')} is installed; nvidia-smi is there"
    assert printed(lesson.show_calls, calls)[-1] == told
    calls['shutil.which("nvidia-smi")'] = None
    assert printed(lesson.show_calls, calls)[-1].endswith("; nvidia-smi is not on the PATH")
    installed(monkeypatch, {"torch": None})
    told = "   -> torch is not installed; nvidia-smi is there"
    assert printed(lesson.show_calls, lesson.everyday())[-1] == told


@pytest.mark.parametrize(
    ("driver", "wheel", "row", "follows"),
    [
        (
            {"nvidia-smi": "not on the PATH"}, {"version": "2.8", "cuda": None},
            "driver - - - nvidia-smi is not on the PATH", "no NVIDIA driver here; without",
        ),
        (
            {"version": "550.1", "cuda": "12.4"}, {"version": "2.8", "cuda": "12.6"},
            "driver 550.1 12.4 - -", "CUDA 12.6 starts on a driver that runs up to 12.4",
        ),
        (
            {"version": "550.1", "cuda": "12.4"}, {"version": "2.8", "error": "no"},
            "torch 2.8 - - no", "not yet: see section 5",
        ),
        ({"error": "no"}, {"version": "2.8", "rocm": "6.4"}, "torch 2.8 - 6.4 -", "not yet"),
        ({"nvidia-smi": "not on the PATH"}, None, "torch - - - torch cannot be asked", "not yet"),
    ],
)  # fmt: skip
def test_what_section_3_tells(lesson, driver, wheel, row, follows):
    lines = printed(lesson.show_cuda, {"driver": driver} | ({"wheel": wheel} if wheel else {}))
    assert lines[0] == "3. Do the NVIDIA driver and the wheel of torch go together?"
    assert lines[1].split() == [
        "what",
        "version",
        "CUDA",
        "ROCm",
        "(AMD)",
        "what",
        "is",
        "wrong,",
        "or",
        "a",
        "fact",
    ]
    assert row in [" ".join(line.split()) for line in lines[2:4]]
    assert lines[4].startswith(f"   -> {follows}") and len(lines) == 5


def test_what_section_4_tells_of_each_device(lesson):
    devices = {
        "cpu": {"name": "AVX2", "threads": 2, "GiB": 16.0},
        "cpu float32": {"exact": True, "GFLOP/s": 100.0},
        "cpu uint16": {"not supported": "NotImplementedError: no"},
        "cuda:0": {"name": "H100", "free GiB": 70.0, "GiB": 80.0},
        "cuda:0 float32": {"exact": False, "error": "a wrong product", "type": "do"},
        "cuda:0 int64": {"not supported": "no"},
        "cuda:0 uint16": {"not supported": "no"},
    }
    lines = [" ".join(line.split()) for line in printed(lesson.show_devices, devices)]
    assert lines[1:] == [
        "device name threads memory, GiB free, GiB",
        "cpu AVX2 2 16.0 -",
        "cuda:0 H100 - 80.0 70.0",
        "device dtype product GFLOP/s",
        "cpu float32 exact 100.0",
        "cpu uint16 none -",
        "cuda:0 float32 a wrong product -",
        "cuda:0 int64 none -",
        "cuda:0 uint16 none -",
        "-> on cpu 1 of 8 dtypes multiply small whole numbers exactly",
        "none: PyTorch has no product of uint16 there, which is no fault of yours",
        "-> on cuda:0 0 of 8 dtypes multiply small whole numbers exactly",
        "none: PyTorch has no product of int64, uint16 there, which is no fault of yours",
    ]


def test_several_things_wrong_are_told_with_what_to_type(lesson):
    problems = [{"wrong": "a: no", "type": "do a"}, {"wrong": "b: no", "type": "do b"}]
    assert printed(lesson.show_problems, problems) == [
        "5. What is wrong, and what to type?",
        "   a: no", "      do a", "   b: no", "      do b",
        "   -> 2 things are wrong: begin with the first, as others may come from it",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_nothing_wrong_and_tells_the_same_in_both_ways(fast, capsys, seed):
    facts = fast.main(seed=seed)
    told = capsys.readouterr().out
    assert facts["problems"] == [] and told.endswith("   -> nothing is wrong\n")
    assert "error" not in told.lower()
    exact = {name for name in fast.DTYPES if facts["devices"][f"cpu {name}"].get("exact")}
    assert exact | {"float8_e4m3fn"} == set(fast.DTYPES) - {"uint16"}
    fast.main(seed=seed, as_json=True)
    assert json.loads(capsys.readouterr().out) == facts
    assert f"-> on cpu {len(exact)} of 8 dtypes multiply small whole numbers exactly\n" in told
    assert "   -> 7 of 7 packages can be used\n" in told
    for name in fast.LOWEST:
        assert re.search(rf"\n   {name} +{fast.LOWEST[name]} +{metadata.version(name)}", told)
    for name in fast.DTYPES:
        product = "exact +1.0" if name in exact else "none +-"
        assert re.search(rf"\n   cpu +{name} +{product}\n", told)
    for title in ("1. What do", "2. Is each", "3. Do the", "4. How much", "5. What is"):
        assert f"{title} " in told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_device_tells_its_name_and_memory_and_multiplies(lesson):
    rows = lesson.inspect_devices(seed=0)
    assert rows["cuda:0"]["name"] == torch.cuda.get_device_name(0)
    assert 0 < rows["cuda:0"]["free GiB"] <= rows["cuda:0"]["GiB"]
    assert rows["cuda:0 float32"]["GFLOP/s"] > rows["cpu float32"]["GFLOP/s"]
    assert "not implemented" in rows["cuda:0 int64"]["not supported"]
