"""A network that has learned seven shapes learns three others from ten images of each.

Its last layer, the head, has one output for each class. A new head with three outputs takes its
place and is trained alone; all other layers are frozen, which means that they no longer learn. This
is transfer: do it when you have few images, and somebody has trained a network on many images of a
similar kind. Trained anew on so few, the same network learns them by heart and guesses on others.
If all its layers are trained further at too large a learning rate, it does worse than if frozen.

    9 c_in c_out + c_out    parameters of a 3x3 convolution      c_in, c_out  its channels
    n_in n_out + n_out      parameters of a Linear layer         n_in, n_out  its inputs, outputs

VGG16, which has learned the 1,000 kinds of photographs of ImageNet, is 13 such convolutions and 3
such Linear layers. Its weights are a file of 528 MiB: `python model_pretrained.py --download`
fetches it once, and section 5, which is left out without the file, then puts a new head on it.

Needs          nn_optim.py (Adam, weight decay), nn_common_layers.py (batch norm), model.py (Moli)
Checked here   what is frozen keeps every bit, though the optimizer holds it; the parameters of
               VGG16 by formula, layer by layer, and with either head
TensorBoard    transfer/accuracy on other images by step in five runs, one for each way to train;
               picture transfer/predictions in the run section_1: the truth behind "?" if wrong
Try            in show_frozen, leave out net.eval(): which column of its table changes?
Answer         "statistics", to 9 of 9 in each row: the running mean and variance of batch norm,
               and its count, are buffers. No optimizer moves them, but each pass in train() does
Source         Simonyan & Zisserman 2015, arXiv:1409.1556, table 1, column D; Yosinski et al. 2014,
               "How transferable are features in deep neural networks?", arXiv:1411.1792
"""

import signal
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.models import VGG16_Weights, vgg16
from tqdm import tqdm

from model import Moli
from support.data import as_tensors, augment, channel_stats, have_weights, normalize, weights_path
from support.drawings import CLASSES, Shapes10
from support.files import DATASET2, guard, options_parser
from support.pictures import prediction_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "model_pretrained"
WEIGHTS, SIZE = VGG16_Weights.IMAGENET1K_V1, "528 MiB"
MEND = "python model_pretrained.py --download"
OLD, NEW = range(7), range(7, 10)  # classes of Shapes-10: what Moli has learned, what is new


# --- 1. in everyday code -----------------------------------------------------------------------


@torch.no_grad()
def predict(net, x):
    """The class of the largest output for each of x (N, ...): (N,)."""
    return torch.cat([net(batch).argmax(1) for batch in x.split(100)])


def accuracy(net, x, y):
    """The share of x (N, ...) whose largest output is that of the class y (N,)."""
    return (predict(net, x) == y).double().mean().item()


def show_everyday(log_dir, state, few, test, pictures):
    (x, y), (x_test, y_test) = few, test
    net = Moli(7)
    net.load_state_dict(state)  # pretrained weights
    net.requires_grad_(False)  # frozen: no gradient
    net.classifier[3] = nn.Linear(64, 3)  # the new head, which learns
    net.eval()  # batch norm keeps its statistics
    optimizer = torch.optim.Adam(net.classifier[3].parameters(), lr=0.01)
    print(f"1. Can Moli with a new head learn {', '.join(CLASSES[7:])}?")
    print(f"   step   loss   accuracy on its {len(y)} images   on {len(y_test)} other images")
    for step in range(31):
        loss = F.cross_entropy(net(x), y)
        if step % 10 == 0:
            said = predict(net, x_test)
            scores = accuracy(net, x, y), (said == y_test).double().mean().item()
            print(f"   {step:4}   {loss:4.2f}   {scores[0]:25.2f}   {scores[1]:19.2f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"   -> it is right on {scores[1]:.0%} of the others; a guess is right on 33%")
    print(
        "      (judge by the last column: the images that it learns from say little about others)"
    )
    grid = prediction_grid(pictures, y_test, said, CLASSES[7:], count=32)
    with SummaryWriter(log_dir / "section_1", purge_step=0) as writer:
        writer.add_image("transfer/predictions", grid, step)
    return scores


# --- 2. what is frozen stays -------------------------------------------------------------------


def change_head(net, kind, classes=10):
    """Freeze a network and give it a last layer that is not frozen: returns its name and the layer.

    "added": an nn.Linear(outputs, classes) behind the last layer of net.classifier, an
    nn.Sequential, by its add_module(name, layer). "new": an nn.Linear(inputs, classes) in the last
    one's place. The name is that in net, with a dot behind it, as "classifier.3.". Exercise.
    """
    net.requires_grad_(False)
    place, last = len(net.classifier) - 1, net.classifier[-1]
    if kind == "added":
        place, head = place + 1, nn.Linear(last.out_features, classes)
        net.classifier.add_module(str(place), head)
    else:
        head = net.classifier[place] = nn.Linear(last.in_features, classes)
    return f"classifier.{place}.", head


def with_head(state, kind="new"):
    """A Moli with the weights of `state`, if any, and a new head; the head's name and the head."""
    net = Moli(7)
    if state:
        net.load_state_dict(state)
    return net, *change_head(net, kind, classes=3)


def moved(before, net, head):
    """How many tensors of net.state_dict() differ from `before`: {part: [differ, all]}.

    Four parts, in this order: "features", the parameters of net.features; "statistics", all
    buffers; "classifier", what begins with that word but not with the prefix `head`; and "head",
    what begins with `head`. Exercise.
    """
    buffers = dict(net.named_buffers())
    counts = {part: [0, 0] for part in ("features", "statistics", "classifier", "head")}
    for name, tensor in net.state_dict().items():
        part = "head" if name.startswith(head) else name.partition(".")[0]
        count = counts["statistics" if name in buffers else part]
        count[0] += not torch.equal(tensor, before[name])
        count[1] += 1
    return counts


def train_whole(net, x, y, steps=2):
    """SGD with weight decay over all parameters, frozen or not."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()  # what is frozen gets no .grad: it stays None, and the step leaves it out
        optimizer.step()


def show_frozen(state, few):
    print("2. Which tensors move in two steps of SGD with weight decay over all parameters?")
    print("   Features: convolutions and batch norms; statistics: each batch norm's running mean,")
    print("   variance and count")
    print("   new head              layers before it  features   statistics   classifier     head")
    table = {}
    for kind, words in (("new", "in place of the old"), ("added", "behind the old one")):
        for run in ("frozen", "learn"):
            net, name, _ = with_head(state, kind)
            net.features.requires_grad_(run == "learn")
            net.eval()
            before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
            train_whole(net, *few)
            table[kind, run] = moved(before, net, name)
            f, s, c, h = (f"{m} of {n}" for m, n in table[kind, run].values())
            before_it = {"frozen": "all is frozen", "learn": "features learn"}[run]
            print(f"   {words:<19}   {before_it:<15} {f:>10} {s:>12} {c:>12} {h:>8}")
    frozen = [row[part] for row in (table["new", "frozen"], table["added", "frozen"])
              for part in ("features", "statistics", "classifier")]  # fmt: skip
    m, n = (sum(counts) for counts in zip(*frozen, strict=True))
    print(f"   -> where all is frozen, {m} of {n} tensors before the head changed by even one bit")
    return table


# --- 3. what it brings -------------------------------------------------------------------------

WAYS = {  # run: in words, whether it begins with the pretrained weights, lr of all but the head
    "frozen": ("new head on frozen features", True, None),
    "all_lr_0.0001": ("all layers trained further, lr 0.0001", True, 1e-4),
    "all_lr_0.001": ("all layers trained further, lr 0.001", True, 1e-3),
    "anew": ("all layers trained anew, lr 0.001", False, 1e-3),
    "random": ("new head on frozen random features", False, None),
}


def few_of_each(labels, n):
    """Places (K n,) of n random images of each class 0..K-1, those of class 0 first. Exercise."""
    places = [(labels == k).nonzero()[:, 0] for k in range(int(labels.max()) + 1)]
    return torch.cat([where[torch.randperm(len(where))[:n]] for where in places])


@torch.no_grad()
def head_inputs(net, x):
    """What the last layer of net.classifier gets for images x (N, 3, H, W): (N, inputs).

    It is what net(x) returns while an nn.Identity() stands in place of that layer. Afterwards the
    layer is back. Exercise.
    """
    last = net.classifier[-1]
    net.classifier[-1] = nn.Identity()
    inputs = torch.cat([net(batch) for batch in x.split(100)])
    net.classifier[-1] = last
    return inputs


def learn(net, head, lr, few, test, writer=None, steps=30):
    """Accuracy on `few` after Adam on them, and on `test`, logged every fifth step.

    The head has lr 0.01, all else `lr`. Without one it is frozen: the head's inputs do not change,
    and are computed once.
    """
    groups = [{"params": head.parameters(), "lr": 0.01}]
    if lr:
        net.requires_grad_(True)
        rest = [*net.features.parameters(), *net.classifier[1].parameters()]
        groups.append({"params": rest, "lr": lr})
    else:
        few, test = ((head_inputs(net, x), y) for x, y in (few, test))
        net = head
    optimizer, training, (x, y) = torch.optim.Adam(groups), net.training, few
    for step in range(steps + 1):
        if writer and step % 5 == 0:
            writer.add_scalar("transfer/accuracy", accuracy(net.eval(), *test), step)
        if step < steps:
            loss = F.cross_entropy(net.train(training)(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return accuracy(net.eval(), *few), accuracy(net, *test)


@torch.no_grad()
def settle(net, x):
    """Batch norm's running statistics become those of the images x; no parameter moves."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # for the mean of all passes in train(): here of one
    net.train()(x)


def show_ways(log_dir, state, new, test, images, draws, steps):
    print(f"3. How best to learn three shapes from {images} images of each? {draws} random choices")
    print(
        f"   {steps} steps of Adam; batch norm takes statistics of those images for random features"
    )
    print("   accuracy (a guess: 0.33)                own images   others: mean   lowest   highest")
    chosen = [few_of_each(new[1], images) for _ in range(draws)]  # the same for each way
    means, others = {}, {}
    for run, (words, pretrained, lr) in WAYS.items():
        scores = []
        with SummaryWriter(log_dir / run, purge_step=0) as writer:
            for places in chosen:
                few, first = (new[0][places], new[1][places]), None if scores else writer
                net, _, head = with_head(state if pretrained else None)
                if run == "random":  # else batch norm leaves its head tiny inputs
                    settle(net, few[0])
                net.train(run == "anew")  # all others keep the statistics of batch norm
                scores.append(learn(net, head, lr, few, test, first, steps))
        own, others[run] = torch.tensor(scores, dtype=torch.float64).unbind(1)
        means[run] = others[run].mean().item()
        print(f"   {words:<38} {own.mean():11.2f} {means[run]:14.2f} {others[run].min():8.2f} "
              f"{others[run].max():9.2f}")  # fmt: skip
    best, second, *rest = sorted(means, key=means.get, reverse=True)
    swing = max((others[run].max() - others[run].min()).item() for run in (best, second))
    print(f"   -> best on others: {WAYS[best][0]}, {means[best]:.0%},")
    print(f"      and {WAYS[second][0]}, {means[second]:.0%}. Another choice of images")
    print(f"      moves each by up to {swing:.0%}; the other ways get at most {means[rest[0]]:.0%}")
    return {run: values.tolist() for run, values in others.items()}


# --- 4. VGG16 and its heads --------------------------------------------------------------------

FEATURES = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def expected_parameters(features=FEATURES, linear=(512 * 7 * 7, 4096, 4096, 1000)):
    """[(inputs, outputs, parameters)] of each layer that has any, in order.

    `features` holds the output channels of 3x3 convolutions, which begin with 3 input channels, and
    "M" for a max-pool; `linear` the sizes before, between and after the Linear layers. All have
    biases. Exercise.
    """
    rows, c_in = [], 3
    for c_out in features:
        if c_out != "M":
            rows.append((c_in, c_out, 9 * c_in * c_out + c_out))
            c_in = c_out
    return rows + [(n_in, n_out, n_in * n_out + n_out) for n_in, n_out in pairwise(linear)]


def count_parameters(module, learning=False):
    """How many numbers the parameters of a module hold; those that learn, if `learning`.

    Exercise.
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)


def show_vgg16():
    print("4. How many parameters has VGG16, and how many learn under a new head for 10 classes?")
    print("   layer           inputs   outputs   parameters   by formula")
    agree = 0
    with torch.device("meta"):  # tensors of a shape without numbers: they need no memory
        nets = {"old": vgg16(), "added": vgg16(), "new": vgg16()}
        change_head(nets["added"], "added")
        change_head(nets["new"], "new")
    layers = [(name, layer) for name, layer in nets["old"].named_modules()
              if isinstance(layer, (nn.Conv2d, nn.Linear))]  # fmt: skip
    for (name, layer), (n_in, n_out, formula) in zip(layers, expected_parameters(), strict=True):
        count = count_parameters(layer)
        print(f"   {name:<13} {n_in:8,}  {n_out:8,}  {count:11,}  {formula:11,}")
        agree += count == formula
    print(f"   -> {agree} of {len(layers)} counts agree with the formula (25,088 is 512 * 7 * 7)")
    print("   head                               parameters   that learn")
    counts = {}
    for kind, words in (("old", "the old one, for 1,000 classes"),
                        ("added", "a new one behind the old one"),
                        ("new", "a new one in place of the old one")):  # fmt: skip
        counts[kind] = count_parameters(nets[kind]), count_parameters(nets[kind], learning=True)
        print(f"   {words:<33} {counts[kind][0]:11,}   {counts[kind][1]:10,}")
    share = counts["new"][1] / counts["new"][0]
    print(f"   -> with a new head in place of the old one {share:.2%} of the parameters learn")
    return counts


# --- 5. with the weights of ImageNet -----------------------------------------------------------


def show_imagenet(few, test, moli):  # moli: accuracies of a new head on Moli's features
    print("5. Do features that have learned photographs serve for drawn shapes, too?")
    net = vgg16(weights=WEIGHTS).eval()  # reads the file; without the file, fetches it first
    _, head = change_head(net, "new", classes=3)
    preset = WEIGHTS.transforms()  # only its mean and std are used: it would resize to 224 x 224
    stats = torch.tensor(preset.mean), torch.tensor(preset.std)
    few, test = ((normalize(images, *stats), y) for images, y in (few, test))
    own, others = learn(net, head, None, few, test)
    print("   new head on the frozen features of   accuracy on own images   on others")
    print(f"   VGG16, 1,000 kinds of photographs    {own:22.2f}   {others:9.2f}")
    print(f"   -> {others:.0%} of the others are right; with Moli's features {min(moli):.0%} to "
          f"{max(moli):.0%}, section 3\n"
          "      (VGG16 has learned from 224 x 224 pixels; here it gets 32 x 32)")  # fmt: skip
    return others


# --- before it: the network that has learned seven shapes --------------------------------------


def pick_classes(dataset, classes):
    """The uint8 images of these classes, a range, and their labels, counted from 0."""
    images, labels = as_tensors(dataset)
    of_these = (labels >= classes.start) & (labels < classes.stop)
    return images[of_these], labels[of_these] - classes.start


def pretrain(images, labels, stats, epochs):
    """The state dict of a Moli that has learned the seven classes of uint8 images by Adam."""
    net, whole = Moli(7), len(labels) // 64 * 64
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    order = torch.cat([torch.randperm(len(labels))[:whole] for _ in range(epochs)])
    for places in tqdm(order.split(64), "pretraining", leave=False, disable=None):
        x = normalize(augment(images[places]), *stats)  # shifted and mirrored at random
        loss = F.cross_entropy(net(x), labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, download=False, epochs=3, images=10, draws=5, steps=30
):
    weights = have_weights(WEIGHTS, MEND, SIZE, download)
    torch.manual_seed(seed)
    sets = Shapes10(root), Shapes10(root, train=False)
    (old, old_test), (new, test) = ([pick_classes(s, c) for s in sets] for c in (OLD, NEW))
    stats = channel_stats(old[0])  # mean and deviation of the images that the network has seen
    net = Moli(7)
    net.load_state_dict(state := pretrain(*old, stats, epochs))
    known = accuracy(net.eval(), normalize(old_test[0], *stats), old_test[1])
    print(f"Moli has learned {', '.join(CLASSES[:7])}: right on {known:.0%} of test images")
    places = few_of_each(new[1], images)
    x, x_test = normalize(new[0], *stats), normalize(test[0], *stats)
    few = x[places], new[1][places]
    measured = {"known": known, "parameters": {}}
    measured["everyday"] = show_everyday(log_dir, state, few, (x_test, test[1]), test[0])
    measured["moved"] = show_frozen(state, few)
    measured["others"] = show_ways(
        log_dir, state, (x, new[1]), (x_test, test[1]), images, draws, steps)  # fmt: skip
    measured["parameters"] = show_vgg16()
    if weights:
        few = new[0][places], few[1]
        measured["imagenet"] = show_imagenet(few, test, measured["others"]["frozen"])
    else:
        print(f"5. left out (a new head on VGG16): no weights at {weights_path(WEIGHTS)};\n"
              f"   {MEND} fetches {SIZE}")  # fmt: skip
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


def parse(argv=None):
    parser = options_parser()
    parser.add_argument("--download", action="store_true", help=f"fetch VGG16's weights, {SIZE}")
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    guard(main, parse)
