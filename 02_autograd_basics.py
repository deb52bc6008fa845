"""A training loop clears .grad, computes a loss and its gradient, and moves the parameters.

These four steps are called zero, forward, backward, step. backward() adds to .grad, so that the
gradients of several losses can be summed. If the loop forgets the zero, the fit of a line never
settles. The step is made under no_grad: it is not a part of the loss, and an edit of a parameter is
refused otherwise. To keep a loss, write loss.item() or loss.detach(): else the record of how it was
computed stays in memory.

    zeroed       p becomes p - lr g_t                    the error shrinks, if lr is small enough
    forgotten    p becomes p - lr (g_0 + ... + g_t)      it swings, a pendulum without friction

    p      the parameters w and b, fitted to y = 2x + 1 by the loss L = mean((w x + b - y)^2)
    g_t    the gradient of L at step t, dL/dw and dL/db            lr     learning rate
    error  p minus its value at the minimum of L, (2, 1)

Needs          01_manual_gradient.py (Hessian and lam_max, its largest eigenvalue)
Checked here   the loop = the loop by hand; .grad after k backward() = k times the gradient by
               hand; a law for w and b at every step, zeroed and forgotten; three refusals
TensorBoard    train/loss, param/w, param/b by step: zeroed comes to rest at loss 0, w = 2, b = 1;
               forgotten swings about them and never settles
Try            in main, replace lr=0.1 by lr=0.34: which of the two runs blows up?
Answer         Only zeroed: its limit is 2 / lam_max = 0.3357. That of forgotten is twice as large
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
    left = (w * x + b - y).square().mean().item()
    print(f"   -> four rounds bring the loss from {losses[0]:.1f} to {left:.3f};")
    print(f"      four by hand, as in 01_manual_gradient.py, end at w = {p[0]:.4f}, b = {p[1]:.4f}")
    torch.testing.assert_close(torch.stack([w, b]).detach(), p)
    return [*losses, left]


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
    print("2. What is recorded? All that comes from w, unless by detach() or under no_grad()")
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
    print(f"   -> a sum of 50 losses keeps records of {chains[0]} additions, and so of each loss;")
    print(f"      a sum of 50 detached losses keeps {chains[1]}")
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
    """The part of the error that is left after t steps without the zero: (T, n).

    t (T, 1) are steps, lam (n,) eigenvalues of L's Hessian, and 0 < lr lam < 4. Along an
    eigenvector the error e_t is e_0 cos((t + 1/2) phi) / cos(phi / 2), where the angle phi has
    cos(phi) = 1 - lr lam / 2. So each step turns by phi; in four thoughts:
    1. p_(t+1) - p_t = (p_t - p_(t-1)) - lr g_t: the last move again (momentum 1), and a new part.
    2. As g_t = lam e_t, e_(t+1) + e_(t-1) = (2 - lr lam) e_t.
    3. cos(u + phi) + cos(u - phi) = 2 cos(phi) cos(u): a cosine of u = t phi + const does just so.
    4. The first step is e_1 = (1 - lr lam) e_0, as if e_(-1) = e_0: the cosine is symmetric about
       t = -1/2, so const = phi / 2. Exercise.
    """
    phi = torch.acos(1 - lr * lam / 2)  # (n,)
    return torch.cos((t + 0.5) * phi) / torch.cos(phi / 2)


def theory(x, lr, steps, zero):
    """(steps + 1, 2): the path of p, by the error (1 - lr lam)^t as in lesson 01, or by `swing`."""
    A = torch.stack([x, torch.ones_like(x)], 1)  # (N, 2)
    lam, U = torch.linalg.eigh(2 * A.T @ A / len(x))  # of the Hessian: (2,), and as columns (2, 2)
    t = torch.arange(steps + 1, dtype=x.dtype)[:, None]  # (steps + 1, 1)
    left = (1 - lr * lam) ** t if zero else swing(lr, lam, t)  # (steps + 1, 2)
    minimum = torch.tensor([2.0, 1.0], dtype=x.dtype)
    parts = -minimum @ U  # of the error at step 0, (0, 0) - minimum, along each eigenvector
    return minimum + (left * parts) @ U.T


def show_forgotten(log_dir, x, y, lr, steps):
    print(f"4. What if the zero is forgotten? The loss in each 20 steps, at lr {lr}")
    print("   (theory: a step multiplies the error's parts by 1 - lr lam; forgotten, they swing)")
    spans = [f"{t}-{t + 19}" for t in range(0, steps - 18, 20)]
    print("   run         loss, steps " + "".join(f"{span:>9}" for span in spans))
    losses, last, off = {}, {}, []
    for run, zero in (("zeroed", True), ("forgotten", False)):
        path, law = fit(x, y, lr, steps, zero), theory(x, lr, steps, zero)
        losses[run], by_law = (torch.stack([mse(*p, x, y) for p in ps]) for ps in (path, law))
        largest = losses[run].unfold(0, 20, 20).amax(1)
        rows = {"largest": largest, "  by theory": by_law.unfold(0, 20, 20).amax(1),
                "smallest": losses[run].unfold(0, 20, 20).amin(1)}  # fmt: skip
        for name, values in rows.items():
            print(f"   {run:<11} {name:<12}" + "".join(f"{value:9.3g}" for value in values))
        last[run] = (largest[-1] / losses[run][0]).item()
        off.append(((path - law).abs().max() / (1 + path.abs().max())).item())
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, (w, b) in enumerate(path):
                writer.add_scalar("train/loss", losses[run][step], step)
                writer.add_scalar("param/w", w, step)
                writer.add_scalar("param/b", b, step)
    print(f"   -> the largest loss of steps {spans[-1]}, divided by the first loss: with the zero "
          f"{last['zeroed']:.1g},")  # fmt: skip
    print(f"      without {last['forgotten']:.2g}; theory is within {max(off):.0e}")
    assert max(off) < 1e-9
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
    print("5. Second reading: what does autograd refuse?")
    print(f"   (in each row w = {value:.4f} requires grad; y.mul_(2) doubles y in place)")
    print("   code                                        w.grad   by hand, or the error")
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
        *first, final = code.splitlines()
        print("".join(f"   {line}\n" for line in first) + f"   {final:<41}  {outcome}")
    right = f"the others give the gradient by hand, to {max(off):.1g}"
    print(f"   -> {len(refused)} of {len(rows)} are refused; {right}")
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
