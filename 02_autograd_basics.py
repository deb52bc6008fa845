"""backward() adds into .grad: forget to zero it, and gradient descent never settles.

    L = mean(r^2), r = w x + b - y      dL/dw = mean(2 r x), dL/db = mean(2 r)
    zeroed       p <- p - lr g_t                    error e_t = (1 - lr h)^t e_0
    forgotten    p <- p - lr (g_0 + … + g_t)        error e_t = cos((t + 1/2) a) / cos(a/2) e_0

Both laws hold along each eigenvector of L's Hessian, h its eigenvalue; cos a = 1 - lr h / 2. The
sum of all gradients is a velocity that nothing slows: to forget the zero is momentum 1, a pendulum
without friction. Autograd's refusals have reasons as plain. Recorded, an in-place edit would make a
leaf a result, whose .grad nothing fills. An in-place edit counts up the tensor's version, and
backward() refuses a saved value that has changed; what inference_mode makes has no version, so it
is neither saved nor edited later. A vector y has no gradient, only v^T J, for a v of your choice.

Checked here   who requires grad; the fit by hand and by autograd equal at each step; both laws;
               SGD with a grad of None and of 0; which edits are refused; no_grad against
               inference_mode; v^T J against the Jacobian by hand
TensorBoard    runs by_hand, by_autograd (which covers it), forgotten: train/loss, param/w, param/b
Try            raise lr: where does the forgotten run blow up? Past 4 / h, twice the other's 2 / h
Source         PyTorch notes, "Autograd mechanics"; Paszke et al. 2017, "Automatic differentiation
               in PyTorch"; Polyak 1964 (momentum)
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "02_autograd_basics"


def make_data(n=20):
    """x and y = 2x + 1, both (N,)."""
    x = torch.linspace(-3, 1, n, dtype=torch.float64)
    return x, 2 * x + 1


def residual(w, b, x, y):
    """(N,). Raises ValueError where x and y would broadcast."""
    if x.shape != y.shape:
        raise ValueError(f"x and y differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    return w * x + b - y


def mse(w, b, x, y):
    return residual(w, b, x, y).square().mean()


def losses_along(path, x, y):
    """mse at each (w, b) of a path (steps + 1, 2)."""
    return torch.stack([mse(w, b, x, y) for w, b in path])


def hand_gradient(w, b, x, y):
    """dL/dw and dL/db of mse by the chain rule, (2,)."""
    r = residual(w, b, x, y)
    return torch.stack([(2 * r * x).mean(), (2 * r).mean()])


def fit_by_hand(x, y, lr, steps):
    """(steps + 1, 2): w and b from (0, 0) on."""
    p = torch.zeros(2, dtype=x.dtype)
    path = [p]
    for _ in range(steps):
        p = p - lr * hand_gradient(*p, x, y)
        path.append(p)
    return torch.stack(path)


def new_parameters():
    """w = b = 0, two leaves that require grad."""
    return [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]


def fit_by_autograd(x, y, lr, steps, zero=True):
    """(steps + 1, 2): the same fit by backward(); zero=False keeps what .grad already holds."""
    w, b = new_parameters()
    path = [torch.stack([w, b]).detach()]
    for _ in range(steps):
        if zero:
            w.grad = b.grad = None
        mse(w, b, x, y).backward()
        with torch.no_grad():
            w -= lr * w.grad
            b -= lr * b.grad
            path.append(torch.stack([w, b]))
    return torch.stack(path)


def theory(x, lr, steps, zero=True):
    """(steps + 1, 2): the path that the laws above predict; zero=False needs lr h < 4."""
    A = torch.stack([x, torch.ones_like(x)], 1)  # (N, 2)
    h, U = torch.linalg.eigh(2 * A.T @ A / len(x))  # of the Hessian: (2,), columns of (2, 2)
    t = torch.arange(steps + 1, dtype=x.dtype)[:, None]
    a = torch.acos(1 - lr * h / 2)
    decay = (1 - lr * h) ** t if zero else torch.cos((t + 0.5) * a) / torch.cos(a / 2)
    goal = torch.tensor([2.0, 1.0], dtype=x.dtype)
    return goal - decay * (goal @ U) @ U.T


def step_after_zero_grad(set_to_none, lr=0.1, momentum=0.9):
    """SGD on p^2 from 1: how far p moves in a step after zero_grad without backward; its grad."""
    p = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=lr, momentum=momentum)
    p.square().backward()
    optimizer.step()
    before = p.item()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    return p.item() - before, p.grad


def refusal(action, *args):
    """What the RuntimeError says that an action raises; None if it raises none."""
    try:
        action(*args)
    except RuntimeError as error:
        return str(error)


def edit_leaf(w):
    w -= 0.1


def edit_leaf_unrecorded(w):
    with torch.no_grad():
        w -= 0.1


def double_input(w, y):
    with torch.no_grad():  # w is a leaf
        w *= 2


def double_result(w, y):
    y *= 2  # recorded, as any other operation


def backward_after(edit, f, values):
    """For y = f(w), edited before backward(): the versions of w and y, the refusal, dy/dw."""
    w = values.clone().requires_grad_()
    y = f(w)
    edit(w, y)
    return (w._version, y._version), refusal(y.sum().backward), w.grad


LATER_USES = {
    "(w + y).sum().backward()": lambda w, y: (w + y).sum().backward(),  # saves neither
    "(w * y).sum().backward()": lambda w, y: (w * y).sum().backward(),  # saves y
    "(w * y.clone()).sum().backward()": lambda w, y: (w * y.clone()).sum().backward(),
    "y.add_(1)": lambda w, y: y.add_(1),
    "y.requires_grad_()": lambda w, y: y.requires_grad_(),
    "y._version": lambda w, y: y._version,
}


def later_refusal(mode, use):
    """Made under `mode`, y = 2w records nothing; what `use` of it says once the mode is over."""
    w = torch.ones(3, requires_grad=True)
    with mode():
        y = 2 * w
    assert not y.requires_grad and y.grad_fn is None
    return refusal(use, w, y)


def f(x):
    """R^3 -> R^2."""
    return torch.stack([x[0] * x[1], x[2].sin()])


def jacobian(x):
    """df_i / dx_j by hand, (2, 3)."""
    J = torch.zeros(2, 3, dtype=x.dtype)
    J[0, 0], J[0, 1], J[1, 2] = x[1], x[0], x[2].cos()
    return J


def main(seed=0, log_dir=LOG_DIR, points=20, lr=0.1, steps=100):
    torch.manual_seed(seed)
    x, y = make_data(points)

    print("1. L = mean((w x + b - y)^2): who requires grad")
    w, b = new_parameters()
    for name, tensor in {"x": x, "w": w, "b": b, "L": mse(w, b, x, y)}.items():
        node = tensor.grad_fn.name() if tensor.grad_fn else None
        print(f"   {name}   requires_grad {tensor.requires_grad!s:<5}   "
              f"is_leaf {tensor.is_leaf!s:<5}   grad_fn {node}")  # fmt: skip

    print("2. .grad after each of three backward(), measured = times x chain rule by hand")
    g_w, g_b = hand_gradient(w.detach(), b.detach(), x, y)
    for k in (1, 2, 3):
        mse(w, b, x, y).backward()
        torch.testing.assert_close((w.grad, b.grad), (k * g_w, k * g_b))
        print(f"   w {w.grad:8.3f} = {k} x {g_w:.3f}   b {b.grad:7.3f} = {k} x {g_b:.3f}")
    assert x.grad is None

    print(f"3. the fit at lr {lr}: the largest loss of each 20 steps")
    paths = {
        "by_hand": fit_by_hand(x, y, lr, steps),
        "by_autograd": fit_by_autograd(x, y, lr, steps),
        "forgotten": fit_by_autograd(x, y, lr, steps, zero=False),
    }
    laws = {name: theory(x, lr, steps, zero=name != "forgotten") for name in paths}
    torch.testing.assert_close(paths, laws, rtol=0, atol=1e-11)
    for name in ("by_autograd", "forgotten"):
        for kind, path in {"measured": paths[name], "theory": laws[name]}.items():
            largest = losses_along(path, x, y).unfold(0, 20, 20).amax(1)  # (steps / 20,)
            print(f"   {name:<14} {kind:<8} {' '.join(f'{loss:8.4f}' for loss in largest)}")
    apart = (paths["by_autograd"] - paths["by_hand"]).abs().max().item()
    assert apart < 1e-14
    print(f"   by_autograd and by_hand at most {apart:.0e} apart at any step")
    losses = {name: losses_along(path, x, y) for name, path in paths.items()}
    for name, path in paths.items():
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for step, (w, b) in enumerate(path):
                writer.add_scalar("train/loss", losses[name][step], step)
                writer.add_scalar("param/w", w, step)
                writer.add_scalar("param/b", b, step)

    print("4. SGD with momentum 0.9: a step after zero_grad, no backward, measured and by theory")
    for set_to_none, law in {True: 0.0, False: -0.1 * 0.9 * 2}.items():
        move, grad = step_after_zero_grad(set_to_none)
        assert abs(move - law) < 1e-6
        print(f"   set_to_none={set_to_none!s:<5}   p moves {move:5.2f} {law:5.2f}   grad {grad}")

    print("5. in-place edits: of a leaf w, then of y = f(w) or of w before backward()")
    values = torch.rand(1) + 0.5
    for edit in (edit_leaf, edit_leaf_unrecorded):
        said = refusal(edit, values.clone().requires_grad_())
        print(f"   {edit.__name__:<22} {said or 'passes'}")
    refused = {}
    for name, law in {"exp": values.exp(), "sin": values.cos()}.items():
        for edit, factor in {double_input: 1, double_result: 2}.items():
            versions, said, grad = backward_after(edit, getattr(torch, name), values)
            refused[name, edit.__name__] = said is not None
            outcome = "refused" if said else f"dy/dw {grad.item():.4f} = {factor * law.item():.4f}"
            assert said or torch.allclose(grad, factor * law)
            print(f"   {name}, {edit.__name__:<15} versions of w and y {versions}   {outcome}")

    print("6. y = 2w made under no_grad or under inference_mode, and used afterwards")
    for name, use in LATER_USES.items():
        said = [later_refusal(mode, use) for mode in (torch.no_grad, torch.inference_mode)]
        first, second = ("refused" if text else "passes" for text in said)
        print(f"   {name:<34} no_grad {first:<8}   inference_mode {second}")

    print("7. y = (x0 x1, sin x2): backward() without v, then v^T J measured and by hand")
    x, v = torch.randn(3, requires_grad=True), torch.randn(2)
    print(f"   {refusal(f(x).backward)}")
    f(x).backward(v)
    by_hand = v @ jacobian(x.detach())
    torch.testing.assert_close(x.grad, by_hand)
    for j in range(3):
        print(f"   x{j}   {x.grad[j]:7.4f} {by_hand[j]:7.4f}")
    return {"apart": apart, "losses": losses, "refused": refused}


if __name__ == "__main__":
    guard(main)
