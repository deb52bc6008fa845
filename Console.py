"""An installed package may fail to import, and a GPU may stand unused: only a trial tells.

When a lesson stops at an import, or does not use the GPU, ask this file first. It tries each part
of the installation by itself, and says what is wrong and what to type. Each package is imported in
a Python of its own, after those that it needs, so that no failure hides another:

    python Console.py                       what works here; status 1 if something is wrong
    python Console.py --json                the same for programs
    python Console.py torch.nn.Linear       signature, first line of help and members of a name

A dtype is a type of numbers, such as float32; not each of them has a matrix product on each device.
A wheel is the file that pip installs; that of torch is built for one version of CUDA. A driver for
CUDA 12.2 runs a wheel built for 12.8, as both begin with 12, but none for 13.0. A file random.py
beside the lessons hides Python's own random from all of them.

    small whole numbers   (64, 8) @ (8, 64) of zeros and ones: no sum exceeds 8
    GFLOP/s               thousand million multiplications and additions a second, of (n, n)
                          products; n is doubled until four of them take 10 ms

Needs          nothing: it says what is missing
Checked here   versions against the lowest ones and each other; every import; files that hide a
               module; the wheel's CUDA against the driver's; memory and products on each device
TensorBoard    nothing of its own: whether it imports
Try            make an empty file numpy.py beside this one: what does section 2 say of numpy?
Answer         "hidden by numpy.py", and what needs numpy waits for it; section 5 says: rename it
Source         NVIDIA, "CUDA Compatibility"; pytorch.org, "Previous versions" (wheels by CUDA)
"""

import os
import sys

if __name__ == "__main__":  # the modules below are Python's own, whatever lies beside this file
    here = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]

import argparse
import contextlib
import difflib
import inspect
import json
import pkgutil
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent


# --- 1. in everyday code ---------------------------------------------------------------------


def everyday():
    """{call: answer} of what one would type by hand; none of them imports torch."""
    return {
        "platform.python_version()": platform.python_version(),
        "sys.executable": sys.executable,
        'importlib.metadata.version("torch")': attempt(metadata.version, "torch")[0],
        'shutil.which("nvidia-smi")': shutil.which("nvidia-smi"),
        "os.cpu_count()": os.cpu_count(),
    }


def show_calls(calls):
    print("1. What do the plain calls say? None of them imports torch")
    print_table(["call", "answer"], [(call, str(answer)) for call, answer in calls.items()])
    torch = calls['importlib.metadata.version("torch")']
    driver = "there" if calls['shutil.which("nvidia-smi")'] else "not on the PATH"
    first = f"torch {torch} is installed" if torch else "torch is not installed"
    print(f"   -> {first}; nvidia-smi is {driver}")


# --- 2. packages -----------------------------------------------------------------------------

PYTHON = "3.11"
LOWEST = {
    "torch": "2.7", "torchvision": "0.22", "tensorboard": "2.21", "numpy": "2.0",
    "pillow": "10.1", "tqdm": "4.66", "pytest": "8.2",
}  # fmt: skip
IMPORTS = {  # the part that can break, where the bare name loads less
    "pillow": "PIL.Image",
    "tensorboard": "tensorboard.summary.writer.event_file_writer",
    "torchvision": "torchvision.transforms.v2",
}
TOPS = {IMPORTS.get(name, name).partition(".")[0] for name in LOWEST}
NEW_PYTHON = "install a newer Python: https://www.python.org/downloads"
ALONE = """
import importlib, sys
try:
    importlib.import_module(sys.argv[1])
except Exception as error:
    sys.exit(": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]))
print("imported")
"""


def numbers(version):
    """The first three numbers of a version: "2.15.0+cu126" -> (2, 15, 0), not what follows "+".

    A tuple of ints, shorter if there are fewer: "2.7rc1" -> (2, 7, 1). Exercise.
    """
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def fits(version, bounds):
    """Whether a version meets bounds such as ">=2.7,<3": "==", ">=" and "<" count, others do not.

    Each bound is compared as far as it is written: "==2.8" is met by 2.8.3. What a version lacks
    is 0. Exercise.
    """
    for sign, text in re.findall(r"(==|>=|<)\s*([\d.]+)", bounds):
        bound = numbers(text)
        here = (*numbers(version), 0, 0)[: len(bound)]
        if not {"==": here == bound, ">=": here >= bound, "<": here < bound}[sign]:
            return False
    return True


def needs(name):
    """What an installed package asks of the others here: {"torch": "==2.7.0"}."""
    plain = [line for line in metadata.requires(name) or [] if ";" not in line]  # no extras
    asked = (re.match(r"([\w.-]+)[ (]*([^)]*)", line).groups() for line in plain)
    return {other.lower(): bounds for other, bounds in asked if other.lower() in LOWEST}


def install(*names, option="--upgrade", tag=""):
    """What to type so that this Python gets these packages; tag names one of PyTorch's indices."""
    here = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    python = "python" if shutil.which("python") == sys.executable else here
    wanted = " ".join(f'"{name}>={LOWEST[name]}"' for name in names)
    index = f" --index-url https://download.pytorch.org/whl/{tag}" if tag else ""
    return f"{python} -m pip install {option} {wanted}{index}"


def import_alone(module):
    """None if a Python of its own imports the module, else what went wrong in one line."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, module], stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if done.stdout.endswith("imported\n"):
        return None
    lines = done.stderr.strip().splitlines() or [f"it ends Python with status {done.returncode}"]
    return lines[-1]


def hiding_files():
    """{module: path} of what beside this file hides a module of Python's, or one that we need."""
    lines = [line for name in LOWEST for line in attempt(metadata.requires, name)[0] or ()]
    plain = [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    needed = {name.lower().replace("-", "_") for name in plain}
    hidden = needed.union(sys.stdlib_module_names, TOPS) - set(sys.builtin_module_names)
    beside = [*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("*/__init__.py"))]
    found = {path.stem: path for path in sorted(beside) if path.stem in hidden}
    if found:  # what Python loads before it looks beside a script cannot be hidden
        ask = [sys.executable, "-c", "import sys; print(*sys.modules)"]
        for module in subprocess.check_output(ask, encoding="utf-8").split():
            found.pop(module, None)
    return found


def inspect_package(name, versions, asked, broken, hiding):
    """{"lowest", "version", "imports"}, or instead of the last the "error" and what to "type"."""
    version, option = versions[name], "--upgrade"
    row = {"lowest": LOWEST[name], "version": version}
    module = IMPORTS.get(name, name)
    path = hiding.get(module.partition(".")[0])
    waits = [other for other in ("python", *asked) if other in broken]
    clashes = [
        f"{other}{bounds}, here is {versions[other]}"
        for other, bounds in asked.items()
        if versions[other] and not fits(versions[other], bounds)
    ]
    if path:
        return row | {"error": f"hidden by {path.name}", "type": f"rename {path}"}
    if version is None:
        error = "not installed"
    elif not fits(version, f">={LOWEST[name]}"):
        error = f"older than {LOWEST[name]}"
    elif clashes:
        error = f"needs {'; '.join(clashes)}"
    elif waits:
        return row | {"error": f"waits for {', '.join(waits)}"}
    else:
        error = import_alone(module)
        option = "--force-reinstall"
    if error is None:
        return row | {"imports": True}
    together = ("torch", "torchvision") if name == "torchvision" else (name,)
    tag = (versions["torch"] or "").partition("+")[2] if "torch" in together else ""
    return row | {"error": error, "type": install(*together, option=option, tag=tag)}


def inspect_packages():
    """A row for Python, for each file that hides a module, for each package after its own needs."""
    here = platform.python_version()
    rows = {"python": {"lowest": PYTHON, "version": here, "at": sys.executable}}
    if not fits(here, f">={PYTHON}"):
        rows["python"] |= {"error": f"older than {PYTHON}", "type": NEW_PYTHON}
    versions = {name: attempt(metadata.version, name)[0] for name in LOWEST}
    asked = {name: attempt(needs, name)[0] or {} for name in LOWEST}
    hiding = hiding_files()
    for module, path in hiding.items():
        if module not in TOPS:
            wrong = f"hides the module {module} from all that is imported here"
            rows[path.name] = {"error": wrong, "type": f"rename {path}"}
    for name in sorted(LOWEST, key=lambda name: len(asked[name])):
        broken = [other for other in rows if "error" in rows[other]]
        rows[name] = inspect_package(name, versions, asked[name], broken, hiding)
    return rows


def show_packages(packages):
    print("2. Is each package new enough, and does it import in a Python of its own?")
    rows = []
    for name, row in packages.items():
        works = "works" if row.get("imports") else row.get("at")
        rows.append((name, row.get("lowest"), row.get("version"), row.get("error", works)))
    print_table(["package", "lowest", "here", "import, or what is wrong"], rows)
    working = sum("imports" in row for row in packages.values())
    print(f"   -> {working} of {len(LOWEST)} packages can be used")


# --- 3. CUDA ---------------------------------------------------------------------------------

WHEELS = {(13, 0): "cu130", (12, 8): "cu128", (12, 0): "cu126", (11, 0): "cu118"}  # by driver
NEW_DRIVER = "restart; if that is no help, install the driver: https://www.nvidia.com/drivers"


def ask_driver():
    """{"version", "cuda"} from nvidia-smi, None where there is none. Raises if it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run(
        [program], capture_output=True, encoding="utf-8", errors="replace", timeout=20
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    version = re.search(r"(?:Driver|KMD) Version\s*:\s*([\d.]+)", done.stdout)
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", done.stdout)  # UMD: since 2026
    return {"version": version and version[1], "cuda": cuda and cuda[1]}


def unused_gpu(wheel, runs, error):
    """Why torch built for `wheel` fails to start CUDA on a driver that `runs` one, what to type.

    Both may be None: a wheel without CUDA; a driver that is too old or too ill to tell.
    """
    tag = next((tag for least, tag in WHEELS.items() if runs and numbers(runs) >= least), "")
    other = install("torch", "torchvision", option="--force-reinstall", tag=tag)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wheel is None:
        return "built without CUDA, but there is a driver", other
    if runs and numbers(wheel)[0] > numbers(runs)[0]:
        return f"built for CUDA {wheel}, but the driver runs up to {runs}", other
    if hidden is None:
        return error, NEW_DRIVER
    unset = "unset CUDA_VISIBLE_DEVICES"
    if os.name == "nt":
        unset = 'set "CUDA_VISIBLE_DEVICES=" (in PowerShell: Remove-Item Env:CUDA_VISIBLE_DEVICES)'
    if hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU", unset
    return f"{error}; CUDA_VISIBLE_DEVICES={hidden!r} is set", f"{unset}; then {NEW_DRIVER}"


def inspect_cuda(with_torch):
    """A row for the driver and one for the wheel. No GPU is a fact, an unused one is an error."""
    driver, error = attempt(ask_driver)
    rows = {"driver": driver or {"nvidia-smi": "not on the PATH"}}
    if error:
        rows["driver"] = {"error": error, "type": NEW_DRIVER}
    if with_torch:
        import torch

        wheel = torch.version.cuda
        rows["wheel"] = {"version": torch.__version__, "cuda": wheel, "rocm": torch.version.hip}
        _, error = attempt(torch.cuda.init)
        if error and driver:
            wrong, fix = unused_gpu(wheel, driver["cuda"], error)
            rows["wheel"] |= {"error": wrong, "type": fix}
    return rows


def show_cuda(cuda):
    print("3. Do the NVIDIA driver and the wheel of torch go together?")
    driver, wheel = cuda["driver"], cuda.get("wheel", {"error": "torch cannot be asked"})
    fact = "nvidia-smi is not on the PATH" if "nvidia-smi" in driver else None
    rows = [("driver", driver, fact), ("torch", wheel, None)]
    rows = [(label, *map(row.get, ("version", "cuda", "rocm")), row.get("error", fact))
            for label, row, fact in rows]  # fmt: skip
    print_table(["what", "version", "CUDA", "ROCm (AMD)", "what is wrong, or a fact"], rows)
    if "error" in driver or "error" in wheel:
        print("   -> not yet: see section 5")
    elif "nvidia-smi" in driver:
        print("   -> no NVIDIA driver here; without an NVIDIA GPU that is as it should be")
    else:
        print(f"   -> CUDA {wheel['cuda']} starts on a driver that runs up to {driver['cuda']}")


# --- 4. devices ------------------------------------------------------------------------------

DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int8", "uint16")
NEW_BUILD = "free its memory, or choose a build for it: https://pytorch.org/get-started/locally"


def inspect_memory(device):
    """Name and memory of a device, None where it does not tell."""
    import torch

    if device.type == "cpu":
        size, _ = attempt(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        name, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        return {"name": name, "threads": threads, "GiB": size and size / 2**30}
    module = torch.get_device_module(device)
    name, _ = attempt(lambda: module.get_device_name(device))
    memory, _ = attempt(lambda: module.mem_get_info(device))
    free, total = memory or (None, None)
    return {"name": name, "free GiB": memory and free / 2**30, "GiB": memory and total / 2**30}


def check_product(device, dtype):
    """Multiply random 0/1 matrices (64, 8) and (8, 64) of that dtype on that device.

    Raises ArithmeticError("a wrong product") where it is not that of int64 on the CPU, and what
    torch raises where there is none. Exercise.
    """
    import torch

    a, b = torch.randint(2, (64, 8)), torch.randint(2, (8, 64))
    product = a.to(device, dtype) @ b.to(device, dtype)  # (64, 64)
    if not torch.equal(product.cpu().to(torch.int64), a @ b):
        raise ArithmeticError("a wrong product")


def gflops(device, dtype, seconds=0.01, largest=4096):
    """4 * 2 n^3 / took / 1e9 at the first n = 64, 128 … whose four products take so many seconds.

    Or at `largest`. Before they are timed, by time.perf_counter(), there is one more product, and
    both readings of the clock wait for the device. Exercise.
    """
    import torch

    def wait():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    n, took = 32, 0.0
    while took < seconds and n < largest:
        n *= 2
        a, b = (torch.randint(2, (n, n)).to(device, dtype) for _ in range(2))
        a @ b  # the first one loads and chooses what the others use
        wait()
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        wait()
        took = time.perf_counter() - start
    return 4 * 2 * n**3 / took / 1e9


def inspect_dtype(device, name):
    """{"exact", "GFLOP/s"}, or "not supported" and why, or for float32 or if wrong an "error"."""
    import torch

    dtype = getattr(torch, name)
    _, error = attempt(check_product, device, dtype)
    if error is None:
        return {"exact": True, "GFLOP/s": attempt(gflops, device, dtype)[0]}
    if name == "float32" or "wrong product" in error:
        again = install("torch", option="--force-reinstall")
        mend = again if device.type == "cpu" else NEW_BUILD
        return {"exact": False, "error": error, "type": mend}
    return {"not supported": error}


def inspect_devices(seed):
    """For the CPU and every accelerator its memory, and a row for each dtype."""
    import torch

    torch.manual_seed(seed)
    kind = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if kind else 0
    rows = {}
    for label in ("cpu", *(f"{kind.type}:{i}" for i in range(count))):
        rows[label] = inspect_memory(torch.device(label))
        for name in DTYPES:
            rows[f"{label} {name}"] = inspect_dtype(torch.device(label), name)
    return rows


def show_devices(devices):
    print("4. How much memory has each device, and which dtypes does it multiply, how fast?")
    labels = [label for label in devices if " " not in label and "error" not in devices[label]]
    keys = ("name", "threads", "GiB", "free GiB")
    rows = [(label, *(devices[label].get(key) for key in keys)) for label in labels]
    print_table(["device", "name", "threads", "memory, GiB", "free, GiB"], rows)
    products = {label: row for label, row in devices.items() if " " in label}
    rows = [(*label.split(" "), "exact" if row.get("exact") else row.get("error", "none"),
             row.get("GFLOP/s")) for label, row in products.items()]  # fmt: skip
    print_table(["device", "dtype", "product", "GFLOP/s"], rows)
    for label in labels:
        here = {name: products.get(f"{label} {name}", {}) for name in DTYPES}
        exact = [name for name, row in here.items() if row.get("exact")]
        none = ", ".join(name for name, row in here.items() if "not supported" in row)
        count = f"{len(exact)} of {len(here)} dtypes"
        print(f"   -> on {label} {count} multiply small whole numbers exactly")
        if none:
            print(f"      none: PyTorch has no product of {none} there, which is no fault of yours")


# --- 5. what is wrong, and what to type ------------------------------------------------------


def inspect_machine(seed):
    """The rows of all sections, and "problems": what is wrong and what to type."""
    packages = inspect_packages()
    with_torch = "error" not in packages["torch"]
    devices, error = attempt(inspect_devices, seed) if with_torch else ({}, None)
    if error:
        devices = {"cpu": {"error": error, "type": install("torch", option="--force-reinstall")}}
    facts = {"calls": everyday(), "packages": packages, "cuda": inspect_cuda(with_torch)}
    facts["devices"] = devices
    facts["problems"] = [
        {"wrong": f"{label}: {row['error']}", "type": row["type"]}
        for section in ("packages", "cuda", "devices")
        for label, row in facts[section].items()
        if "type" in row
    ]
    return facts


def show_problems(problems):
    print("5. What is wrong, and what to type?")
    for problem in problems:
        print(f"   {problem['wrong']}")
        print(f"      {problem['type']}")
    n = len(problems)
    many = f"{n} things are wrong: begin with the first, as others may come from it"
    print(f"   -> {'nothing is wrong' if n == 0 else 'one thing is wrong' if n == 1 else many}")


# --- a name of the API -----------------------------------------------------------------------


def similar(name):
    """: do you mean torch.nn.Linear? For a name that is wrong in its last part alone, else ""."""
    before, _, last = name.rpartition(".")
    thing, error = attempt(pkgutil.resolve_name, before)
    close = [] if error else difflib.get_close_matches(last, dir(thing), n=1)
    return f": do you mean {before}.{close[0]}?" if close else ""


def look_up(name):
    """What there is to know of a dotted name at a glance, by imports and getattr alone."""
    thing, error = attempt(pkgutil.resolve_name, name)
    if error:
        raise LookupError(f"no name {name} ({error}){similar(name)}")
    lines = [line.strip() for line in (inspect.getdoc(thing) or "").splitlines() if line.strip()]
    signature, _ = attempt(inspect.signature, thing)
    if signature is None and lines and lines[0].startswith(name.rpartition(".")[2] + "("):
        signature = lines.pop(0)  # compiled functions carry it in their help
    return {
        "name": name,
        "kind": "class" if isinstance(thing, type) else type(thing).__name__,
        "signature": signature and str(signature),
        "help": lines[0] if lines else None,
        "members": [member for member in dir(thing) if not member.startswith("_")],
    }


def show_name(found):
    """Print a name that was looked up, its members four a line."""
    print(f"{found['name']}   {found['kind']}")
    for key in ("signature", "help"):
        if found[key]:
            print(f"   {key:<9}   {found[key]}")
    for i in range(0, len(found["members"]), 4):
        four = "".join(f"{name:<23} " for name in found["members"][i : i + 4])
        print(f"   {'members' if i == 0 else '':<9}   {four}".rstrip())


# --- lines and tables ------------------------------------------------------------------------


def attempt(work, *args):
    """(what work returns, None), or (None, what went wrong in one line)."""
    try:
        return work(*args), None
    except Exception as error:  # a broken package may raise anything: that is the finding
        return None, ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def print_table(head, rows):
    """Print a table under its head: words to the left, numbers to the right, None as "-"."""
    cells = [[f"{value:,.1f}" if isinstance(value, float) else "-" if value is None else str(value)
              for value in row] for row in rows]  # fmt: skip
    columns = []
    for j, column in enumerate(zip(head, *cells, strict=True)):
        width, values = max(map(len, column)), [row[j] for row in rows]
        right = all(value is None or isinstance(value, (int, float)) for value in values)
        columns.append([text.rjust(width) if right else text.ljust(width) for text in column])
    for line in zip(*columns, strict=True):
        print(f"   {'   '.join(line)}".rstrip())


# --- all of it ------------------------------------------------------------------------------


def main(seed=0, name="", as_json=False):
    """Inspect the machine, or look up a name. Prints and returns what was found."""
    with contextlib.redirect_stdout(sys.stderr):  # what packages print when they are imported
        found = look_up(name) if name else inspect_machine(seed)
    if as_json:
        print(json.dumps(found, indent=2))
    elif name:
        show_name(found)
    else:
        show_calls(found["calls"])
        show_packages(found["packages"])
        show_cuda(found["cuda"])
        show_devices(found["devices"])
        show_problems(found["problems"])
    return found


def parse(argv=None):
    parser = argparse.ArgumentParser(description="What works here, or what a name of an API is.")
    parser.add_argument("name", nargs="?", default="", help="such as torch.nn.Linear")
    parser.add_argument("--json", action="store_true", dest="as_json", help="the same as JSON")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # any path, on any console
    try:
        status = 1 if main(**parse()).get("problems") else 0
        print(end="", flush=True)
    except LookupError as error:
        print(error, file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    sys.exit(status)
