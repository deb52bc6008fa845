"""The gradient of cross-entropy by the logits is the error itself: softmax(z) - onehot(t).

    L1 = |x - t|    MSE = (x - t)^2    CE = -log softmax(z)_t = logsumexp(z) - z_t
    mean of CE    = sum_i w_i CE_i / sum_i w_i,   w_i = weight[t_i], or 0 where t_i is ignored
    logsumexp(z)  = m + log sum_k exp(z_k - m),   m = max_k z_k

L1's slope is a sign, so outliers pull no harder than the rest; MSE's slope grows with the error.
Cross-entropy's is p - y, between -1 and 1 a logit, and near 0 once the true class has all of p.
float32's exp overflows beyond 88.7; shifted by the largest logit no term exceeds exp(0), and the
value is the same.

Checked here   each loss against torch.nn in all reductions, with class weights and ignore_index;
               p - y against autograd; the naive form's overflow where theory puts it
TensorBoard    loss/value and loss/slope by the error in the runs l1, mse: step = 100 + 50 (x - t);
               cross_entropy/value by the wrong logit in the runs naive, stable: naive stops at 88
Try            every target ignored, reduction mean: what is the loss? nan, nothing over nothing
Source         torch.nn.CrossEntropyLoss; Goodfellow et al. 2016, Deep Learning, section 6.2.2
"""

import math
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from support.files import guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_loss"
REDUCTIONS = ("none", "sum", "mean")


def same_shape(x, t):
    """Raises ValueError where x - t would broadcast: (N, 1) - (N,) is N by N differences.

    Its text: "input (4, 1) and target (4,) differ in shape". Exercise.
    """
    if x.shape != t.shape:
        raise ValueError(f"input {tuple(x.shape)} and target {tuple(t.shape)} differ in shape")


def reduce(losses, reduction, weights=None):
    """The losses ("none"), their sum ("sum"), or their sum over the sum of the weights ("mean").

    Without weights each counts 1. ValueError for any other reduction. Exercise.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is none of {', '.join(REDUCTIONS)}")
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (losses.numel() if weights is None else weights.sum())


def l1_loss(x, t, reduction="mean"):
    same_shape(x, t)
    return reduce((x - t).abs(), reduction)


def mse_loss(x, t, reduction="mean"):
    same_shape(x, t)
    return reduce((x - t).square(), reduction)


def log_sum_exp(z):
    """log sum_k exp(z_k) over the last dimension, without overflow or underflow.

    Take the largest out first: m + log sum_k exp(z_k - m). Exercise.
    """
    m = z.amax(-1, keepdim=True)
    return m.squeeze(-1) + (z - m).exp().sum(-1).log()


def cross_entropy(z, t, weight=None, ignore_index=-100, reduction="mean"):
    """Logits z (N, K) and classes t (N,); weight (K,) by class; the formulas on top.

    Where t is ignore_index, w_i is 0. Losses by log_sum_exp(z) - z_t, weighted, then through
    reduce(…, reduction, w). Exercise.
    """
    kept = t != ignore_index
    t = torch.where(kept, t, 0)
    weight = torch.ones_like(z[0]) if weight is None else weight
    w = weight[t] * kept  # (N,)
    losses = log_sum_exp(z) - z.gather(1, t[:, None]).squeeze(1)
    return reduce(w * losses, reduction, w)


def naive_cross_entropy(z, t):
    """-log of p_t = exp(z_t) / sum_k exp(z_k), (N,), written just so, for z (N, K) and t (N,).

    It is right until exp overflows, or underflows to 0: that is its purpose here. Exercise.
    """
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return -p.gather(1, t[:, None]).squeeze(1).log()


def wrong_by(logit):
    """Logits (1, 3) that give class 1 `logit` and the true class 0 nothing, and the target."""
    return torch.tensor([[0.0, logit, 0.0]]), torch.tensor([0])


def show(name, ours, theirs):
    torch.testing.assert_close(ours, theirs)
    numbers = " ".join(f"{value:7.4f}" for value in ours.flatten()[:5].tolist())
    print(f"   {name:<32} {numbers}")


def log_curves(log_dir):
    """L1 and MSE with their slopes by the error; cross-entropy both ways by the wrong logit."""
    for run, loss in {"l1": l1_loss, "mse": mse_loss}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            error = (torch.arange(201) / 50 - 2).requires_grad_()  # -2 … 2
            values = loss(error, torch.zeros(201), "none")
            (slopes,) = torch.autograd.grad(values.sum(), error)
            for step in range(201):
                writer.add_scalar("loss/value", values[step], step)
                writer.add_scalar("loss/slope", slopes[step], step)
    for run, loss in {"naive": naive_cross_entropy, "stable": cross_entropy}.items():
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for logit in range(0, 121, 4):
                value = loss(*wrong_by(float(logit))).item()
                if math.isfinite(value):
                    writer.add_scalar("cross_entropy/value", value, logit)


def main(seed=0, log_dir=LOG_DIR, N=5, K=4):
    torch.manual_seed(seed)
    x, target = torch.randn(N), torch.randn(N)

    print("1. L1 and MSE by hand = torch.nn")
    for name, ours, module in (("L1", l1_loss, nn.L1Loss), ("MSE", mse_loss, nn.MSELoss)):
        for reduction in REDUCTIONS:
            ours_now = ours(x, target, reduction)
            show(f"{name} {reduction}", ours_now, module(reduction=reduction)(x, target))

    print("2. cross-entropy by hand = nn.CrossEntropyLoss; the last target is ignored")
    z, t, weight = torch.randn(N, K), torch.randint(K, (N,)), torch.rand(K) + 0.5
    t[-1] = -1
    for reduction in REDUCTIONS:
        for w in (None, weight):
            options = {"weight": w, "ignore_index": -1, "reduction": reduction}
            name = f"CE {reduction}{', class weights' if w is not None else ''}"
            show(name, cross_entropy(z, t, **options), nn.CrossEntropyLoss(**options)(z, t))

    print("3. dCE/dz of the first sample: autograd, softmax(z) - onehot(t)")
    z, t = torch.randn(N, K, requires_grad=True), torch.randint(K, (N,))
    nn.CrossEntropyLoss(reduction="sum")(z, t).backward()
    error = z.detach().softmax(1) - nn.functional.one_hot(t, K)
    torch.testing.assert_close(z.grad, error)
    for name, row in {"autograd": z.grad[0], "p - y": error[0]}.items():
        print(f"   {name:<10} " + " ".join(f"{value:+.4f}" for value in row.tolist()))

    limit = math.log(torch.finfo(torch.float32).max)
    print(f"4. a wrong logit a: CE as written, and by log-sum-exp; exp ends at {limit:.1f}")
    naive = {}
    for a in (1.0, 50.0, 88.0, 89.0, 1000.0):
        naive[a] = naive_cross_entropy(*wrong_by(a)).item()
        stable = cross_entropy(*wrong_by(a)).item()
        assert math.isfinite(stable)
        print(f"   a {a:6.0f}   as written {naive[a]:9.4f}   by log-sum-exp {stable:9.4f}")
    log_curves(log_dir)
    return {"naive": naive, "limit": limit}


if __name__ == "__main__":
    guard(main)
