"""A Jacobian costs one backward pass per output or one forward-mode pass per input.

f: R^n -> R^m has the Jacobian J (m, n): row i holds the derivatives of output i, column j those
with respect to input j. A backward pass goes from one output back to all inputs and gives a row. A
forward-mode pass computes, with each value, its slope along one direction of the inputs: it gives a
column. A loss has one output, so one backward pass is its whole gradient: training uses backward().
The Hessian H (n, n) of a loss is the Jacobian of its gradient. For a million weights it takes 4 TB
in float32, but its product with a vector needs no H.

    VJP   u J    vector-Jacobian product: one backward pass;        u = e_i gives row i of J
    JVP   J v    Jacobian-vector product: one forward-mode pass;    v = e_j gives column j of J
    HVP   H v    Hessian-vector product: the VJP of the gradient; in section 3 it costs 2 gradients

    n  inputs     m  outputs     u (m,), v (n,)  any vectors     e_i  all 0, but 1 at place i

Needs          02_autograd_basics.py, 04_hooks.py
Checked here   J by rows, by columns, by jacrev and jacfwd (which run all passes as one batch) and
               by hand; passes counted; H v and its cost. Second reading: Newton's method, a step of
               -H^-1 times the gradient; a penalty in a loss, which keeps a gradient near length 1
TensorBoard    jacobian/log2_passes by log2 m: the run reverse rises, forward is level;
               hessian/log2_cost by log2 n: hessian rises, hvp is level; newton/log10_error by step:
               descent is level, newton falls; penalty/grad_norm by step: only penalty stays near 1
Try            before the last line of show_everyday, add
               print(hvp(loss, x, torch.tensor([1.0, 0.0]))): which part of H will you see?
Answer         [6, 4], column 0 of H; H is symmetric, so it is row 0 as well. hvp built no H
Source         Pearlmutter 1994, Neural Computation 6(1), for H v; Rosenbrock 1960, The Computer
               Journal 3(3); Gulrajani et al. 2017, arXiv:1704.00028, eq. 3, for the penalty
"""

import math
import signal
import warnings
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "05_jacobian_and_advanced_autograd"
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday():
    def f(x):
        return torch.stack([x[0] * x[1], x[0] ** 2, x[1]])  # R^2 -> R^3

    def loss(x):
        return x[0] ** 2 * x[1]  # R^2 -> R

    x, u, v = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, -1.0])
    J = jacrev(f)(x)  # (3, 2)
    J_fwd = jacfwd(f)(x)  # (3, 2), the same numbers
    _, pull_back = vjp(f, x)  # f(x), and the function pull_back: u -> (u J,)
    _, Jv = jvp(f, (x,), (v,))  # f(x) and J v, without J
    H = hessian(loss)(x)  # (2, 2)
    results = {"J": J, "jacfwd": J_fwd, "uJ": pull_back(u)[0], "Jv": Jv, "H": H}

    print("1. In everyday code: f(x) = (x0 x1, x0^2, x1) at x = (2, 3), and its J")
    print("   jacrev(f)(x)                   by x0    by x1")
    for name, row in zip(("f0 = x0 x1", "f1 = x0^2", "f2 = x1"), J, strict=True):
        print(f"   row of {name:<18} {row[0]:9.1f}{row[1]:9.1f}")
    print(f"   jacfwd(f)(x)     differs by {(J_fwd - J).abs().max():g}")
    print("   vjp: u J with u = (1, 0, 2)    by x0    by x1")
    print(f"   = row 0 + 2 row 2         {''.join(f'{t:9.1f}' for t in results['uJ'])}")
    print("   jvp: J v with v = (1, -1)     for f0   for f1   for f2")
    print(f"   = column 0 - column 1     {''.join(f'{t:9.1f}' for t in Jv)}")
    print("   hessian of x0^2 x1             by x0    by x1")
    for name, row in zip(("d/dx0 = 2 x0 x1", "d/dx1 = x0^2"), H, strict=True):
        print(f"   row of {name:<18} {row[0]:9.1f}{row[1]:9.1f}")
    print(f"   -> J has {len(J)} rows, one per output, and {J.shape[1]} columns, one per input")
    return results


# --- 2. rows or columns ------------------------------------------------------------------------


def jacobian_by_rows(f, x):
    """J (m, n) of f: (n,) -> (m,) at x, by m backward passes.

    Row i is torch.autograd.grad(y, x, e_i, retain_graph=True)[0], where y = f(x) and x requires a
    gradient. Raises ValueError if y is not a vector. Exercise.
    """
    x = x.detach().requires_grad_()
    y = f(x)
    if y.dim() != 1:
        raise ValueError(f"f must give a vector (m,), not {tuple(y.shape)}")
    units = torch.eye(len(y), dtype=y.dtype)
    return torch.stack([torch.autograd.grad(y, x, e, retain_graph=True)[0] for e in units])


def jacobian_by_columns(f, x):
    """J (m, n) of f: (n,) -> (m,) at x, by n forward-mode passes: column j is J e_j. Exercise."""
    units = torch.eye(len(x), dtype=x.dtype)
    return torch.stack([jvp(f, (x,), (e,))[1] for e in units], dim=1)


def two_layers(n, m, hidden=16):
    """f(x) = B tanh(A x): R^n -> R^m, and its Jacobian B diag(1 - tanh^2) A by hand."""
    A = torch.randn(hidden, n, dtype=F64) / n**0.5
    B = torch.randn(m, hidden, dtype=F64) / hidden**0.5

    def f(x):
        return B @ torch.tanh(A @ x)

    def jacobian(x):
        return B @ ((1 - torch.tanh(A @ x) ** 2)[:, None] * A)

    return f, jacobian


def counted(f, passes):
    """f, noting in the Counter `passes` each evaluation and each pass back through it."""

    def g(x):
        passes["forward"] += 1
        y = f(x)
        if y.requires_grad:
            y.register_hook(lambda _: passes.update(["backward"]))
        return y

    return g


def flops(compute, *args):
    """Floating-point operations in matrix products, the matrix-vector ones included."""
    product = {torch.ops.aten.mv: lambda shape, *_, **__: 2 * shape[0] * shape[1]}
    with FlopCounterMode(display=False, custom_mapping=product) as counter:
        compute(*args)
    return counter.get_total_flops()


def show_modes(log_dir, n, outputs):
    print(f"2. J of f(x) = B tanh(A x), R^{n} -> R^m: rows or columns, which multiply less?")
    print("         backward passes   forward-mode passes   multiplications                largest")
    print("      m     for the rows       for the columns    rows / columns   J[0, 0]   difference")
    counts, work = {}, {}
    for m in outputs:
        f, jacobian = two_layers(n, m)
        x, reverse, forward = torch.randn(n, dtype=F64), Counter(), Counter()
        by_rows = jacobian_by_rows(counted(f, reverse), x)
        by_columns = jacobian_by_columns(counted(f, forward), x)
        ways = by_rows, by_columns, jacrev(f)(x), jacfwd(f)(x)
        apart = max((J - jacobian(x)).abs().max().item() for J in ways)
        assert apart < 1e-12
        counts[m] = reverse["backward"], forward["forward"]
        work[m] = flops(jacobian_by_rows, f, x) / flops(jacobian_by_columns, f, x)
        row = f"{counts[m][0]:17d}   {counts[m][1]:19d}   {work[m]:15.2f}"
        print(f"   {m:4d}{row}   {by_rows[0, 0]:7.4f}   {apart:10.0e}")
    for run, way in (("reverse", 0), ("forward", 1)):
        curve = {math.log2(m): math.log2(counts[m][way]) for m in outputs}
        draw(log_dir / run, "jacobian/log2_passes", curve)
    print("   difference: of jacobian_by_rows and _by_columns, jacrev and jacfwd from J by hand")
    # A forward-mode pass computes y = A x, A x' and A' x, for the slopes x' of x and A' = 0 of A.
    once = flops(f, x)
    back, ahead = (flops(jacobian_by_rows, f, x) / once - 1) / m, flops(jvp, f, (x,), (x,)) / once
    rows = ", ".join(str(m) for m in outputs if work[m] < 1)
    columns = ", ".join(str(m) for m in outputs if work[m] > 1)
    print(f"   -> take rows for m = {rows}; take columns for m = {columns}")
    print(f"   -> a backward pass takes {back:.2g} times the multiplications of f, a forward-mode "
          f"pass {ahead:.2g}\n      times (PyTorch also multiplies the slopes of A and B, which "
          f"are 0): both ways cost the same at m = {(ahead * n - 1) / back:.0f}")  # fmt: skip
    return {"counts": counts, "work": work, "back": back, "ahead": ahead}


# --- 3. H v without H --------------------------------------------------------------------------


def hvp(f, x, v):
    """H v (n,) of a scalar f at x (n,), as the VJP of grad(f): H is symmetric. Exercise."""
    _, pull_back = vjp(grad(f), x)
    return pull_back(v)[0]


def log_sum_exp(n):
    """f(x) = log sum exp(A x): R^n -> R, and its Hessian by hand as the function v -> H v."""
    A = torch.randn(8, n, dtype=F64) / n**0.5

    def f(x):
        return torch.logsumexp(A @ x, 0)

    def times(x, v):
        p = torch.softmax(A @ x, 0)
        return A.T @ (p * (A @ v) - p * (p @ (A @ v)))  # H = A^T (diag p - p p^T) A

    return f, times


def show_hvp(log_dir, sizes, large):
    print("3. log sum exp(A x), x in R^n: what do H v and H cost, if one gradient costs 1?")
    print("   cost: multiplications in matrix products. H in float64. difference: from H v by hand")
    print("         n   cost of H v   of H, by rows        memory of H    (H v)[0]   difference")
    costs = {"hvp": {}, "hessian": {}}
    for n in (*sizes, large):
        f, by_hand = log_sum_exp(n)
        x, v = torch.randn(2, n, dtype=F64)
        Hv = hvp(f, x, v)
        apart = (Hv - by_hand(x, v)).abs().max().item()
        assert apart < 1e-12
        one, whole = flops(grad(f), x), "not built"
        costs["hvp"][n] = flops(hvp, f, x, v) / one
        if n != large:
            H = jacobian_by_rows(grad(f), x)
            assert (H - hessian(f)(x)).abs().max() < 1e-12
            costs["hessian"][n] = flops(jacobian_by_rows, grad(f), x) / one
            whole = f"{costs['hessian'][n]:.0f}"
        row = f"{costs['hvp'][n]:11.0f}   {whole:>13}   {8 * n**2 / 1e6:13,.3f} MB"
        print(f"   {n:7,}   {row}   {Hv[0]:9.1e}   {apart:10.0e}")
    for run, curve in costs.items():
        logs = {math.log2(n): math.log2(cost) for n, cost in curve.items()}
        draw(log_dir / run, "hessian/log2_cost", logs)
    flat = set(costs["hvp"].values())
    print(f"   -> H v costs {' or '.join(f'{c:.0f}' for c in flat)} gradients at every n")
    return costs


# --- 4. second reading: Newton's method --------------------------------------------------------


def rosenbrock(p):
    """A valley as curved as a banana: least at (1, 1)."""
    x, y = p
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def newton(f, p, steps):
    """Path (steps + 1, n) of p - H^-1 grad f: to any point where grad f is 0, also a saddle."""
    path = [p]
    for _ in range(steps):
        p = p - torch.linalg.solve(jacobian_by_rows(grad(f), p), grad(f)(p))
        path.append(p)
    return torch.stack(path)


def descent(f, p, lr, steps):
    """Path (steps + 1, n) of p - lr grad f."""
    path = [p]
    for _ in range(steps):
        p = p - lr * grad(f)(p)
        path.append(p)
    return torch.stack(path)


def show_newton(log_dir, start=(0.8, 0.6), steps=6, lr=1e-3):
    print(f"4. From {start} to the minimum (1, 1) of Rosenbrock's function: the distance to it")
    print(f"   step   descent: p - {lr:g} gradient   Newton: p - H^-1 gradient")
    p, best = torch.tensor(start, dtype=F64), torch.ones(2, dtype=F64)
    slow = (descent(rosenbrock, p, lr, steps) - best).norm(dim=1).tolist()
    fast = (newton(rosenbrock, p, steps) - best).norm(dim=1).tolist()
    for k in range(steps + 1):
        print(f"   {k:4d}   {slow[k]:27.1e}   {fast[k]:25.1e}")
    for run, errors in {"descent": slow, "newton": fast}.items():
        logs = {k: math.log10(max(error, 1e-16)) for k, error in enumerate(errors)}
        draw(log_dir / run, "newton/log10_error", logs)
    print(f"   -> left after {steps} steps: {slow[-1]:.0e} by descent, {fast[-1]:.0e} by Newton")
    steepest = torch.linalg.eigvalsh(jacobian_by_rows(grad(rosenbrock), best)).max().item()
    print(f"      (near the minimum descent diverges with a step over {2 / steepest:.4f}; a Newton")
    print("      step needs H, which costs n + 1 gradients, and solves a system)")
    return {"descent": slow, "newton": fast}


# --- 5. second reading: a gradient inside the loss ---------------------------------------------


def gradient_penalty(D, x, create_graph=True):
    """The mean over the samples x (B, n) of (|dD/dx| - 1)^2, for D: (B, n) -> (B,).

    If D does not mix samples (BatchNorm would), row i of the gradient of D(x).sum() is the gradient
    of sample i. create_graph=True lets autograd differentiate that gradient again. Exercise.
    """
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(D(x).sum(), x, create_graph=create_graph)  # (B, n)
    return (g.norm(dim=1) - 1).square().mean()


def train_critic(weight, create_graph, steps, shift, lr=0.02):
    """SGD on D(0) - D(shift) + weight * penalty for a critic D(x) = a . x: |a| after each step."""
    a, d = torch.tensor([0.6, 0.8], requires_grad=True), torch.tensor(shift)
    optimizer, lengths = torch.optim.SGD([a], lr), []
    for _ in range(steps):
        penalty = gradient_penalty(lambda x: x @ a, torch.rand(4, 1) * d, create_graph)
        loss = -(d @ a) + weight * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lengths.append(a.detach().norm().item())
    return lengths


def show_penalty(log_dir, steps=100, weight=10.0, shift=(3.0, 0.0)):
    print(
        f"5. Train D(x) = a . x to raise D(d) - D(0), d = {shift}: can a penalty keep |a| near 1?"
    )
    print(
        "   loss = D(0) - D(d) + weight (|dD/dx| - 1)^2, where dD/dx is a. With create_graph=True"
    )
    print("   the call that gives dD/dx is itself recorded, so the penalty has a gradient, too")
    print(f"   run               weight   create_graph   |a| after {steps} steps")
    runs = {"penalty": (weight, True), "none": (0.0, True), "no_create_graph": (weight, False)}
    lengths = {}
    for run, (strength, create_graph) in runs.items():
        lengths[run] = train_critic(strength, create_graph, steps, shift)
        draw(log_dir / run, "penalty/grad_norm", dict(enumerate(lengths[run], 1)))
        print(f"   {run:<16} {strength:7.0f}   {create_graph!s:>12}   {lengths[run][-1]:19.4f}")
    least = 1 + math.hypot(*shift) / (2 * weight)
    print(f"   -> with the penalty |a| is {lengths['penalty'][-1]:.4f}; the loss is least at "
          f"1 + |d| / (2 weight) = {least:.4f}")  # fmt: skip
    if lengths["none"] == lengths["no_create_graph"]:
        print("   -> without create_graph |a| is as without a penalty, and no error is raised")
    return lengths


# --- the run -----------------------------------------------------------------------------------


def load_forward_mode():
    """The first JVP loads TorchScript code of PyTorch's own, which warns of its deprecation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`")
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def draw(log_dir, tag, curve):
    """Write a dict {step: value} as one curve."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in curve.items():
            writer.add_scalar(tag, value, round(step))


def main(
    seed=0, log_dir=LOG_DIR, inputs=32, outputs=(1, 8, 32, 128, 1024), sizes=(16, 64, 256),
    large=2**17,
):  # fmt: skip
    torch.manual_seed(seed)
    load_forward_mode()
    measured = {
        "everyday": show_everyday(),
        "modes": show_modes(log_dir, inputs, outputs),
        "costs": show_hvp(log_dir, sizes, large),
        "newton": show_newton(log_dir),
        "lengths": show_penalty(log_dir),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
