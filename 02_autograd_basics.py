"""A training loop is zero, forward, backward, step; without the zero a line's fit never settles.

backward() adds to .grad, so that the gradients of several losses or batches can be summed. The loop
therefore clears .grad first. The step is made under no_grad, since it must not be recorded as a
part of the loss. To keep a loss, write loss.item() or loss.detach(): otherwise the whole record of
how it was computed stays in memory.

    zeroed       p <- p - lr g_t                    the error shrinks, if lr is small enough
    forgotten    p <- p - lr (g_0 + ... + g_t)      it swings, a pendulum without friction

    p    the parameters w and b, fitted to y = 2x + 1 by L = mean((w x + b - y)^2)
    g_t  the gradient of L at step t, dL/dw and dL/db     lr  learning rate

Needs          01_manual_gradient.py (Hessian and lam_max, its largest eigenvalue)
Checked here   the loop = the loop by hand; .grad after k backward() = k times the gradient by
               hand; a law for w and b at every step, zeroed and forgotten; three refused edits
TensorBoard    train/loss, param/w, param/b by step in the runs zeroed, forgotten
Try            in main, put lr=0.34 for lr=0.1, then lr=0.68: which of the two runs blows up?
Answer         At 0.34 only the zeroed run: its limit is 2 / lam_max = 0.3357. The forgotten one
               swings on up to 4 / lam_max = 0.6714, so that at 0.68 both blow up
Source         PyTorch notes, "Autograd mechanics"; Polyak 1964 (momentum)
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "02_autograd_basics"


# --- 1. in everyday code -----------------------------------------------------------------------


def gradient(w, b, x, y):
    """dL/dw = mean(2 r x) and dL/db = mean(2 r), r = w x + b - y, stacked: (2,). Exercise."""
    r = w * x + b - y  # (N,)
    return torch.stack([(2 * r * x).mean(), (2 * r).mean()])


def show_everyday():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    w, b = torch.tensor(0.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimizer, losses = torch.optim.SGD([w, b], lr=0.1), []
    print("1. How does a loop fit w x + b to the points (1, 3) and (2, 5)?")
    print("   step   loss before   w.grad   b.grad   w after   b after")
    for step in range(4):
        optimizer.zero_grad()  # zero: w.grad = b.grad = None
        loss = (w * x + b - y).square().mean()  # forward
        loss.backward()  # backward: adds dloss/dw to w.grad, dloss/db to b.grad
        optimizer.step()  # step: w -= lr * w.grad, b -= lr * b.grad
        losses.append(loss.item())
        print(f"   {step:4}   {loss:11.4f}  {w.grad:7.3f}  {b.grad:7.3f}   {w:7.4f}   {b:7.4f}")
    p = torch.zeros(2)
    for _ in range(4):
        p = p - 0.1 * gradient(*p, x, y)
    print(f"   -> four rounds brought the loss from {losses[0]:.1f} to {losses[-1]:.3f};")
    print(f"      by hand, as in 01_manual_gradient.py, w = {p[0]:.4f} and b = {p[1]:.4f}")
    torch.testing.assert_close(torch.stack([w, b]).detach(), p)
    return losses


# --- 2. what is recorded -----------------------------------------------------------------------


def chain_length(node):
    """How many recorded operations lead up to a node, a grad_fn, along their first inputs."""
    if node is None or not node.next_functions:
        return 0
    return 1 + chain_length(node.next_functions[0][0])  # the node of its first input: lesson 03


def show_recorded():
    x, w = torch.tensor([1.0, 2.0]), torch.tensor(3.0, requires_grad=True)
    loss = (w * x).square().mean()
    with torch.no_grad():
        step = w - 0.1 * w
    print("2. What is recorded? What comes from w, except by detach() and under no_grad()")
    print("   tensor                           requires_grad   grad_fn: how it was made")
    rows = {"x": x, "w, requires_grad=True": w, "loss = (w * x).square().mean()": loss,
            "loss.detach()": loss.detach(), "w - 0.1 * w, under no_grad()": step}  # fmt: skip
    for name, tensor in rows.items():
        made_by = tensor.grad_fn and tensor.grad_fn.name()
        print(f"   {name:<32} {tensor.requires_grad!s:<15} {made_by}")
    kept = detached = torch.tensor(0.0)
    for _ in range(50):
        loss = (w * x).square().mean()
        kept, detached = kept + loss, detached + loss.detach()
    chains = chain_length(kept.grad_fn), chain_length(detached.grad_fn)
    print(f"   -> the sum of 50 losses keeps {chains[0]} additions and their inputs in memory;")
    print(f"      the sum of 50 detached losses keeps {chains[1]}")
    return {"recorded": [tensor.requires_grad for tensor in rows.values()], "chains": chains}


# --- 3. gradients add up -----------------------------------------------------------------------


def make_data(n=20):
    """x and y = 2x + 1, both (N,)."""
    x = torch.linspace(-3, 1, n, dtype=torch.float64)
    return x, 2 * x + 1


def mse(w, b, x, y):
    """mean((w x + b - y)^2). Raises ValueError where x and y would broadcast."""
    if x.shape != y.shape:
        raise ValueError(f"x and y differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    return (w * x + b - y).square().mean()


def show_adding_up(x, y):
    w, b = (torch.zeros((), dtype=x.dtype, requires_grad=True) for _ in range(2))
    by_hand = gradient(w.detach(), b.detach(), x, y)
    print("3. What does .grad hold after k backward() without a zero between them?")
    print("   k     w.grad   k * by hand     b.grad   k * by hand")
    for k in (1, 2, 3):
        mse(w, b, x, y).backward()
        g_w, g_b = k * by_hand
        print(f"   {k}   {w.grad:8.3f}   {g_w:11.3f}   {b.grad:8.3f}   {g_b:11.3f}")
    times = (torch.stack([w.grad, b.grad]) / by_hand).tolist()
    print(f"   -> after 3 backward() .grad is {times[0]:.1f} times the gradient: each adds to it")
    assert max(abs(n - 3) for n in times) < 1e-12
    return times


# --- 4. the loop without its zero --------------------------------------------------------------


def fit(x, y, lr, steps, zero=True):
    """The loop: zero (unless zero=False), forward by mse, backward, step under no_grad.

    w and b start as two 0-dimensional zeros of x's dtype. Returns (w, b) at the start and after
    each step, (steps + 1, 2), without their graph. Exercise.
    """
    w, b = (torch.zeros((), dtype=x.dtype, requires_grad=True) for _ in range(2))
    path = [torch.stack([w, b]).detach()]
    for _ in range(steps):
        if zero:
            w.grad = b.grad = None
        loss = mse(w, b, x, y)
        loss.backward()
        with torch.no_grad():
            w -= lr * w.grad
            b -= lr * b.grad
        path.append(torch.stack([w, b]).detach())
    return torch.stack(path)


def swing(lr, lam, t):
    """e_t / e_0 = cos((t + 1/2) phi) / cos(phi / 2) of the forgotten run, cos phi = 1 - lr lam / 2.

    For steps t (T, 1) and eigenvalues lam (n,) of L's Hessian it is (T, n); e_t is the error
    p_t - (2, 1), its part along the eigenvector of lam. Where the law comes from:
    1. p_(t+1) - p_t = (p_t - p_(t-1)) - lr g_t: the last move again and a new part, momentum 1.
    2. Along an eigenvector g_t = lam e_t, so e_(t+1) + e_(t-1) = (2 - lr lam) e_t.
    3. cos(u + phi) + cos(u - phi) = 2 cos(phi) cos(u): a cosine fits, turned by phi in each step.
    4. No move comes before the first, as if e_(-1) = e_0: the cosine is symmetric about t = -1/2.
    For lr lam > 4 the angle phi is complex, and the cosine grows. Exercise.
    """
    phi = torch.acos(torch.complex(1 - lr * lam / 2, 0 * lam))  # complex numbers, for lr lam > 4
    return (torch.cos((t + 0.5) * phi) / torch.cos(phi / 2)).real


def theory(x, lr, steps, zero=True):
    """(steps + 1, 2): the path by e_t = (1 - lr lam)^t e_0, as in lesson 01, or by `swing`."""
    A = torch.stack([x, torch.ones_like(x)], 1)  # (N, 2)
    lam, U = torch.linalg.eigh(2 * A.T @ A / len(x))  # of the Hessian: (2,), columns of (2, 2)
    t = torch.arange(steps + 1, dtype=x.dtype)[:, None]  # (steps + 1, 1)
    left = (1 - lr * lam) ** t if zero else swing(lr, lam, t)  # (steps + 1, 2)
    goal = torch.tensor([2.0, 1.0], dtype=x.dtype)
    return goal - left * (goal @ U) @ U.T


def show_forgotten(log_dir, x, y, lr, steps):
    print(f"4. What if the zero is forgotten? The largest loss of each 20 steps, at lr {lr}")
    spans = [f"{t}-{t + 19}" for t in range(0, steps - 18, 20)]
    print("   run         steps    " + "".join(f"{span:>9}" for span in spans))
    losses, off = {}, {}
    for name, zero in (("zeroed", True), ("forgotten", False)):
        path, law = fit(x, y, lr, steps, zero), theory(x, lr, steps, zero)
        for kind, points in (("theory", law), ("measured", path)):
            losses[name] = torch.stack([mse(*p, x, y) for p in points])
            largest = losses[name].unfold(0, 20, 20).amax(1)
            print(f"   {name:<11} {kind:<9}" + "".join(f"{value:9.3g}" for value in largest))
        off[name] = ((path - law).abs().max() / (1 + path.abs().max())).item()
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for step, (w, b) in enumerate(path):
                writer.add_scalar("train/loss", losses[name][step], step)
                writer.add_scalar("param/w", w, step)
                writer.add_scalar("param/b", b, step)
    last = {name: (values[-20:].max() / values[0]).item() for name, values in losses.items()}
    print(
        f"   -> the last 20 losses reach {last['zeroed']:.1g} times the first loss with the zero,"
    )
    print(f"      {last['forgotten']:.2g} times without; theory is within {max(off.values()):.0e}")
    assert max(off.values()) < 1e-9
    return {"losses": losses, "last": last}


# --- 5. second reading: what autograd refuses --------------------------------------------------


def refusal(code, **tensors):
    """What the RuntimeError says that `code` raises on the tensors; "" if it raises none."""
    try:
        exec(code, {"torch": torch, **tensors})
    except RuntimeError as error:
        return str(error)
    return ""


def show_refused():
    value = torch.rand(()) + 0.5
    rows = [  # code; words of the error, or w.grad by hand; what the words mean
        ("w -= 0.1", "a leaf Variable that requires grad", "w is a leaf: edit under no_grad()"),
        ("with torch.no_grad(): w -= 0.1\n(w * w).backward()", 2 * value - 0.2, ""),
        ("y = w.exp(); y.mul_(2); y.backward()", "modified by an inplace operation",
         "exp keeps y for backward()"),
        ("y = w.sin(); y.mul_(2); y.backward()", 2 * value.cos(), ""),
        ("y = w * torch.ones(2); y.backward()", "only for scalar outputs", "y has two numbers"),
        ("y = w * torch.ones(2); y.sum().backward()", torch.tensor(2.0), ""),
    ]  # fmt: skip
    print(f"5. What does autograd refuse? In each row w = {value:.4f} requires grad; mul_ edits y")
    print("   code                                                  w.grad   by hand, or the error")
    refused, off = [], []
    for code, expected, meaning in rows:
        w = value.clone().requires_grad_()
        if error := refusal(code, w=w):
            refused.append(code)
            words = expected if str(expected) in error else error
            outcome = f'refused   "{words}": {meaning}'
        else:
            off.append((w.grad - expected).abs().item())
            outcome = f"{w.grad:7.4f}   {expected:7.4f}"
        print(f"   {'; '.join(code.splitlines()):<51}  {outcome}")
    print(
        f"   -> {len(refused)} of {len(rows)} are refused; the others are right to {max(off):.1g}"
    )
    assert max(off) < 1e-5
    return refused


def main(seed=0, log_dir=LOG_DIR, points=20, lr=0.1, steps=100):
    torch.manual_seed(seed)
    x, y = make_data(points)
    measured = {"everyday": show_everyday(), **show_recorded(), "times": show_adding_up(x, y)}
    measured |= {**show_forgotten(log_dir, x, y, lr, steps), "refused": show_refused()}
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
