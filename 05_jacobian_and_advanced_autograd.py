"""A Jacobian costs m backward or n forward-mode passes; a product H v a few gradients, at any n.

    f: R^n -> R^m   J = df/dx of shape (m, n)
    VJP   u^T J     one backward pass; u = e_i gives row i of J: m passes for J
    JVP   J v       one forward-mode pass; v = e_j gives column j of J: n passes for J
    HVP   H v       VJP of the gradient: here 2 gradients' products at any n; H costs 1 + n
    Newton          x - H^-1 grad f turns the error e into H^-1 T(e, e) / 2 + O(|e|^3), where
                    T(e, e) = d^2/dt^2 grad f(x* + t e): near x* its exponent about doubles

A loss has m = 1: one backward pass is its whole gradient, so networks learn in reverse mode. With
create_graph=True a gradient is a function like any other: differentiated again, multiplied,
penalised. Without, a gradient penalty is a constant in the loss: no error, and no effect.

Checked here   J by rows, by columns, by torch.func and by hand; passes counted and timed; H is
               symmetric and the closed form, H v too; both costs, in FLOPs of matrix products;
               Newton's error against T, gradient descent's factor against 1 - lr lambda_min;
               a critic's gradient norm a for data shifted by d: max a |d| - weight (a - 1)^2 lies
               at a = 1 + |d| / (2 weight)
TensorBoard    jacobian/log2_passes by log2 m: slope 1 against 0; hessian/log2_cost by log2 n, the
               same; rosenbrock/log10_error by step (all three without smoothing);
               penalty/grad_norm by step: none and no_create_graph are one line
Try            main(weight=1): where does the gradient norm settle now? At 1 + 3 / 2 = 2.5
Source         Pearlmutter 1994, Neural Computation 6(1), for H v; Rosenbrock 1960, The Computer
               Journal 3(3); Gulrajani et al. 2017, arXiv:1704.00028, eq. 3, for the penalty
"""

import math
import signal
import timeit
import warnings
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "05_jacobian_and_advanced_autograd"
F64 = torch.float64
TIGHT = {"rtol": 0, "atol": 1e-12}


# --- derivatives -------------------------------------------------------------------------------


def jacobian_by_rows(f, x):
    """J (m, n) of f: (n,) -> (m,), by m vector-Jacobian products e_i^T J; jacrev batches them."""
    x = x.detach().requires_grad_()
    y = f(x)
    if y.dim() != 1:
        raise ValueError(f"f must give a vector (m,), not {tuple(y.shape)}")
    units = torch.eye(len(y), dtype=y.dtype)
    return torch.stack([torch.autograd.grad(y, x, e, retain_graph=True)[0] for e in units])


def jacobian_by_columns(f, x):
    """J (m, n) of f: (n,) -> (m,), by n products J e_j, with an evaluation of f in each."""
    units = torch.eye(len(x), dtype=x.dtype)
    return torch.stack([jvp(f, (x,), (e,))[1] for e in units], dim=1)


def hvp(f, x, v):
    """H v (n,) of a scalar f, as v^T H, for H is symmetric; H itself is never built."""
    _, pull_back = vjp(grad(f), x)
    return pull_back(v)[0]


def third(f, x, e):
    """T(e, e) (n,): the change of H e along e."""
    return jvp(lambda x: hvp(f, x, e), (x,), (e,))[1]


def gradient_norms(critic, x, create_graph=True):
    """|grad_x D(x)| (B,) of every sample; D must not mix samples, as BatchNorm would."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=create_graph)  # (B, n)
    return g.norm(dim=1)


def load_forward_mode():
    """The first JVP loads TorchScript code of PyTorch's own, which warns of its deprecation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`")
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


# --- functions to differentiate ----------------------------------------------------------------


def two_layers(n, m, hidden=16):
    """f(x) = B tanh(A x): R^n -> R^m, and its Jacobian B diag(1 - tanh^2) A by hand."""
    A = torch.randn(hidden, n, dtype=F64) / n**0.5
    B = torch.randn(m, hidden, dtype=F64) / hidden**0.5

    def f(x):
        return B @ torch.tanh(A @ x)

    def jacobian(x):
        return B @ ((1 - torch.tanh(A @ x) ** 2)[:, None] * A)

    return f, jacobian


def rosenbrock(p):
    x, y = p
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


# --- passes, work, time ------------------------------------------------------------------------


def counted(f, passes):
    """f, noting in the Counter `passes` each evaluation and each pass back through it."""

    def g(x):
        passes["evaluations"] += 1
        y = f(x)
        if y.requires_grad:
            y.register_hook(lambda _: passes.update(["backward"]))
        return y

    return g


def flops(compute, *args):
    """Floating-point operations in matrix products, the matrix-vector ones included."""
    product = {torch.ops.aten.mv: lambda A, x, **_: 2 * A[0] * A[1]}
    with FlopCounterMode(display=False, custom_mapping=product) as counter:
        compute(*args)
    return counter.get_total_flops()


def seconds(compute, *args):
    """The shortest of five runs."""
    return min(timeit.repeat(lambda: compute(*args), number=1, repeat=5))


def compare_modes(n, m):
    """Reverse passes, forward-mode passes and their ratio of times, for a J (m, n)."""
    f, jacobian = two_layers(n, m)
    x, u, v = (torch.randn(size, dtype=F64) for size in (n, m, n))
    J, reverse, forward = jacobian(x), Counter(), Counter()
    torch.testing.assert_close(jacobian_by_rows(counted(f, reverse), x), J, **TIGHT)
    torch.testing.assert_close(jacobian_by_columns(counted(f, forward), x), J, **TIGHT)
    for library in (jacrev, jacfwd):
        torch.testing.assert_close(library(f)(x), J, **TIGHT)
    torch.testing.assert_close(vjp(f, x)[1](u)[0], u @ J, **TIGHT)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], J @ v, **TIGHT)
    assert reverse == {"evaluations": 1, "backward": m} and forward == {"evaluations": n}
    ratio = seconds(jacobian_by_rows, f, x) / seconds(jacobian_by_columns, f, x)
    return reverse["backward"], forward["evaluations"], ratio


def compare_hessian(n, build):
    """Error of H v, costs of H v and of H (None unless `build`) in gradients, for log sum exp."""
    A = torch.randn(8, n, dtype=F64) / n**0.5
    x, v = torch.randn(2, n, dtype=F64)

    def f(x):
        return torch.logsumexp(A @ x, 0)

    p = torch.softmax(A @ x, 0)
    W = torch.diag(p) - torch.outer(p, p)  # H = A^T W A
    Hv, expected = hvp(f, x, v), A.T @ (W @ (A @ v))
    torch.testing.assert_close(Hv, expected, **TIGHT)
    gradient, whole = flops(grad(f), x), None
    if build:
        H = jacobian_by_rows(grad(f), x)
        for same in (H.T, A.T @ W @ A, hessian(f)(x)):
            torch.testing.assert_close(H, same, **TIGHT)
        torch.testing.assert_close(Hv, H @ v, **TIGHT)
        whole = flops(jacobian_by_rows, grad(f), x) / gradient
    return (Hv - expected).abs().max().item(), flops(hvp, f, x, v) / gradient, whole


# --- what they are good for --------------------------------------------------------------------


def newton(f, p, steps):
    """Path (steps + 1, n) of p - H^-1 grad f: to a point without slope, a saddle as well."""
    path = [p]
    for _ in range(steps):
        p = p - torch.linalg.solve(jacobian_by_rows(grad(f), p), grad(f)(p))
        path.append(p)
    return torch.stack(path)


def gradient_descent(f, p, lr, steps):
    """Path (steps + 1, n) of p - lr grad f."""
    path = [p]
    for _ in range(steps):
        p = p.detach().requires_grad_()
        p = p - lr * torch.autograd.grad(f(p), p)[0]
        path.append(p.detach())
    return torch.stack(path)


def compare_descents(start, newton_steps, descent_steps, lr):
    """Errors |p - p*| of both on Rosenbrock's function, step by step, and what theory says."""
    p, best = torch.tensor(start, dtype=F64), torch.ones(2, dtype=F64)
    H = jacobian_by_rows(grad(rosenbrock), best)
    e = newton(rosenbrock, p, newton_steps) - best  # (newton_steps + 1, 2)
    after = [torch.linalg.solve(H, third(rosenbrock, best, d)).norm() / 2 for d in e[:-1]]
    descent = (gradient_descent(rosenbrock, p, lr, descent_steps) - best).norm(dim=1)
    return {
        "newton": e.norm(dim=1).clamp(min=torch.finfo(F64).eps).log10().tolist(),
        "predicted": torch.stack(after).log10().tolist(),
        "descent": descent.log10().tolist(),
        "factor": (descent[-1] / descent[-2]).item(),
        "factor_theory": 1 - lr * torch.linalg.eigvalsh(H)[0].item(),
    }


def train_critic(seed, weight, create_graph, steps, shift, batch=128):
    """Widen E D(x + d) - E D(x), |d| = shift: the weights of D, and E |grad_x D| by step."""
    torch.manual_seed(seed)
    critic = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.5, 0.9))
    norms = []
    for _ in range(steps):
        fake = torch.randn(batch, 2)
        real = torch.randn(batch, 2) + torch.tensor([shift, 0.0])
        t = torch.rand(batch, 1)
        norm = gradient_norms(critic, t * real + (1 - t) * fake, create_graph)  # (B,)
        penalty = (norm - 1).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + weight * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norms.append(norm.mean().item())
    return nn.utils.parameters_to_vector(critic.parameters()), norms


# --- the run -----------------------------------------------------------------------------------


def write_curve(log_dir, tag, points):
    """One TensorBoard run from {step: value}."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in points.items():
            writer.add_scalar(tag, value, round(step))


def main(
    seed=0,
    log_dir=LOG_DIR,
    inputs=32,
    outputs=(1, 8, 32, 128, 1024),
    sizes=(16, 64, 256),
    large=2**17,
    start=(-1.2, 1.0),
    descent_steps=10_000,
    critic_steps=300,
    shift=3.0,
    weight=10.0,
):
    torch.manual_seed(seed)
    load_forward_mode()

    print(f"1. J of f: R^{inputs} -> R^m by rows and by columns: passes; time rows / columns")
    modes = {m: compare_modes(inputs, m) for m in outputs}
    for m, (backward, forward, _) in modes.items():
        print(f"   m {m:5}   backward {backward:5}   forward-mode {forward:3}")
    print("   time", "   ".join(f"{modes[m][2]:.2g} (m {m})" for m in outputs))
    for row, run in enumerate(("reverse", "forward")):
        points = {math.log2(m): math.log2(modes[m][row]) for m in outputs}
        write_curve(log_dir / run, "jacobian/log2_passes", points)

    print("2. log sum exp(A x), x in R^n: error of H v; H v and H in gradients, theory 2 and 1 + n")
    costs = {n: compare_hessian(n, build=n != large) for n in (*sizes, large)}
    assert all(costs[n][1:] == (2, 1 + n) for n in sizes) and costs[large][1] == 2
    for n, (error, product, whole) in costs.items():
        H = f"{whole:.0f}" if whole else f"not built, {8 * n**2 / 1e9:.0f} GB"
        print(f"   n {n:7,}   error {error:.0e}   H v {product:.0f}   H {H}")
    for row, run, built in ((1, "hvp", costs), (2, "hessian", sizes)):
        points = {math.log2(n): math.log2(costs[n][row]) for n in built}
        write_curve(log_dir / run, "hessian/log2_cost", points)

    print(f"3. Rosenbrock from {start}: log10 |e|, float64 ends at -15.65")
    paths = compare_descents(start, 7, descent_steps, lr=1e-3)
    for k, e in enumerate(paths["newton"]):
        by_T = f"{paths['predicted'][k - 1]:6.2f}" if k else "      "
        print(f"   step {k:6}   newton {e:6.2f}   by T {by_T}   descent {paths['descent'][k]:5.2f}")
    print(f"   step {descent_steps:6}   descent {paths['descent'][-1]:5.2f}   "
          f"factor {paths['factor']:.5f}   theory {paths['factor_theory']:.5f}")  # fmt: skip
    for name in ("newton", "descent"):
        write_curve(log_dir / name, "rosenbrock/log10_error", dict(enumerate(paths[name][:8])))

    theory = 1 + shift / (2 * weight)
    print(f"4. E |grad D| of a critic after {critic_steps} steps, penalised in theory {theory:.3f}")
    variants = {"penalty": (weight, True), "none": (0, True), "no_create_graph": (weight, False)}
    weights, norms = {}, {}
    for name, (strength, create_graph) in variants.items():
        weights[name], curve = train_critic(seed, strength, create_graph, critic_steps, shift)
        norms[name] = sum(curve[-50:]) / len(curve[-50:])
        write_curve(log_dir / name, "penalty/grad_norm", dict(enumerate(curve)))
        print(f"   {name:<16} {norms[name]:7.3f}")
    assert torch.equal(weights["none"], weights["no_create_graph"])
    print("   weights of none and of no_create_graph: equal bit for bit")
    return {"modes": modes, "costs": costs, "paths": paths, "norms": norms}


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks: faster than on two
    guard(main)
