"""A tensor is a strided window on flat memory, and reshape copies only where no window will do.

    address of x[i, j, ...] = storage_offset + i * stride_0 + j * stride_1 + ...   (in elements)

Slicing, transposing, expanding and most reshaping only change those numbers: the result is a view,
and writing to it writes to x. Read by list or mask, x is copied. Broadcasting reads a size 1 as if
it were n, by a stride of 0; it also subtracts (B,) from (B, 1) to (B, B) without a word, and the
squared loss of perfect predictions y becomes 2 var(y). Of two dtypes the higher of bool < integer <
float decides; within it a tensor beats one without axes, and that beats a number: in uint8, 200 +
100 is 44. A GPU only queues what it is told: a clock that does not wait for it times the queueing.

Checked here   arange's length, with its rounding error; promoted dtypes; the address formula; view
               works = reshape shares memory = an own rule finds strides; what an index writes to;
               broadcasting and einsum against loops; memory shared with NumPy both ways; what a
               loop costs; with CUDA: copies, pinned memory, timing
TensorBoard    memory/...: where each element is read, orange in x's memory, blue in new memory;
               time/log10_seconds_per_pair by log2 n: the loop stays level, vectorised falls
Try            x.T.view(24) fails: does x.T.view(6, 2, 2)? Yes: each new axis has one stride
Source         PyTorch docs: "Tensor Views", Tensor.view, "Broadcasting semantics", "Tensor
               Attributes" (type promotion), "CUDA semantics" (asynchronous execution)
"""

import itertools
import math
import signal
import time
import timeit
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "08_tensor_operations_and_gpu"


def show_dtypes():
    print("1. creation: dtype, shape, values")
    for name, x in {
        "tensor([1, 2])": torch.tensor([1, 2]),
        "tensor([1, 2.5])": torch.tensor([1, 2.5]),
        "full((2, 1), 7)": torch.full((2, 1), 7),
        "linspace(1, 1.3, 4)": torch.linspace(1, 1.3, 4),
        "arange(1, 1.3, 0.1)": torch.arange(1, 1.3, 0.1),
    }.items():
        values = " ".join(f"{v:g}" for v in x.flatten().tolist())
        print(f"   {name:<20} {x.dtype!s:<14} {tuple(x.shape)!s:<7} {values}")
    assert len(x) == math.ceil((1.3 - 1) / 0.1) == 4
    print(f"   arange's count {len(x)}   theory ceil({(1.3 - 1) / 0.1})")

    print("2. promotion: dtype and value of a + b")
    byte, half = torch.tensor([200], dtype=torch.uint8), torch.tensor([0.5], dtype=torch.half)
    double, long = torch.tensor([0.5], dtype=torch.double), torch.tensor([2])
    for name, c, theory in (
        ("uint8 200 + number 100", byte + 100, torch.uint8),
        ("uint8 200 + int64 2, no axes", byte + long[0], torch.uint8),
        ("float16 0.5 + int64 2", half + long, torch.float16),
        ("float16 0.5 + float64 0.5", half + double, torch.float64),
        ("float16 0.5 + float64 0.5, no axes", half + double[0], torch.float16),
    ):
        assert c.dtype == theory
        print(f"   {name:<35} {c.dtype!s:<14} {c.item():g}")
    assert (byte + 100).item() == (200 + 100) % 256


# --- memory --------------------------------------------------------------------------------------


def shares_memory(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def window(shape, strides, offset):
    """The address of each element, in elements: offset + i * stride_0 + j * stride_1 + ..."""
    at = torch.tensor(offset)
    for n, stride in zip(shape, strides, strict=True):
        at = at[..., None] + torch.arange(n) * stride  # (...) -> (..., n)
    return at


def addresses(x):
    return window(x.shape, x.stride(), x.storage_offset())


def find_strides(at):
    """The strides of a window with the addresses `at`; None if no window has them."""
    first = at[(0,) * at.dim()].item()
    steps = torch.eye(at.dim(), dtype=torch.long)  # one step along each axis
    strides = [at[tuple(step)].item() - first if n > 1 else 1
               for step, n in zip(steps, at.shape, strict=True)]  # fmt: skip
    return strides if torch.equal(window(at.shape, strides, first), at) else None


def ways_to_view(x, shape):
    """Whether x.view works, x.reshape shares memory, and a window reads x in the new shape."""
    try:
        works = x.view(shape).shape == shape
    except RuntimeError:
        works = False
    found = find_strides(addresses(x).reshape(shape)) is not None
    return works, shares_memory(x, x.reshape(shape)), found


def address_picture(title, x, ink, cell=36):
    """A matrix as a picture (3, H, W) uint8 of its addresses, the later the darker."""
    picture = Image.new("RGB", (8 * cell, (len(x) + 1) * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    pen.text((4, 10), f"{title}   strides {x.stride()}", "black", font)
    for (i, j), address in np.ndenumerate(addresses(x).numpy()):
        left, top = j * cell, (i + 1) * cell
        shade = tuple(255 - (255 - c) * (int(address) + 4) // 28 for c in ink)
        pen.rectangle((left, top, left + cell - 2, top + cell - 2), shade)
        pen.text((left + 9, top + 9), str(address), "black", font)
    return np.asarray(picture).transpose(2, 0, 1)


def show_memory(log_dir):
    print("3. x = arange(24).view(4, 6): the window, and whose memory")
    x, views = torch.arange(24).view(4, 6), {}
    with SummaryWriter(log_dir / "memory", purge_step=0) as writer:
        for name, y in {
            "x": x,
            "x[1:, 2:]": x[1:, 2:],
            "x[:, ::2]": x[:, ::2],
            "x.T": x.T,
            "x[:, 1].view(2, 2)": x[:, 1].view(2, 2),
            "x[0].expand(4, 6)": x[0].expand(4, 6),
            "x[0].unfold(0, 3, 1)": x[0].unfold(0, 3, 1),
            "x.T.reshape(4, 6)": x.T.reshape(4, 6),
            "x.T.contiguous()": x.T.contiguous(),
            "x[[0, 1]]": x[[0, 1]],
        }.items():
            memory = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())  # all of it, (n,)
            assert torch.equal(memory[addresses(y)], y)
            views[name] = shares_memory(x, y)
            print(f"   {name:<21} {tuple(y.shape)!s:<7} strides {y.stride()!s:<8} "
                  f"offset {y.storage_offset()}   {'view' if views[name] else 'copy'}")  # fmt: skip
            picture = address_picture(name, y, (255, 120, 0) if views[name] else (0, 120, 255))
            writer.add_image(f"memory/{len(views)}", picture, 0)

    print("4. 12 elements: each shape, its axes in each order, viewed in each shape")
    shapes = [s for s in itertools.product(range(1, 13), repeat=3) if math.prod(s) == 12]
    ways = [ways_to_view(torch.empty(old).permute(order), new)
            for old in shapes for order in itertools.permutations(range(3)) for new in shapes
    ]  # fmt: skip
    assert all(len(set(way)) == 1 for way in ways)
    works, shares, found = (sum(column) for column in zip(*ways, strict=True))
    print(f"   of {len(ways)}: view works {works}   reshape shares memory {shares}   "
          f"own rule finds strides {found}")  # fmt: skip
    return {"views": views, "cases": len(ways), "works": works}


def show_indexing():
    print("5. indexing: how many of 24 ones became 0")
    a, b, c, d = (torch.ones(4, 6) for _ in range(4))
    a[:, 0].zero_()
    b[b > 0].zero_()  # in a copy that nobody keeps
    c[[0, 1]] = 0
    d[[0, 1], [2, 3]] = 0  # two elements, no block
    names = "a[:, 0].zero_()", "b[b > 0].zero_()", "c[[0, 1]] = 0", "d[[0, 1], [2, 3]] = 0"
    cleared = [int((x == 0).sum()) for x in (a, b, c, d)]
    for name, count in zip(names, cleared, strict=True):
        print(f"   {name:<22} {count}")
    index, once = torch.tensor([0, 0, 1]), torch.zeros(2)
    once[index] += 1
    summed = torch.zeros(2).index_add(0, index, torch.ones(3))
    print(f"   zeros[[0, 0, 1]] += 1  {once.tolist()}   index_add {summed.tolist()}")
    return {"cleared": cleared, "once": once.tolist(), "summed": summed.tolist()}


# --- broadcasting and einsum, from their definitions ---------------------------------------------


def loop_add(x, y):
    """x (N, 1) + y (M,) -> (N, M)."""
    out = torch.empty(len(x), len(y))
    for i, (p,) in enumerate(x):
        for j, q in enumerate(y):
            out[i, j] = p + q
    return out


def loop_einsum(equation, *operands):
    """At each place of all letters, the product of the operands, added to where `->` leads."""
    *inputs, output = equation.replace("->", ",").split(",")
    size = {}
    for letters, x in zip(inputs, operands, strict=True):
        for c, n in zip(letters, x.shape, strict=True):
            if size.setdefault(c, n) != n:
                raise ValueError(f"{c} in {equation} is {size[c]} and {n}")
    out = torch.zeros([size[c] for c in output], dtype=operands[0].dtype)
    for place in itertools.product(*map(range, size.values())):
        at = dict(zip(size, place, strict=True))
        pairs = zip(inputs, operands, strict=True)
        product = math.prod(x[tuple(at[c] for c in letters)] for letters, x in pairs)
        out[tuple(at[c] for c in output)] += product
    return out


def show_broadcasting():
    print("6. broadcasting: x (3, 1) + y (4,) against a loop, and a loss")
    x, y = torch.randn(3, 1), torch.randn(4)
    z = x + y
    assert torch.equal(z, loop_add(x, y))
    print(f"   {tuple(z.shape)}, read with strides {x.expand(z.shape).stride()} and "
          f"{y.expand(z.shape).stride()}: equal bit for bit")  # fmt: skip
    y = torch.randn(64)
    loss, theory = (y[:, None] - y).square().mean(), 2 * y.var(correction=0)  # (B, B) -> ()
    torch.testing.assert_close(loss, theory)
    print(f"   squared loss of y (B, 1) against y (B,) {loss:.4f}   theory 2 var(y) {theory:.4f}")

    print("7. einsum against a loop: largest difference")
    size = {"b": 2, "h": 2, "i": 3, "j": 3, "k": 2, "t": 3, "s": 4, "d": 2}
    for equation in ("i,j->ij", "ij,jk->ik", "ii->", "bi,ij,bj->b", "bhtd,bhsd->bhts"):
        inputs = equation.split("->")[0].split(",")
        operands = [torch.randn([size[c] for c in letters]) for letters in inputs]
        ours, library = loop_einsum(equation, *operands), torch.einsum(equation, *operands)
        torch.testing.assert_close(ours, library)
        print(f"   {equation:<16} {(ours - library).abs().max():.0e}")
    return {"loss": loss.item(), "theory": theory.item()}


# --- NumPy, time, the GPU ------------------------------------------------------------------------


def show_numpy():
    print("8. NumPy: one memory under two names")
    a, u = np.arange(6.0).reshape(2, 3), torch.zeros(3)
    t, v = torch.from_numpy(a), u.numpy()
    a[0, 0], t[1, 2], v[0], u[1] = 10, 20, 30, 40
    assert (t[0, 0], a[1, 2], u[0], v[1]) == (10, 20, 30, 40)
    print(f"   from_numpy(a)   array 10 -> tensor {t[0, 0]:g}   tensor 20 -> array {a[1, 2]:g}")
    print(f"   u.numpy()       array 30 -> tensor {u[0]:g}   tensor 40 -> array {v[1]:g}")
    part, shared = torch.from_numpy(a[:, ::2].T), {}
    for name, x in {"from_numpy(a[:, ::2].T)": part, "tensor(a)": torch.tensor(a)}.items():
        shared[name] = x.data_ptr() == a.ctypes.data
        print(f"   {name:<24} {x.dtype}   strides {x.stride()}   same memory {shared[name]}")
    return {"shared": shared}


def loop_distances(a, b):
    """Squared distances (N, M) of points a (N, D) and b (M, D), a Python step a pair."""
    return torch.stack([torch.stack([(p - q).square().sum() for q in b]) for p in a])


def distances(a, b):
    return (a[:, None] - b).square().sum(-1)  # (N, 1, D) - (M, D) -> (N, M, D) -> (N, M)


def seconds(work, *inputs, repeat):
    return min(timeit.repeat(lambda: work(*inputs), number=1, repeat=repeat))


def show_time(log_dir, powers):
    print("9. squared distances of n points to n points, a loop against one expression")
    ratios = {}
    with (
        SummaryWriter(log_dir / "loop", purge_step=0) as loop,
        SummaryWriter(log_dir / "vectorised", purge_step=0) as vectorised,
    ):
        for power in range(2, powers + 1):
            n = 2**power
            a, b = torch.randn(n, 3), torch.randn(n, 3)
            torch.testing.assert_close(loop_distances(a, b), distances(a, b))
            slow = seconds(loop_distances, a, b, repeat=2)
            fast = seconds(distances, a, b, repeat=20)
            loop.add_scalar("time/log10_seconds_per_pair", math.log10(slow / n**2), power)
            vectorised.add_scalar("time/log10_seconds_per_pair", math.log10(fast / n**2), power)
            ratios[n] = slow / fast
            print(f"   timing, n = {n:<4} the loop takes {ratios[n]:5.0f} times as long")
    return {"ratios": ratios}


def cuda_times(work, repeats=10):
    """Seconds until the calls of `work` returned, until the GPU was done, and by its own events."""
    work()  # the first call loads kernels
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    returned = time.perf_counter() - start
    torch.cuda.synchronize()
    return returned, time.perf_counter() - start, first.elapsed_time(last) / 1000  # from ms


def show_cuda(n=4096):
    print("10. the GPU: copies, pinned memory, time")
    if not torch.cuda.is_available():
        print("   skipped: no CUDA device here")
        return {}
    x = torch.randn(n, n)
    y, pinned = x.to("cuda"), x.pin_memory()
    assert torch.equal(y.cpu(), x) and y.to("cuda") is y and pinned.is_pinned()
    print("   there and back: equal bit for bit   to the device where it is: no copy")
    times = {
        "matmul": cuda_times(lambda: y @ y),
        "copy": cuda_times(lambda: x.to("cuda")),
        "pinned copy": cuda_times(lambda: pinned.to("cuda", non_blocking=True)),
    }
    for name, (returned, done, events) in times.items():
        print(f"   timing, {name:<12} returned after {returned / done:.3f} of the time   "
              f"by events {events / done:.3f}")  # fmt: skip
    faster = times["copy"][1] / times["pinned copy"][1]
    print(f"   timing, copying from pinned memory is {faster:.1f} times as fast")
    return {"cuda": times}


def main(seed=0, log_dir=LOG_DIR, powers=7):
    torch.manual_seed(seed)
    show_dtypes()
    return {
        **show_memory(log_dir),
        **show_indexing(),
        **show_broadcasting(),
        **show_numpy(),
        **show_time(log_dir, powers),
        **show_cuda(),
    }


if __name__ == "__main__":
    guard(main)
