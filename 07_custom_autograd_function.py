"""Autograd believes any backward you write, and a wrong one can train where the true one is 0.

A Function is a forward and a backward of your own. You write one where the true gradient is 0
almost everywhere (a sign, a rounding), to save time or memory, or around code that is not PyTorch.
The object ctx carries from forward to backward what is needed there. If backward is wrong,
something else is trained, and no error is raised. gradcheck compares backward with differences of
forward, in float64, and only at the points that it is given.

    x  input     y  output     L  the loss     n  a whole number from 1 on     W, b  weights, biases
    backward gets g = dL/dy, and returns dL/d(argument) for each argument given to apply:

    Power                  y = x^n                  g n x^(n-1) for x; None for n, not a tensor
    ReLU                   y = max(x, 0)            g where x > 0, else 0
    Affine                 y = x W^T + b            g W for x,  g^T x for W,  the sum of g for b
    Sign                   y = 1 if x >= 0 else -1  0: true except at x = 0, and of no use
    StraightThroughSign    y = 1 if x >= 0 else -1  g where |x| < 1, else 0: the slope of
                                                    min(max(x, -1), 1), wrong on purpose

Needs          02_autograd_basics.py, 03_computational_graph.py; section 4 is second reading after
               nn_relu.py and nn_optim.py (Adam)
Checked here   each backward against differences or PyTorch's own; gradcheck; a network with a Sign
               as output learns XOR (1 in two opposite quadrants of a square, -1 in the others) by
               StraightThroughSign, not by Sign
TensorBoard    train/error by step: straight_through falls to 0, true_gradient stays where it began;
               regions/after_training: the points of the square that each run calls +1
Try            in StraightThroughSign.backward, return g alone, for all x: is XOR still learned?
Answer         Yes. By SGD, Affine and a Sign then learn by the perceptron's rule: W += lr t x for a
               point x that does not get its label t
Source         Bengio et al. 2013, arXiv:1308.3432 (straight-through); Courbariaux et al. 2016,
               arXiv:1602.02830 (where |x| < 1); PyTorch notes, "Extending PyTorch"
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, gradcheck
from torch.utils.tensorboard import SummaryWriter

from support.files import guard
from support.pictures import caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "07_custom_autograd_function"


# --- 1. in everyday code -----------------------------------------------------------------------


class Power(Function):
    """x ** n for a tensor x and a whole number n from 1 on."""

    @staticmethod
    def forward(ctx, x, n):
        """x ** n. Keeps for backward the tensor x by ctx.save_for_backward, and n as ctx.n.

        Exercise.
        """
        ctx.save_for_backward(x)
        ctx.n = n
        return x**n

    @staticmethod
    def backward(ctx, g):
        """g * n * x ** (n - 1) for x, and None for n. x is in the tuple ctx.saved_tensors.

        Exercise.
        """
        (x,) = ctx.saved_tensors
        return g * ctx.n * x ** (ctx.n - 1), None


def show_everyday():
    print("1. In everyday code: y = Power.apply(x, 3), then y.sum().backward()")
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = Power.apply(x, 3)  # by apply: Power.forward alone would not use our backward
    y.sum().backward()
    points = torch.randn(4).double().requires_grad_()
    passed = gradcheck(lambda x: Power.apply(x, 3), points, raise_exception=False)
    print("   x                  1      2      3")
    print(f"   y = x^3        {numbers(y)}")
    print(f"   x.grad = 3x^2  {numbers(x.grad)}")
    verdict = "passes: backward is" if passed else "FAILS: backward is not"
    print(f"   -> gradcheck {verdict} the slope of forward")
    return {"y": y.tolist(), "grad": x.grad.tolist(), "passed": passed}


def numbers(values):
    return " ".join(f"{v:6.3g}" for v in (values + 0.0).tolist())  # + 0.0 makes 0 of -0


# --- 2. true and false backwards ---------------------------------------------------------------


class ReLU(Function):
    """max(x, 0). Here setup_context fills ctx, in Power forward did: torch.func needs this form."""

    generate_vmap_rule = True  # all is made of torch operations, so torch.func.vmap may batch it

    @staticmethod
    def forward(x):
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)  # y > 0 where x > 0: no need to keep x

    @staticmethod
    def backward(ctx, g):
        """g where the saved output is above 0, else 0: at x = 0 the slope is taken to be 0.

        Exercise.
        """
        (y,) = ctx.saved_tensors
        return torch.where(y > 0, g, 0)


class ReLUWithoutMask(ReLU):
    """A mistake to be found: backward forgets which inputs were cut off."""

    @staticmethod
    def backward(ctx, g):
        return g


class Sign(Function):
    """1 where x >= 0, else -1; its true gradient is 0. (torch.sign has a third value, at 0.)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # backward needs nothing

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class StraightThroughSign(Sign):
    """The same forward; backward as if forward had been min(max(x, -1), 1)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        """g where the saved x is between -1 and 1, else 0.

        Exercise.
        """
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 1, g, 0)


class OppositeSign(StraightThroughSign):
    """Wrong in the other direction, to see whether any wrong backward will do."""

    @staticmethod
    def backward(ctx, g):
        return -StraightThroughSign.backward(ctx, g)


relu, sign, straight_through = ReLU.apply, Sign.apply, StraightThroughSign.apply


def gradients(f, *inputs, g=None):
    """The gradient of sum(g * f(*inputs)) for each input; without g it is that of the plain sum."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = f(*inputs)
    return torch.autograd.grad(y, inputs, torch.ones_like(y) if g is None else g)


def differences(f, x, h=1e-6):
    """The slope of f at each element of x, by central differences: (f(x + h) - f(x - h)) / (2 h).

    Exercise.
    """
    return (f(x + h) - f(x - h)) / (2 * h)


def passes(f, *inputs):
    """Whether f passes gradcheck at these points, in float64."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    return gradcheck(f, inputs, raise_exception=False)


def show_truth():
    print("2. Is backward the slope of forward, at x = -2, -0.5, 0.5 and 2?")
    print("                        x.grad, where dL/dy = 1       slope of forward (differences)")
    print("   Function               -2   -0.5    0.5      2       -2   -0.5    0.5      2   "
          "gradcheck")  # fmt: skip
    x, checked = torch.tensor([-2, -0.5, 0.5, 2]).double(), {}
    for name, f in {
        "ReLU": relu,
        "ReLUWithoutMask": ReLUWithoutMask.apply,
        "Sign": sign,
        "StraightThroughSign": straight_through,
    }.items():
        (backward,) = gradients(f, x)
        checked[name] = passes(f, x)
        print(f"   {name:<19}{numbers(backward)}   {numbers(differences(f, x))}   "
              f"{'passes' if checked[name] else 'FAILS'}")  # fmt: skip
    found = [name for name, passed in checked.items() if not passed]
    print(f"   -> gradcheck finds the wrong backwards: {' and '.join(found)}")
    part = checked["ReLUWithoutMask, x > 0"] = passes(ReLUWithoutMask.apply, x[2:])
    print(f"   -> at 0.5 and 2 alone ReLUWithoutMask {'passes' if part else 'FAILS'}")
    kink = torch.zeros(1).double()
    checked["ReLU at 0"] = passes(relu, kink)
    print(f"   -> at 0, where it has a kink, ReLU {'passes' if checked['ReLU at 0'] else 'fails'}: "
          f"backward {gradients(relu, kink)[0].item():g}, difference "
          f"{differences(relu, kink).item():g}")  # fmt: skip
    return checked


# --- 3. several inputs -------------------------------------------------------------------------


class Affine(Function):
    """x (..., in), W (out, in), b (out,) -> (..., out)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, b):
        return x @ W.T + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _ = inputs
        ctx.save_for_backward(x, W)

    @staticmethod
    def backward(ctx, g):
        """For x (..., in): g W. For W (out, in): g^T x, with all leading axes as one. For b: sum g.

        What ctx.needs_input_grad, three bools, does not want is None and is not computed. Exercise.
        """
        x, W = ctx.saved_tensors
        want_x, want_W, want_b = ctx.needs_input_grad
        rows = g.reshape(-1, len(W))  # (..., out) -> (N, out)
        dx = g @ W if want_x else None  # (..., in)
        dW = rows.T @ x.reshape(-1, W.shape[1]) if want_W else None  # (out, in)
        db = rows.sum(0) if want_b else None  # (out,)
        return dx, dW, db


def affine(x, W, b):
    """Affine.apply. Raises ValueError where sizes differ, as b of size 1 would be broadcast."""
    if W.dim() != 2 or x.shape[-1:] != W.shape[1:] or b.shape != W.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, W, b))
        raise ValueError(f"affine takes x (..., in), W (out, in), b (out,), not {shapes}")
    return Affine.apply(x, W, b)


def show_affine():
    print("3. Several inputs: are the gradients of Affine those of F.linear?")
    inputs = {"x": torch.randn(5, 3), "W": torch.randn(4, 3), "b": torch.randn(4)}
    g = torch.randn(5, 4)
    ours, theirs = (gradients(f, *inputs.values(), g=g) for f in (affine, F.linear))
    print("   gradient for   shape     first element   by F.linear   largest difference")
    off = {}
    for name, a, b in zip(inputs, ours, theirs, strict=True):
        off[name] = (a - b).abs().max().item()
        row = f"{tuple(a.shape)!s:<7}   {a.flatten()[0]:13.4f}   {b.flatten()[0]:11.4f}"
        print(f"   {name:<12}   {row}   {off[name]:18.0e}")
    passed = passes(affine, *inputs.values())
    print(f"   -> gradcheck {'passes' if passed else 'FAILS'}")
    return {"off": off, "passed": passed}


# --- 4. second reading: learning XOR -------------------------------------------------------------


def xor_data(count):
    """Points (B, 2) in a square; y (B,) is 1 in two opposite quadrants, -1 in the other two."""
    x = torch.rand(count, 2) * 2 - 1
    return x, sign(x[:, 0] * x[:, 1])


def init_params(H=32):
    """W1, b1, W2, b2 of a network 2 -> H -> 1."""
    return torch.randn(H, 2), torch.randn(H) / 2, torch.randn(1, H) / 8, torch.zeros(1)


def network(params, x, hidden, output):
    """x (..., 2) -> (...), with `hidden` between the two layers and `output` behind them."""
    W1, b1, W2, b2 = params
    return output(affine(hidden(affine(x, W1, b1)), W2, b2)).squeeze(-1)


def squared_loss(out, y):
    """mean (out - y)^2 / 4: the error rate, where both are signs.

    Raises ValueError where the shapes differ, as they would be broadcast.
    """
    if out.shape != y.shape:
        raise ValueError(f"out {tuple(out.shape)} and y {tuple(y.shape)} differ in shape")
    return (out - y).square().mean() / 4


def train(params, x, y, hidden, output, steps, lr):
    """Error rates (steps + 1,), before each update by Adam and at the end; the parameters then."""
    params = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(params, lr)
    errors = []
    for _ in range(steps):
        out = network(params, x, hidden, output)
        errors.append((sign(out) != y).float().mean().item())
        optimizer.zero_grad()
        squared_loss(out, y).backward()
        optimizer.step()
    errors.append((sign(network(params, x, hidden, output)) != y).float().mean().item())
    return errors, [p.detach() for p in params]


def region(params, hidden, side=90):
    """The square as a picture (1, side, side): light where the network says +1. Up is x[1] = 1."""
    line = torch.linspace(-1, 1, side)
    points = torch.cartesian_prod(-line, line).flip(1)  # from the top row on, (side^2, 2)
    says_one = network(params, points, hidden, nn.Identity()) >= 0
    return torch.where(says_one, 0.85, 0.25).view(1, side, side)


def show_training(log_dir, params, x, y, steps, lr):
    print(f"4. XOR, {len(y)} points, {steps} steps of Adam: which network learns it?")
    print("   (the label is the sign of the output)         error rate")
    print("   run                hidden   output                first    last   changed")
    trained, pictures = {}, {}
    for run, inner, outer, hidden, output in (
        ("no_sign", "ReLU", "none", relu, nn.Identity()),
        ("true_gradient", "ReLU", "Sign", relu, sign),
        ("straight_through", "ReLU", "StraightThroughSign", relu, straight_through),
        ("opposite", "ReLU", "OppositeSign", relu, OppositeSign.apply),
        ("sign_within", "Sign", "none", sign, nn.Identity()),
    ):
        errors, after = train(params, x, y, hidden, output, steps, lr)
        pairs = zip(("W1", "b1", "W2", "b2"), params, after, strict=True)
        moved = " ".join(name for name, p, q in pairs if not torch.equal(p, q)) or "nothing"
        trained[run] = errors, moved
        row = f"{run:<16}   {inner:<6}   {outer:<19}   {errors[0]:.3f}   {errors[-1]:.3f}"
        print(f"   {row}   {moved}")
        pictures[f"{run}\nerror {errors[-1]:.3f}"] = region(after, hidden)
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, error in enumerate(errors):
                writer.add_scalar("train/error", error, step)
    last = {run: f"{errors[-1]:.1%}" for run, (errors, _) in trained.items()}
    print(f"   -> behind an output Sign: {last['straight_through']} errors by StraightThroughSign, "
          f"{last['true_gradient']} by the true gradient")  # fmt: skip
    print(f"   -> OppositeSign, wrong in the other direction, ends with {last['opposite']} errors")
    print(f"   -> without a Sign the true gradient ends with {last['no_sign']} errors")
    print(f"   -> a Sign in the middle lets {trained['sign_within'][1]} change, which ends with "
          f"{last['sign_within']}")  # fmt: skip
    title = "light = the network says +1; XOR wants it top right and bottom left"
    row = caption_row(title, pictures.values(), pictures)
    with SummaryWriter(log_dir / "regions", purge_step=0) as writer:
        writer.add_image("regions/after_training", row, steps)
    return trained


def main(seed=0, log_dir=LOG_DIR, count=256, steps=200, lr=0.02):
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "checked": show_truth(), "affine": show_affine()}
    (x, y), params = xor_data(count), init_params()
    measured["trained"] = show_training(log_dir, params, x, y, steps, lr)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
