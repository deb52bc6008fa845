"""A tensor is flat memory read with strides, so most operations on its shape copy nothing; a result
is computed on the device, CPU or GPU, where its inputs lie.

Models are made of a few calls: cat, stack, sum(dim=...), the matrix product @, indexing and
broadcasting. Two mistakes raise no error. A part of x may share memory with x: writing to the part
then changes x. And a column (B, 1) minus a row (B,), of B examples, is a table (B, B): the mean of
its squares looks like a loss (nn.MSELoss at least warns).

    address of x[i, j, ...] = offset + i * stride_0 + j * stride_1 + ...      (counted in elements)

    offset   where the first element lies      stride_k  how far one step along axis k goes
    view     a tensor that reads the memory of another one, with strides of its own

Slices, transposes, expand and most reshaping give a view. x[list] and x[mask] give a copy; but
x[list] = 0 and x[mask] = 0 write to x. Broadcasting reads an axis of size 1 as if it had n, by a
stride of 0.

Needs          nothing
Checked here   types; the address formula; where view fails, reshape copies; what writing to a part
               changes; a loss that broadcasts; einsum and distances against loops; the device
TensorBoard    memory/views_1, memory/views_2, memory/copies: the address of every element, darker
               where it is larger. Copies count row by row; views skip, repeat, go by columns
Try            in show_views, write (6, 2, 2) in the row ("x.T", x.T, (24,)): does view work now?
Answer         Yes: the axis of 4 became 2 x 2, each with one stride, so the strides are (1, 12, 6);
               one axis of 24 would need two strides
Source         PyTorch docs: "Tensor Views", Tensor.view, "Broadcasting semantics", "Tensor
               Attributes" (type promotion), "CUDA semantics" (asynchronous execution)
"""

import itertools
import math
import re
import signal
import time
import timeit
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from support.files import guard
from support.pictures import caption_row, number_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "08_tensor_operations_and_gpu"


# --- 1. in everyday code -----------------------------------------------------------------------


def stack(tensors, dim):
    """torch.stack: each tensor gets a new axis of size 1 at `dim`; along it they are joined.

    Exercise.
    """
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


def show_everyday():
    print("1. In everyday code: x is [[1., 2., 3.], [4., 5., 6.]], b is [10., 20., 30.]")
    print("   call                          shape       values")
    x, b = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([10.0, 20, 30])
    results = {
        "x[:, 1]": x[:, 1],
        "x + b": x + b,
        "x.sum(dim=0)": x.sum(dim=0),
        "x.sum(dim=1)": x.sum(dim=1),
        "x.mean(dim=1, keepdim=True)": x.mean(dim=1, keepdim=True),
        "x @ x.T": x @ x.T,
        "x.unsqueeze(0)": x.unsqueeze(0),
        "torch.cat([x, x])": torch.cat([x, x]),
        "torch.stack([x, x])": torch.stack([x, x]),
    }
    for call, y in results.items():
        values = re.sub(r"\.0\b", ".", str(y.tolist()).replace(" ", ""))  # 2. for 2.0, as torch
        print(f"   {call:<27}   {tuple(y.shape)!s:<9}   {values}")
    joined, stacked = results["torch.cat([x, x])"], results["torch.stack([x, x])"]
    assert torch.equal(stacked, stack([x, x], 0))
    print(f"   -> cat joins along an axis that is there: {len(x)} rows become {len(joined)}")
    print(f"   -> stack makes a new axis: {x.dim()} axes become {stacked.dim()}")
    return results


# --- 2. types ----------------------------------------------------------------------------------


def show_types():
    print("2. Types: what is the type of a + b, and why? (no axes: as torch.tensor(2))")
    print("   a               b                  a + b    its type   why")
    byte, half = torch.tensor([200], dtype=torch.uint8), torch.tensor([0.5], dtype=torch.half)
    double, long = torch.tensor([0.5], dtype=torch.double), torch.tensor([2])
    signed = torch.tensor([-1], dtype=torch.int8)
    types, default = {}, torch.get_default_dtype()
    for a, b, y, why in (
        ("uint8 [200]", "the number 100", byte + 100, "the tensor's type wins over a number"),
        ("uint8 [200]", "int64 2, no axes", byte + long[0], "a tensor with axes wins"),
        ("uint8 [200]", "int64 [2]", byte + long, "both have axes: a type for all values of both"),
        ("uint8 [200]", "int8 [-1]", byte + signed, "the same: for 0 to 255 and -128 to 127"),
        ("int64 [2]", "the number 0.5", long + 0.5, f"a float wins: the default type, {default}"),
        ("float16 [0.5]", "int64 [2]", half + long, "a float wins over integers of any size"),
        ("float16 [0.5]", "float64 [0.5]", half + double, "a type for all values of both"),
    ):
        types[a, b] = str(y.dtype).removeprefix("torch.")
        print(f"   {a:<13}   {b:<16}   {y.item():5g}    {types[a, b]:<8}   {why}")
    print(f"   -> 200 + 100 is {(byte + 100).item()} in uint8, which counts modulo 256")
    return types


# --- 3. memory ---------------------------------------------------------------------------------


def shares_memory(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def window(shape, strides, offset):
    """The address of each element, a tensor (*shape): offset + i * stride_0 + j * stride_1 + ...

    So row i of a matrix starts at offset + i * stride_0. Exercise.
    """
    at = torch.tensor(offset)
    for n, stride in zip(shape, strides, strict=True):
        at = at[..., None] + torch.arange(n) * stride  # (...) -> (..., n)
    return at


def addresses(x):
    return window(x.shape, x.stride(), x.storage_offset())


def show_memory(log_dir):
    print("3. Memory: x = torch.arange(24).view(4, 6). Which results read its memory, which copy?")
    print("   formula: [i, j] lies in memory at place offset + i * stride_0 + j * stride_1")
    print("                                                      place of")
    print("   tensor                 shape    strides   offset     [1, 1]   formula   memory")
    x, views, right = torch.arange(24).view(4, 6), {}, {}
    tensors = {
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
    }
    for name, y in tensors.items():
        memory = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())  # all of it, (n,)
        right[name], views[name] = torch.equal(memory[addresses(y)], y), shares_memory(x, y)
        row = f"{name:<20}   {tuple(y.shape)!s:<6}   {y.stride()!s:<7}   {y.storage_offset():6}"
        at = addresses(y)[1, 1].item()
        found, whose = "right" if right[name] else "WRONG", "of x" if views[name] else "new"
        print(f"   {row}   {at:8}   {found:<7}   {whose}")
    print("   (expand reads one row 4 times; unfold takes each 3 neighbours, one step apart)")
    copies = [name for name in views if not views[name]]
    print(f"   -> {len(copies)} of {len(views) - 1} ways to rearrange x copy: {', '.join(copies)}")
    log_memory(log_dir, tensors, views)
    return {"views": views, "right": right}


def log_memory(log_dir, tensors, views):
    of_x, new = [n for n in tensors if views[n]], [n for n in tensors if not views[n]]
    orange, blue = (255, 120, 0), (0, 120, 255)
    with SummaryWriter(log_dir / "memory", purge_step=0) as writer:
        for tag, title, names, ink in (
            ("views_1", "orange: addresses in the memory of x", of_x[:4], orange),
            ("views_2", "orange: addresses in the memory of x", of_x[4:], orange),
            ("copies", "blue: addresses in new memory", new, blue),
        ):
            grids = [number_grid(addresses(tensors[name]), ink, last=23) for name in names]
            words = [f"{name}\nstrides {tensors[name].stride()}" for name in names]
            writer.add_image(f"memory/{tag}", caption_row(title, grids, words), 0)


# --- 4. when view works ------------------------------------------------------------------------


def show_views():
    print("4. When does view work, and when does reshape copy? x is still (4, 6)")
    print("   tensor      its shape and strides   view as     view    new strides   reshape")
    x, found = torch.arange(24).view(4, 6), []
    for name, y, shape in (
        ("x", x, (24,)),
        ("x[:, ::2]", x[:, ::2], (12,)),
        ("x[:, :4]", x[:, :4], (4, 2, 2)),
        ("x[:, :4]", x[:, :4], (16,)),
        ("x.T", x.T, (24,)),
    ):
        try:
            view, strides = "works", y.view(shape).stride()
        except RuntimeError:
            view, strides = "fails", "-"
        reshape = "views" if shares_memory(y, y.reshape(shape)) else "copies"
        found.append((name, shape, view, strides, reshape))
        old = f"{tuple(y.shape)!s:<8} {y.stride()}"
        print(f"   {name:<9}   {old:<21}   {shape!s:<9}   {view}   {strides!s:<11}   {reshape}")
    agree = sum((view == "works") == (reshape == "views") for _, _, view, _, reshape in found)
    print(f"   -> in {agree} of {len(found)} rows reshape copies where view fails, and only there, "
          "as PyTorch says")  # fmt: skip
    (stride, step), rows = x.stride(), x.shape[1]
    print(f"   -> axes join if stride_0 = size_1 * stride_1: x has {stride} and {rows} * {step}, "
          f"x.T {x.T.stride(0)} and {x.T.shape[1]} * {x.T.stride(1)}")  # fmt: skip
    return found


# --- 5. writing to a part ----------------------------------------------------------------------


def show_writing():
    print("5. Writing: x holds 24 ones. Does writing to a part of it change x?")
    print("   statement                        zeros in x afterwards")
    zeros = {}
    for statement in (
        "x[:, 0].zero_()",
        "x[x > 0].zero_()",
        "x[[0, 1]].zero_()",
        "x[x > 0] = 0",
        "x[[0, 1], [2, 3]] = 0",
        "x.numpy()[0] = 0",  # on the CPU alone
        "torch.tensor(x.numpy()).zero_()",
    ):
        x = torch.ones(4, 6)
        exec(statement, {"x": x, "torch": torch})  # run just what is printed
        zeros[statement] = int((x == 0).sum())
        print(f"   {statement:<31}   {zeros[statement]:20}")
    print(f"   -> lost in a copy: {', '.join(name for name, n in zeros.items() if n == 0)}")
    return zeros


# --- 6. broadcasting ---------------------------------------------------------------------------


def show_broadcasting():
    print("6. Broadcasting: what becomes of (3, 1) with (4,), and of (B, 1) with (B,)?")
    print("   tensor   shape    strides as (3, 4)   numbers")
    x, y = torch.tensor([[0], [10], [20]]), torch.tensor([1, 2, 3, 4])
    for name, t in {"x": x, "y": y, "x + y": x + y}.items():
        strides = t.expand(3, 4).stride()
        print(f"   {name:<6}   {tuple(t.shape)!s:<6}   {strides!s:<17}   {t.tolist()}")
    truth = torch.randn(64)
    prediction = truth[:, None]  # all 64 are right, but the shape is (64, 1)
    loss, theory = (prediction - truth).square().mean().item(), 2 * truth.var(correction=0).item()
    aligned = (prediction.squeeze(1) - truth).square().mean().item()
    shape = tuple((prediction - truth).shape)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        F.mse_loss(prediction, truth)
    print(f"   -> the squared loss of perfect predictions is {aligned:.4f} if both are (64,)")
    print(f"   -> (64, 1) minus (64,) is {shape}, and the loss is {loss:.4f}")
    print(f"   -> that is twice the variance of the truths, {theory:.4f}; minus does not warn, "
          f"F.mse_loss {'warns' if said else 'does not either'}")  # fmt: skip
    return {"loss": loss, "theory": theory, "aligned": aligned}


# --- 7. einsum ---------------------------------------------------------------------------------


def loop_einsum(equation, *operands):
    """torch.einsum by a loop over all places, that is over all values of all letters.

    At each place the operands, each read at its own letters, are multiplied, and the product is
    added to the output at the letters after `->`: the other letters are summed over.
    Raises ValueError where one letter stands for two sizes. Exercise.
    """
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


def show_einsum():
    print('7. einsum, as torch.einsum("ij,jk->ik", A, B): is it a loop over all letters?')
    print("   One letter names one axis. A letter that does not stand after -> is summed over.")
    print("                                                       one element         largest")
    print("   equation          in words                          loop      einsum    difference")
    size = {"b": 2, "h": 2, "i": 3, "j": 3, "k": 2, "t": 3, "s": 4, "d": 2}
    errors = {}
    for equation, words in {
        "i,j->ij": "each of x times each of y",
        "ij,jk->ik": "the matrix product A @ B",
        "ii->": "the sum of the diagonal",
        "bi,ij,bj->b": "x^T A y for each example b",
        "bhtd,bhsd->bhts": "q[b, h] @ k[b, h].T",
    }.items():
        inputs = equation.split("->")[0].split(",")
        operands = [torch.randn([size[c] for c in letters]) for letters in inputs]
        ours, theirs = loop_einsum(equation, *operands), torch.einsum(equation, *operands)
        errors[equation] = (ours - theirs).abs().max().item()
        first = f"{ours.flatten()[0]:7.4f}   {theirs.flatten()[0]:7.4f}"
        print(f"   {equation:<15}   {words:<29}   {first}   {errors[equation]:10.0e}")
    same = sum(error < 1e-5 for error in errors.values())
    print(f"   -> torch.einsum gives what the loop gives in {same} of {len(errors)} rows")
    return errors


# --- 8. time -----------------------------------------------------------------------------------


def loop_distances(a, b):
    """Squared distances (N, M) of points a (N, D) and b (M, D): a Python step for each pair."""
    return torch.stack([torch.stack([(p - q).square().sum() for q in b]) for p in a])


def distances(a, b):
    """Squared distances (N, M) of points a (N, D) and b (M, D) in one expression, without a loop.

    Exercise.
    """
    return (a[:, None] - b).square().sum(-1)  # (N, 1, D) - (M, D) -> (N, M, D) -> (N, M)


def seconds(work, *inputs, repeat=5):
    return min(timeit.repeat(lambda: work(*inputs), number=1, repeat=repeat))


def show_time(n):
    print(f"8. Time: squared distances of {n} points to {n}, by a loop and in one expression")
    a, b = torch.randn(n, 3), torch.randn(n, 3)
    ours, slow, library = distances(a, b), loop_distances(a, b), torch.cdist(a, b).square()
    print("   from a[0] to b[0]:   loop   expression   torch.cdist, squared")
    print(f"   {slow[0, 0]:24.4f}   {ours[0, 0]:10.4f}   {library[0, 0]:20.4f}")
    error = max((other - ours).abs().max().item() for other in (slow, library))
    assert error < 1e-3  # cdist multiplies matrices, and rounds more
    ratio = seconds(loop_distances, a, b) / seconds(distances, a, b)
    print(f"   -> timing: for {n * n:,} pairs the loop takes {ratio:.0f} times as long")
    print(f"      (the expression holds all {n * n * 3:,} differences at once)")
    return {"error": error, "ratio": ratio}


# --- 9. the device -----------------------------------------------------------------------------


def show_device():
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    print(f"9. The device: the same lines on whatever is there, which is {device.type}")
    x, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0], [1.0]])
    y = x.to(device)
    z = y @ W.to(device)  # both on one device; a tensor without axes may stay on the CPU
    try:
        z + torch.zeros(1, 1, device="meta")
        refused = "nothing"
    except RuntimeError as error:
        refused = str(error)
    print("   call                                     device   result")
    print(f"   y = x.to(device)                         {y.device.type:<6}   {y.tolist()}")
    print(f"   z = y @ W.to(device)                     {z.device.type:<6}   {z.tolist()}")
    print(f"   z + torch.zeros(1, 1, device='meta')     -        {refused}")
    print("   (meta is a device on every machine; it keeps shapes and no numbers)")
    if refused != "nothing":
        print("   -> tensors on two devices cannot be added: move both to one by to(device)")
    print(f"   -> to(device) {'returned x itself, as x was there' if y is x else 'copied x'}")
    return {"device": device.type, "copied": y is not x, "z": z.item(), "refused": refused}


def cuda_times(work, repeats=10):
    """Seconds until so many calls of `work` have returned, and until the GPU has done them."""
    work()  # the first call loads kernels
    torch.cuda.synchronize()  # wait for the GPU
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    returned = time.perf_counter() - start
    torch.cuda.synchronize()
    return returned, time.perf_counter() - start


def show_cuda(n=4096):
    if not torch.cuda.is_available():
        print(
            "   skipped: no CUDA GPU here. On one, a call returns before the GPU has finished, and"
        )
        print("   copies from pinned memory, which the GPU reads by itself, are faster")
        return {}
    x = torch.randn(n, n)
    y, pinned = x.to("cuda"), x.pin_memory()  # non_blocking: change pinned only after synchronize
    times = {
        "y @ y": cuda_times(lambda: y @ y),
        "x.to('cuda')": cuda_times(lambda: x.to("cuda")),
        "the same, pinned": cuda_times(lambda: pinned.to("cuda", non_blocking=True)),
    }
    print("   ten calls          timing: returned after this share of the time until all is done")
    for name, (returned, done) in times.items():
        print(f"   {name:<16}   {returned / done:.3f}")
    faster = times["x.to('cuda')"][1] / times["the same, pinned"][1]
    print(f"   -> timing: copying from pinned memory is {faster:.1f} times as fast")
    return times


def main(seed=0, log_dir=LOG_DIR, n=128):
    torch.manual_seed(seed)
    measured = {
        "everyday": show_everyday(),
        "types": show_types(),
        "memory": show_memory(log_dir),
        "found": show_views(),
        "writing": show_writing(),
        "broadcasting": show_broadcasting(),
        "einsum": show_einsum(),
        "time": show_time(n),
        "device": show_device(),
        "cuda": show_cuda(),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
