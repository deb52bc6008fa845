"""A fresh network for K classes starts at a loss of about log K if its init is the default one
and its input has mean 0 and deviation 1; if it does not, look for a bug.

Before training, the outputs of a network (its logits z_k, one for each class k) are small and know
nothing of the right class t. So each class gets a probability of about 1 / K, and cross-entropy is
about -log(1 / K) = log K. One batch is enough to see it. Some bugs also start at log K. So train on
one small batch again and again: a network of this size can learn it by heart, and its loss must
fall to nearly 0.

    loss of an image     logsumexp(z) - z_t = log K + Var(z) / 2 + (mean(z) - z_t) + terms that are
                         smaller where the logits are small
    its gradient         along the last bias it is the mean over all images of p - y
    a small step         of the parameters by -lr g lowers the loss by about lr |g|^2

    Var, mean  over the K logits of an image     p  softmax(z), probabilities     y  1 for t, else 0
    g  the gradient of all parameters, |g| its length     lr  the learning rate

Needs          nn_loss.py, nn_optim.py, model.py (Moli, a network for images, with batch norm)
Checked here   log K for three K; the formula, and where it fails; eight bugs, seen by a test or by
               none; the gradient of the last bias; a small step; a layer without gradient
TensorBoard    overfit/loss by step: the runs right and shuffled fall to 0, softmax and black do
               not; grad/norm by layer in fresh, zero_last: the latter is 0 for all but the last
Try            in show_everyday, write 0.1 * model(x) for model(x): how far is the loss from log K?
Answer         Less than 0.01 for each K: the smaller the logits, the nearer each class to 1 / K
Source         Glorot & Bengio 2010; the tests: Karpathy 2019, A Recipe for Training Neural Networks
"""

import copy
import math
import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from model import Moli
from support.data import as_tensors, channel_stats, open_images, source_line
from support.files import DATASET2, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "nn_loss_network"
NEAR, LOW = 0.2, 0.5  # a first loss is right this near to log K, a last one below this


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(x):
    print(f"1. In everyday code: the first loss of fresh networks on {len(x)} images")
    print("     K     loss    log K   loss - log K")
    rows = {}
    for K in (2, 10, 100):
        model = Moli(num_classes=K)
        t = torch.randint(K, (len(x),))  # any labels will do: it knows none of them
        loss = F.cross_entropy(model(x), t)
        rows[K] = loss.item(), math.log(K)
        print(f"   {K:3d}   {loss:6.3f}   {math.log(K):6.3f}   {loss - math.log(K):+12.3f}")
    off = max(abs(loss - expected) for loss, expected in rows.values())
    print(f"   -> each first loss is log K within {off:.2f}")
    return rows


# --- 2. which parts the first loss has ----------------------------------------------------------


def without_norm(model):
    """A copy of Moli, same weights, its batch norms replaced by nn.Identity(); the model stays.

    model.features has three blocks, in each the batch norm is number 2. Exercise.
    """
    model = copy.deepcopy(model)
    for block in model.features:
        block[2] = nn.Identity()
    return model


def expected_loss(z, t):
    """Cross-entropy to second order in the logits z (B, K), for targets t (B,): a tensor ().

    The mean over the batch of log K + Var_k(z) / 2 + mean_k z - z_t; Var divides by K. Exercise.
    """
    bracket = z.mean(1) - z.gather(1, t[:, None]).squeeze(1)
    return math.log(z.shape[1]) + (z.var(1, correction=0) / 2 + bracket).mean()


def show_expansion(model, x, t):
    print(f"2. Which parts has the first loss? Means over {len(x)} images; z: the 10 logits of one")
    print("   Loss = log K + Var(z)/2 + mean(z)-z_t + smaller terms; z_t is the right class's z")
    print("   fresh network                    log K   Var(z)/2   mean(z)-z_t   their sum    loss")
    plain, rows = without_norm(model), {}
    pixels = 60 * x + 120  # about 0..255 again
    for name, network, images in (
        ("batch norm, train mode", copy.deepcopy(model).train(), x),
        ("batch norm, eval: mean 0, var 1", copy.deepcopy(model).eval(), x),
        ("no batch norm", plain, x),
        ("no batch norm, pixels 0..255", plain, pixels),
    ):
        with torch.no_grad():
            z = network(images)
        loss, total = F.cross_entropy(z, t).item(), expected_loss(z, t).item()
        spread = z.var(1, correction=0).mean().item() / 2
        rows[name] = {"loss": loss, "sum": total, "spread": spread}
        bracket = total - spread - math.log(10)
        print(f"   {name:<31}  {math.log(10):.3f}   {spread:8.3f}   {bracket:+11.3f}   "
              f"{total:9.3f}   {loss:5.3f}")  # fmt: skip
    off = [abs(row["loss"] - row["sum"]) for row in rows.values()]
    spread = max(row["spread"] for row in list(rows.values())[:3])
    print(f"   -> small logits: Var(z)/2 is at most {spread:.3f}; the sum is the loss within "
          f"{max(off[:3]):.0e}")  # fmt: skip
    print(f"   -> the large logits of raw pixels: the sum is off by {off[3]:.2f}")
    return rows


# --- 3. bugs -----------------------------------------------------------------------------------


def sum_loss(z, t):
    return F.cross_entropy(z, t, reduction="sum")


def loss_of_softmax(z, t):
    return F.cross_entropy(z.softmax(1), t)


def wide_last_layer(model):
    """A copy whose last layer has weights of deviation 1, as torch.randn draws them."""
    model = copy.deepcopy(model)
    nn.init.normal_(model.classifier[-1].weight)
    return model


def overfit(model, x, t, loss_function, steps):
    """The loss before each of `steps` steps of Adam, lr 0.001, on one batch: a list of floats.

    A deep copy of the model is trained, in train mode; the model stays as it is. Exercise.
    """
    model, losses = copy.deepcopy(model).train(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_function(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show_bugs(log_dir, x, t, steps):
    print(f"3. Which bugs does the first loss show? It should be log 10 = {math.log(10):.3f}")
    print(f"   If it is: does it fall to 0 in {steps} steps on the same {len(x)} images?")
    print("   bug                                         first loss   last loss   least possible")
    model, ce, least = Moli(), F.cross_entropy, {"right": 0.0, "shuffled": 0.0}
    least["softmax"] = math.log(1 + 9 / math.e)  # p is 1 and nine times 0: nn_loss.py, section 4
    share = t.bincount() / len(t)
    least["black"] = -share.xlogy(share).sum().item()  # if all look alike, p can be the share
    losses, at_once, later, neither = {}, [], [], []
    bugs = [
        ("none", "right", model, x, t, ce),
        # with batch norm the next one would look right
        ("pixels in 0..255, no batch norm", "", without_norm(model), 60 * x + 120, t, ce),
        ("last layer's weights of deviation 1", "", wide_last_layer(model), x, t, ce),
        ("100 outputs for 10 classes", "", Moli(100), x, t, ce),
        ("sum of the losses, not the mean", "", model, x, t, sum_loss),
        ("nll_loss of logits, not of log_softmax", "", model, x, t, F.nll_loss),
        ("softmax before cross_entropy", "softmax", model, x, t, loss_of_softmax),
        ("all images black", "black", model, torch.zeros_like(x), t, ce),
        ("labels of other images", "shuffled", model, x, t[torch.randperm(len(t))], ce),
    ]
    for i, (words, run, network, images, labels, loss) in enumerate(bugs):
        losses[words] = overfit(network, images, labels, loss, steps if run else 1)
        first, last = losses[words][0], losses[words][-1]
        if abs(first - math.log(10)) > NEAR:
            at_once.append(i)
        elif last > LOW:
            later.append(i)
        else:
            neither.append(i)
        shown = f"{last:9.3f}   {least[run]:14.3f}" if run else f"{'-':>9}   {'-':>14}"
        print(f"   {i}  {words:<39}   {first:10.3f}   {shown}")
        if run:
            draw(log_dir / run, "overfit/loss", losses[words])
    words = [", ".join(map(str, rows)) for rows in (at_once, later, neither)]
    print(f"   -> the first loss is more than {NEAR} off in rows {words[0]}")
    print(f"   -> the last loss is above {LOW} in rows {words[1]}")
    print(f"   -> both look right in rows {words[2]}: look at some images with their labels, too")
    return {"losses": losses, "least": least, "rows": (at_once, later, neither)}


# --- 4. the first backward ---------------------------------------------------------------------


def gradient_norms(model):
    """{name: norm of dL/dW, a float} of each layer with a weight matrix, in order.

    Those are the nn.Conv2d and nn.Linear of the model, after a backward(). Exercise.
    """
    return {name: m.weight.grad.norm().item() for name, m in model.named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))}  # fmt: skip


def loss_after_step(model, x, t, lr):
    """The loss after one plain gradient step p - lr p.grad; the model itself stays as it is.

    A deep copy is moved, its cross-entropy on x, t returned; copy.deepcopy does not copy gradients.
    Exercise.
    """
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), model.parameters(), strict=True):
            p -= lr * q.grad
        return F.cross_entropy(moved(x), t)


def show_backward(log_dir, model, x, t, lr):
    print("4. Is the first backward() right, too? With batch norm in train mode; g is the gradient")
    z = model(x)
    loss = F.cross_entropy(z, t)
    loss.backward()
    bias = model.classifier[-1].bias.grad
    error = (z.softmax(1) - F.one_hot(t, z.shape[1])).mean(0).detach()
    torch.testing.assert_close(bias, error)
    print("   class                          " + "".join(f"{k:8d}" for k in range(5)) + "   ...")
    for name, row in ("gradient of the last bias", bias), ("mean of softmax minus one-hot", error):
        print(f"   {name:<31}" + "".join(f"{value:+8.4f}" for value in row[:5].tolist()))
    print(f"   -> the two differ by at most {(bias - error).abs().max():.0e}")
    fall = (loss - loss_after_step(model, x, t, lr)).item()
    theory = lr * sum(p.grad.square().sum().item() for p in model.parameters())
    print(f"   -> a step of lr {lr:g} lowers the loss by {fall:.2e}, which is {fall / theory:.2f} "
          "times lr |g|^2")  # fmt: skip
    zeroed = copy.deepcopy(model)  # its gradients are not copied
    nn.init.zeros_(zeroed.classifier[-1].weight)
    first = F.cross_entropy(zeroed(x), t)
    first.backward()
    norms = {"fresh": gradient_norms(model), "zero_last": gradient_norms(zeroed)}
    print("   layer           name           length of its gradient   with last weights 0")
    names = [*(f"convolution {i}" for i in (1, 2, 3)), "linear 1", "linear 2"]
    for layer, (name, a) in zip(names, norms["fresh"].items(), strict=True):
        print(f"   {layer:<13}   {name:<12}   {a:22.4f}   {norms['zero_last'][name]:19.4f}")
    dead = sum(norm == 0 for norm in norms["zero_last"].values())
    print(f"   -> with last weights 0 the first loss is {first:.3f}, but {dead} of {len(names)} "
          "layers get no gradient")  # fmt: skip
    for run, lengths in norms.items():
        draw(log_dir / run, "grad/norm", lengths.values())
    return {"fall": fall, "theory": theory, "norms": norms, "zeroed": first.item()}


# --- the lesson --------------------------------------------------------------------------------


def draw(log_dir, tag, values):
    """A curve over the steps 0, 1, 2 ..."""
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, step)


def load_batch(root, count):
    """The first `count` images (B, 3, 32, 32), mean 0 and std 1 by channel, and labels (B,)."""
    dataset = open_images(root)
    images, labels = (t[:count] for t in as_tensors(dataset))
    mean, std = channel_stats(images)
    x = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x, labels, source_line(dataset)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=128, few=32, steps=30, lr=1e-4):
    torch.manual_seed(seed)
    x, t, source = load_batch(root, count)
    print(source)
    model = Moli().double()  # float64 for the formulas
    measured = {
        "everyday": show_everyday(x.float()),
        "expansion": show_expansion(model, x, t),
        "bugs": show_bugs(log_dir, x[:few].float(), t[:few], steps),
        "backward": show_backward(log_dir, model, x, t, lr),
    }
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


if __name__ == "__main__":
    guard(main)
