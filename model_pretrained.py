"""What is frozen stays, bit for bit, weight decay or not: the optimizer skips a gradient of None.

    VGG16          3x3 convolutions with that many filters, max-pools M, then three Linear layers:
                   64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M 4096 4096 1000
    parameters     9 c_in c_out + c_out a convolution, n_in n_out + n_out a Linear: 138,357,544
    added head     classifier.add_module("7", Linear(1000, 10))     after the old last layer
    new head       classifier[6] = Linear(4096, 10)                 in its place

A gradient of zero would not do: weight decay would still shrink the weights. A pretrained network
lends its features to another task: freeze all, add a head, train the head. As nothing before it
changes, its inputs are computed once and stored. The features must have been trained: on random
ones a head of 40,970 parameters learns its 64 images by heart, and guesses on others.

Checked here   parameters by formula, layer by layer, and with either head; SGD over all parameters
               moves the head and no bit of what is frozen, and of thawed features every tensor; the
               head's gradient from stored inputs is that through the whole network
TensorBoard    head/loss and head/accuracy in the runs random_train, random_val and, with weights,
               imagenet_train, imagenet_val
Try            vgg16_bn, frozen but in train(): do the features stay? No: BatchNorm's statistics are
               buffers, which no optimizer moves, but each forward pass; eval() holds them
Source         Simonyan & Zisserman 2015, arXiv:1409.1556, table 1, column D; torchvision.models.vgg
"""

import hashlib
import signal
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.models import VGG16_Weights, vgg16

from support.data import as_tensors, open_images, source_line
from support.files import DATASET2, DataError, guard, options_parser

LOG_DIR = Path(__file__).resolve().parent / "runs" / "model_pretrained"
WEIGHTS = VGG16_Weights.IMAGENET1K_V1
MEND = "python model_pretrained.py --download"
FEATURES = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def expected_parameters(features=FEATURES, linear=(512 * 7 * 7, 4096, 4096, 1000)):
    """[(inputs, outputs, parameters)] of each layer that has any, in order.

    `features` holds the output channels of 3x3 convolutions, which begin with 3 input channels, and
    "M" for a pool; `linear` the sizes before, between and after the Linear layers. All have biases.
    Exercise.
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


def weights_path():
    """Where torch.hub and torchvision keep the ImageNet weights of VGG16."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS.url).name)


def is_intact(path):
    """Whether a file vgg16-<hash>.pth is there and its SHA-256 begins with the hash in its name.

    Exercise.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest.startswith(path.stem.rpartition("-")[2])


def fetch_weights(path):
    """Download to `path`, whole or not at all. Raises DataError without network."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS.url, path, path.stem.rpartition("-")[2])
    except (OSError, RuntimeError, HTTPException) as error:
        reason = f"cannot fetch {WEIGHTS.url} (528 MB): {error}"
        raise DataError(f"{reason}; try again, or put the file at {path} by hand") from error


def imagenet_state(download=False):
    """The ImageNet state dict; None if it is not there. Raises DataError if it is damaged."""
    path = weights_path()
    intact = is_intact(path)
    if download and not intact:
        fetch_weights(path)
    elif path.is_file() and not intact:
        raise DataError(f"{path} is damaged (its SHA-256 is another): {MEND} fetches it anew")
    elif not intact:
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def with_state(build, state):
    """The network that build() makes, on the very tensors of `state`, in eval mode.

    Build under torch.device("meta"), which gives shapes without memory; load with assign=True.
    Exercise.
    """
    with torch.device("meta"):  # shapes without memory
        net = build()
    net.load_state_dict(state, assign=True)
    return net.eval()


def change_head(net, kind, classes=10):
    """Freeze a VGG and give it a last layer that is not frozen: returns its name and the layer.

    "added": an nn.Linear(its outputs, classes) behind net.classifier[6], name "classifier.7.";
    otherwise an nn.Linear(its inputs, classes) in its place, name "classifier.6.". Exercise.
    """
    net.requires_grad_(False)
    last = net.classifier[6]
    if kind == "added":
        net.classifier.add_module("7", nn.Linear(last.out_features, classes))
        return "classifier.7.", net.classifier[7]
    net.classifier[6] = nn.Linear(last.in_features, classes)
    return "classifier.6.", net.classifier[6]


def train_whole(net, x, y, steps):
    """SGD with weight decay over all parameters, frozen or not; in eval mode, so no Dropout."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def moved(before, net, head):
    """[tensors that are not as in `before`, all] of features, classifier and `head`, a prefix.

    Three such lists by "features", "classifier", "head", over net.state_dict(); a tensor whose name
    begins with `head` counts there alone, others by what stands before the first dot. Exercise.
    """
    counts = {"features": [0, 0], "classifier": [0, 0], "head": [0, 0]}
    for name, tensor in net.state_dict().items():
        count = counts["head" if name.startswith(head) else name.partition(".")[0]]
        count[0] += not torch.equal(tensor, before[name])
        count[1] += 1
    return counts


@torch.no_grad()
def head_inputs(net, x):
    """What the last layer of a VGG gets for images x (N, 3, H, W): (N, inputs).

    net.features, net.avgpool, flatten(1), then net.classifier without its last layer. Exercise.
    """
    h = [net.avgpool(net.features(batch)).flatten(1) for batch in x.split(32)]  # (B, 512 * 7 * 7)
    return net.classifier[:-1](torch.cat(h))


def train_head(head, splits, epochs, writers):
    """Adam on stored inputs, splits = {"train": (h, y), "val": (h, y)}. The last accuracies."""
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for epoch in range(epochs):
        losses, accuracy = {}, {}
        for split, (h, y) in splits.items():
            logits = head(h)  # (N, 10)
            losses[split] = F.cross_entropy(logits, y)
            accuracy[split] = (logits.argmax(1) == y).float().mean().item()
            writers[split].add_scalar("head/loss", losses[split].item(), epoch)
            writers[split].add_scalar("head/accuracy", accuracy[split], epoch)
        optimizer.zero_grad()
        losses["train"].backward()
        optimizer.step()
    return accuracy


def load_splits(root, size):
    """`size` images for training and as many for validation, normalised as the weights expect.

    They stay 32 x 32, for speed: WEIGHTS.transforms() would enlarge them to 224 x 224.
    """
    dataset = open_images(root)
    print(source_line(dataset))
    images, labels = (part[: 2 * size] for part in as_tensors(dataset))
    preset = WEIGHTS.transforms()
    mean, std = torch.tensor(preset.mean), torch.tensor(preset.std)
    x = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)  # (2 size, 3, 32, 32)
    return {"train": (x[:size], labels[:size]), "val": (x[size:], labels[size:])}


def main(
    seed=0, log_dir=LOG_DIR, root=DATASET2, download=False, build=vgg16,
    size=64, batch=8, steps=2, epochs=100,
):  # fmt: skip
    torch.manual_seed(seed)
    imagenet, path = imagenet_state(download), weights_path()
    print(f"weights: {path}" if imagenet else f"weights: none at {path}; to fetch 528 MB: {MEND}")
    splits = load_splits(root, size)

    print("1. parameters of VGG16, layer by layer: counted, by formula")
    with torch.device("meta"):
        net = vgg16()
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    rows = expected_parameters()
    for (name, layer), (n_in, n_out, formula) in zip(layers, rows, strict=True):
        count = count_parameters(layer)
        assert count == formula
        print(f"   {name:<13} {n_in:6,} -> {n_out:5,} {count:12,} {formula:12,}")
    total = count_parameters(net)
    assert total == sum(formula for *_, formula in rows)
    print(f"   all {total:,}   share of the first Linear {rows[-3][2] / total:.3f}")

    print("2. with a head for 10 classes: parameters, by formula, those that learn")
    formulas = {"added": total + 1000 * 10 + 10, "new": total - 4097 * 1000 + 4097 * 10}
    heads = {}
    for kind, formula in formulas.items():
        with torch.device("meta"):
            net = vgg16()
            change_head(net, kind)
        heads[kind] = count_parameters(net), count_parameters(net, learning=True)
        assert heads[kind][0] == formula
        print(f"   {kind:<6} {heads[kind][0]:,}   {formula:,}   {heads[kind][1]:6,}")

    print(f"3. {steps} steps of SGD with weight decay over all parameters: tensors that moved")
    random = build().state_dict()
    before = {name: tensor.clone() for name, tensor in random.items()}
    x, y = (part[:batch] for part in splits["train"])
    movements = {}
    for run, kind in {"added": "added", "new": "new", "new, features thawed": "new"}.items():
        net = with_state(build, random)
        name, head = change_head(net, kind)
        heads_before = {name + key: tensor.clone() for key, tensor in head.state_dict().items()}
        net.features.requires_grad_("thawed" in run)
        train_whole(net, x, y, steps)
        movements[run] = moved(before | heads_before, net, name)
        cells = [f"{part} {m:2d} of {n:2d}" for part, (m, n) in movements[run].items()]
        print(f"   {run:<21} {'   '.join(cells)}")

    print(f"4. {epochs} epochs of Adam for a new head on stored inputs of {size} images: accuracy")
    accuracy = {}
    for source, state in {"random": before, "imagenet": imagenet}.items():
        if state is None:
            continue
        net = with_state(build, state)
        _, head = change_head(net, "new")
        stored = {split: (head_inputs(net, x), y) for split, (x, y) in splits.items()}
        gradients = [
            torch.autograd.grad(F.cross_entropy(logits, y), head.weight)[0]
            for logits in (net(x), head(stored["train"][0][:batch]))
        ]
        torch.testing.assert_close(*gradients)
        writers = {s: SummaryWriter(log_dir / f"{source}_{s}", purge_step=0) for s in stored}
        with writers["train"], writers["val"]:
            accuracy[source] = train_head(head, stored, epochs, writers)
        print(f"   {source:<9} train {accuracy[source]['train']:.3f}   "
              f"val {accuracy[source]['val']:.3f}   chance 0.100")  # fmt: skip
    return {"total": total, "heads": heads, "moved": movements, "accuracy": accuracy}


def parse(argv=None):
    parser = options_parser()
    parser.add_argument("--download", action="store_true", help="fetch the weights, 528 MB")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
