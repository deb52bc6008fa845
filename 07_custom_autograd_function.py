"""Autograd believes any backward you write, and a wrong one can train what the right one cannot.

    backward takes g = dL/dy and returns dL/dx_i for each input x_i of forward

    ReLU                   y = max(x, 0)            g [x > 0]
    Affine                 y = x W^T + b            g W for x,   g^T x for W,   sum g for b
    Sign                   y = 1 if x >= 0 else -1  0: true, and useless
    StraightThroughSign    y = 1 if x >= 0 else -1  g [|x| < 1]: the gradient of hardtanh, a lie

Nothing in a training run compares backward with forward; gradcheck does, by central differences in
float64. (At a kink it fails the right one too: the difference of ReLU at 0 is 1/2.) gradgradcheck
holds the second derivative against differences of backward, so it passes a wrong backward that is
differentiated rightly. The error rate, mean (sign(z) - y)^2 / 4, is flat almost everywhere: its
true gradient moves no weight before the Sign. With the lie it is a loss like any other.

Checked here   each gradient against a library twin; both checks, and where they fail; the products
               that needs_input_grad saves; a gradient a point, by vmap against a loop; XOR learned
TensorBoard    train/error: straight_through falls to about 0, true_gradient stays where it began;
               layer_behind stops between: the layer behind the Sign learns, the one before cannot
Try            backward returns g, no [|x| < 1]: which old rule then trains one Affine and a Sign?
               The perceptron's: w += y x for each wrong x
Source         Bengio et al. 2013, arXiv:1308.3432 (straight-through); Courbariaux et al. 2016,
               arXiv:1602.02830 (hardtanh's mask); PyTorch notes, "Extending PyTorch"
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "07_custom_autograd_function"


# --- four Functions, and a broken one ------------------------------------------------------------


class ReLU(Function):
    """max(x, 0), with gradient 0 at 0, as in the library."""

    generate_vmap_rule = True  # vmap may trace forward and backward, both made of torch operations

    @staticmethod
    def forward(x):
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)  # y > 0 where x > 0: no need to keep x

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.where(y > 0, g, 0)


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
        x, W = ctx.saved_tensors
        want_x, want_W, want_b = ctx.needs_input_grad
        rows = g.reshape(-1, len(W))  # (..., out) -> (N, out)
        dx = g @ W if want_x else None  # (..., in)
        dW = rows.T @ x.reshape(-1, W.shape[1]) if want_W else None  # (out, in)
        db = rows.sum(0) if want_b else None  # (out,)
        return dx, dW, db


class Sign(Function):
    """1 where x >= 0, else -1; its true gradient is 0. (torch.sign has a third value, at 0.)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)  # for the lie below; the truth needs nothing

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class StraightThroughSign(Sign):
    """The same forward; backward as if it had been hardtanh."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 1, g, 0)


class ReLUWithoutMask(ReLU):
    """A mistake to be found: backward forgets which inputs were cut off."""

    @staticmethod
    def backward(ctx, g):
        return g


relu, sign, straight_through = ReLU.apply, Sign.apply, StraightThroughSign.apply


def affine(x, W, b):
    """Affine.apply. Raises ValueError where sizes differ, as b of size 1 would be broadcast."""
    if W.dim() != 2 or x.shape[-1:] != W.shape[1:] or b.shape != W.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, W, b))
        raise ValueError(f"affine takes x (..., in), W (out, in), b (out,), not {shapes}")
    return Affine.apply(x, W, b)


# --- what can be measured about a Function -------------------------------------------------------


def gradients(f, *inputs):
    """The gradient of sum(f(*inputs)) for each input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs).sum(), inputs)


def verdicts(f, *inputs):
    """Whether f passes gradcheck and gradgradcheck at these points, in float64."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    return tuple(check(f, inputs, raise_exception=False) for check in (gradcheck, gradgradcheck))


def backward_products(f, inputs, wanted):
    """Matrix products in backward, in units of the one in forward, if `wanted` need gradients."""
    inputs = [x.detach().requires_grad_(name in wanted) for name, x in inputs.items()]
    with FlopCounterMode(display=False) as forward:
        y = f(*inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return backward.get_total_flops() / forward.get_total_flops()


# --- a network with a Sign in it -----------------------------------------------------------------


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
    """mean (out - y)^2 / 4: the error rate, where both are signs."""
    if out.shape != y.shape:
        raise ValueError(f"out {tuple(out.shape)} and y {tuple(y.shape)} differ in shape")
    return (out - y).square().mean() / 4


def per_sample_gradients(params, x, y, hidden, output):
    """A gradient for each sample, (B, *shape) for each parameter: vmap over grad."""
    gradient = grad(lambda p, x, y: squared_loss(network(p, x, hidden, output), y))
    return vmap(gradient, in_dims=(None, 0, 0))(params, x, y)


def loss_gradients(params, x, y, hidden, output):
    """The gradient for each parameter, of a batch or of one sample."""
    return gradients(lambda *p: squared_loss(network(p, x, hidden, output), y), *params)


def train(params, x, y, hidden, output, steps, lr):
    """Error rates (steps,), each before an update by Adam, and which parameters changed at all."""
    start, params = params, [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(params, lr)
    errors = []
    for _ in range(steps):
        out = network(params, x, hidden, output)
        errors.append((sign(out) != y).float().mean().item())
        optimizer.zero_grad()
        squared_loss(out, y).backward()
        optimizer.step()
    return errors, [not torch.equal(p, q) for p, q in zip(params, start, strict=True)]


def main(seed=0, log_dir=LOG_DIR, count=256, steps=200, lr=0.02):
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(5, 3), "W": torch.randn(4, 3), "b": torch.randn(4)}

    points = torch.tensor([-2, -0.5, -0.0, 0.0, 0.5, 2])
    print(f"1. gradients at {points.numpy()}, equal to a library twin")
    for name, ours, twin, library in (
        ("ReLU", relu, "torch.relu", torch.relu),
        ("Sign", sign, "torch.sign", torch.sign),
        ("StraightThroughSign", straight_through, "F.hardtanh", F.hardtanh),
    ):
        (measured,), (expected,) = gradients(ours, points), gradients(library, points)
        assert torch.equal(measured, expected)
        print(f"   {name:<20} {measured.int().numpy()}   {twin}")
    pairs = zip(gradients(affine, *inputs.values()), gradients(F.linear, *inputs.values()),
                strict=True)  # fmt: skip
    difference = max((ours - library).abs().max().item() for ours, library in pairs)
    assert difference < 1e-5
    print(f"   {'Affine':<20} largest difference {difference:.0e}   F.linear")

    print("2. backward against differences of forward, and of backward")
    checked = {
        "ReLU": verdicts(relu, inputs["x"]),
        "ReLU at 0, its kink": verdicts(relu, torch.zeros(1)),
        "ReLUWithoutMask": verdicts(ReLUWithoutMask.apply, inputs["x"]),
        "Affine": verdicts(affine, *inputs.values()),
        "Sign": verdicts(sign, inputs["x"]),
        "StraightThroughSign": verdicts(straight_through, inputs["x"]),
    }
    for name, passed in checked.items():
        first, second = ("passes" if ok else "FAILS" for ok in passed)
        print(f"   {name:<20} gradcheck {first:<8} gradgradcheck {second}")

    print("3. matrix products in the backward of Affine, by the gradients wanted")
    products = {}
    for wanted, theory in {"xWb": 2, "Wb": 1, "x": 1, "b": 0}.items():
        products[wanted] = backward_products(affine, inputs, wanted)
        library = backward_products(F.linear, inputs, wanted)
        assert products[wanted] == library == theory
        print(f"   {' '.join(wanted):<6} ours {products[wanted]:g}   F.linear {library:g}")

    (x, y), params = xor_data(count), init_params()
    print(f"4. gradients of each of {count} points, by vmap as by a loop")
    far = 4 * x  # so that some z leave [-1, 1]
    z = network(params, far, relu, nn.Identity())  # (B,)
    wrong = sign(z) != y
    reached = {"wrong": wrong.sum().item(), "in_reach": (wrong & (z.abs() < 1)).sum().item()}
    print(f"   wrong {reached['wrong']}   of these |z| < 1: {reached['in_reach']}")
    for name, output in {"Sign": sign, "StraightThroughSign": straight_through}.items():
        by_vmap = per_sample_gradients(params, far, y, relu, output)
        by_loop = [loss_gradients(params, *xy, relu, output) for xy in zip(far, y, strict=True)]
        for together, one_by_one in zip(by_vmap, zip(*by_loop, strict=True), strict=True):
            torch.testing.assert_close(together, torch.stack(one_by_one))
        reached[name] = (by_vmap[-1] != 0).sum().item()
        print(f"   {name:<20} points with a gradient {reached[name]}")
    assert torch.equal(by_vmap[-1].squeeze(1) != 0, wrong & (z.abs() < 1))

    print(f"5. error rate in {steps} steps of Adam from the same weights")
    runs = {
        "straight_through": (relu, straight_through),
        "true_gradient": (relu, sign),
        "layer_behind": (sign, nn.Identity()),
    }
    trained = {}
    for run, functions in runs.items():
        errors, changed = trained[run] = train(params, x, y, *functions, steps, lr)
        assert run != "true_gradient" or not any(changed)
        assert run != "layer_behind" or not any(changed[:2])
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for step, error in enumerate(errors):
                writer.add_scalar("train/error", error, step)
        moved = " ".join(n for n, c in zip(("W1", "b1", "W2", "b2"), changed, strict=True) if c)
        print(f"   {run:<18} first {errors[0]:.3f}   last {errors[-1]:.3f}   "
              f"changed: {moved or 'not one bit'}")  # fmt: skip
    return {"checked": checked, "products": products, "reached": reached, "trained": trained}


if __name__ == "__main__":
    guard(main)
