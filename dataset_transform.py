"""ToDtype and Normalize give training images that are not augmented mean 0 and standard deviation 1
in each colour, and every pixel can be computed back.

A pipeline is the list of steps from a picture to the tensor that a network gets. A Dataset with
transform=pipeline calls it for each picture that it reads. Augmentation (a random crop, a flip)
shows a training picture in a version drawn anew each time; test pictures get none. A step that is
left out, done twice or in a wrong place may pass without an error: section 5.

    c  a pixel's colour: red, green or blue
    mean, std  (3,), the mean and standard deviation of each colour over all training images, as x

    ToImage      a PIL picture becomes a uint8 tensor (3, H, W), the same numbers in 0..255
    ToDtype      x = number / 255, with scale=True: float32 in [0, 1]
    Normalize    z = (x - mean[c]) / std[c]      undone by x = z * std[c] + mean[c]

Called on a batch, each random transform of section 4 except GaussianNoise draws once for all its
images. So augment image by image, as a Dataset does.

Needs          read_data.py, Useful_TF.py
Checked here   mean 0 and std 1 over the set, and how a padded crop shifts them; by hand = v2; every
               pixel comes back; what draws once for a batch
TensorBoard    transform/steps: one picture after each step, the last one undone; transform/epochs:
               a row shows one image, in each epoch another version; transform/batch: above eight
               equal pictures, augmented as one batch, below unequal ones, augmented one by one
Try            in show_draws, add v2.RandomErasing(p=1) behind v2.GaussianNoise(): does it draw once
               for the batch, or for each image?
Answer         Once for the batch: its row says 1, and more than 40 image by image
Source         torchvision.transforms.v2; CIFAR-10: Krizhevsky 2009
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from support.data import as_tensors, download_cifar10, open_images, source_line
from support.files import DATASET2, guard, options_parser
from support.pictures import caption_grid, caption_row

LOG_DIR = Path(__file__).resolve().parent / "runs" / "dataset_transform"


# --- 1. in everyday code -----------------------------------------------------------------------


def show_everyday(root):
    print("1. What does each step of a pipeline make of a picture?")
    pipeline = v2.Compose([
        v2.ToImage(),
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
    ])  # fmt: skip
    dataset = open_images(root, transform=pipeline)  # or torchvision.datasets.CIFAR10(...)
    x, label = dataset[0]  # the picture is read now, and goes through the pipeline now
    print(
        "                                                                         share of numbers"
    )
    print(
        "   after                  shape         dtype           smallest   largest   changed by it"
    )
    image, changed = open_images(root)[0][0], []  # the same picture without a transform
    before = torch.tensor(np.asarray(image)).permute(2, 0, 1)
    for step in pipeline.transforms:
        image, name = step(image), type(step).__name__
        if name == "Normalize":
            name = f"Normalize({step.mean[0]}, {step.std[0]})"
        share, before = (image.float() != before.float()).float().mean().item(), image
        changed += [name] if share else []
        print(f"   {name:<20}   {tuple(image.shape)!s:<11}   {image.dtype!s:<13}   "
              f"{image.min():8.2f}   {image.max():7.2f}   {share:13.0%}")  # fmt: skip
    print(f"   -> steps that changed numbers: {', '.join(changed)}")
    print("      (RandomHorizontalFlip flips only half of the pictures)")
    versions = len(torch.stack([dataset[0][0] for _ in range(10)]).unique(dim=0))
    print(f"   -> dataset[0] is (tensor {tuple(x.shape)}, label {label}); read ten times, it gave")
    print(f"      {versions} different tensors; 9 x 9 crops, flipped or not, are {9 * 9 * 2}")
    return x, image, versions, changed


# --- 2. mean 0, standard deviation 1 -----------------------------------------------------------


def make_pipeline(mean, std, train=True):
    """The transform from a PIL picture to a normalised float32 tensor (3, 32, 32)."""
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else []
    to_z = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
    return v2.Compose([v2.ToImage(), *augment, *to_z])


def channel_stats(images, transform=None):
    """Mean and standard deviation (3,) of images (N, 3, H, W) after `transform`, by channel.

    The set may not fit into memory as floats, so the sums of x and x^2 grow part by part (2,000
    images each), in float64; std = sqrt(mean of x^2 - mean^2). Without a transform it is
    v2.ToDtype(torch.float32, scale=True). Exercise.
    """
    transform = transform or v2.ToDtype(torch.float32, scale=True)
    total, squares = torch.zeros(2, 3, dtype=torch.float64)
    for part in images.split(2000):
        x = transform(part).double()
        total += x.sum((0, 2, 3))
        squares += x.square().sum((0, 2, 3))
    mean, square = total / images[:, 0].numel(), squares / images[:, 0].numel()
    return mean.float(), (square - mean**2).sqrt().float()


def show_statistics(images):
    print(f"2. Which mean and std have the {len(images):,} training images as x, and as z?")
    print("                               z, not augmented   z, augmented: a random crop")
    print("            x = number / 255   (all images)       and flip (the first 2,000)")
    print("   colour    mean     std      mean     std       mean     std")
    mean, std = channel_stats(images)
    test, train = (v2.Compose(make_pipeline(mean, std, train=train).transforms[1:])
                   for train in (False, True))  # fmt: skip
    test_mean, test_std = channel_stats(images, test)
    drawn = torch.stack([train(image) for image in images[:2000]])  # each with a crop of its own
    train_mean, train_std = drawn.mean((0, 2, 3)), drawn.std((0, 2, 3))
    mirror = v2.RandomCrop(32, padding=4, padding_mode="reflect")  # pads with the picture's rim
    mirrored = torch.stack([test(mirror(image)) for image in images[:2000]]).mean((0, 2, 3))
    for c, name in enumerate(("red", "green", "blue")):
        numbers = (mean, std, test_mean, test_std, train_mean, train_std)
        rounded = [round(values[c].item(), 3) + 0.0 for values in numbers]  # no minus before 0
        print("   {:<6}   {:5.3f}   {:5.3f}    {:6.3f}   {:5.3f}     {:6.3f}   {:5.3f}".format(
            name, *rounded))  # fmt: skip
    off = max(test_mean.abs().max().item(), (test_std - 1).abs().max().item())
    assert off < 1e-4
    shift, without = train_mean.abs().max().item(), mirrored.abs().max().item()
    print(f"   -> not augmented: mean 0 and std 1, off by at most {off:.0e}")
    print(f"   -> augmented: the mean is off by {shift:.2f}, as RandomCrop pads with black;")
    print(
        f"      it is off by {without:.2f} with padding_mode='reflect', which mirrors the picture"
    )
    return {"mean": mean, "std": std, "off": off, "shift": shift, "without": without}


# --- 3. by hand, and back ----------------------------------------------------------------------


def normalize_by_hand(picture, mean, std):
    """A PIL picture of H x W pixels as z (3, H, W) float32: (x - mean[c]) / std[c].

    np.asarray(picture) is (H, W, 3) uint8, x is that / 255; mean and std are (3,). Exercise.
    """
    x = torch.tensor(np.asarray(picture)).permute(2, 0, 1).float() / 255
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def denormalize(z, mean, std):
    """The inverse of Normalize, z * std[c] + mean[c], for z (..., 3, H, W). Exercise."""
    return z * std.view(3, 1, 1) + mean.view(3, 1, 1)


def show_by_hand(dataset, mean, std, count):
    print(f"3. Is Normalize plain arithmetic, and can it be undone? The first of {count} images")
    print("           x = number / 255, red,   z = (x - mean) / std")
    print("   image   green, blue of pixel 0   by hand                z by v2")
    to_z, differences, wrong = make_pipeline(mean, std, train=False), [], 0
    for i in range(count):
        picture = dataset[i][0]
        z, twin = normalize_by_hand(picture, mean, std), to_z(picture)
        before = torch.tensor(np.asarray(picture)).permute(2, 0, 1)
        back = (denormalize(twin, mean, std) * 255).round().byte()
        differences.append((z - twin).abs().max().item())
        wrong += (back != before).sum().item()
        if i < 3:
            a, b, c = (" ".join(f"{v:6.3f}" for v in t[:, 0, 0]) for t in (before / 255, z, twin))
            print(f"   {i:5d}   {a}     {b}   {c}")
    assert max(differences) < 1e-5 and wrong == 0
    print(f"   -> v2 differs by at most {max(differences):.0e}; undone, {wrong} numbers change")
    return max(differences), wrong


# --- 4. one draw for a whole batch -------------------------------------------------------------


def augment_each(images, transform):
    """`transform` called on each of the images (B, 3, H, W) by itself: (B, 3, H, W). Exercise."""
    return torch.stack([transform(image) for image in images])


def count_different(images):
    """How many different ones are among images (B, 3, H, W)? Exercise."""
    return len(images.flatten(1).unique(dim=0))


def show_draws(image, copies):
    print(f"4. One image, {copies} times in a batch: how many different ones after a transform?")
    print("                          called on   called on    different ones expected")
    print(f"   transform              the batch   each image   in {copies} draws")
    batch, different = image.expand(copies, -1, -1, -1), {}
    outcomes = {"RandomHorizontalFlip": 2, "RandomCrop": 9 * 9}  # all equally likely
    for transform in [
        v2.RandomHorizontalFlip(),
        v2.RandomCrop(32, padding=4),
        v2.ColorJitter(brightness=0.5),
        v2.GaussianNoise(),
    ]:
        name = type(transform).__name__
        together, each = transform(batch), augment_each(batch, transform)
        different[name] = count_different(together), count_different(each)
        K = outcomes.get(name)
        expected = f"{K * (1 - (1 - 1 / K) ** copies):.1f} of {K}" if K else "-"
        print(f"   {name:<20}   {different[name][0]:9d}   {different[name][1]:10d}   {expected}")
    once = [name for name, (number, _) in different.items() if number == 1]
    print(f"   -> drawn once for a batch: {', '.join(once)}")
    return different


# --- 5. mistakes -------------------------------------------------------------------------------


def show_mistakes(images, mean, std):
    print("5. Which mistakes pass without an error, and does a look at mean and std show them?")
    print("       steps                                               mean      std   error")
    to_float, to_unit = v2.ToDtype(torch.float32), v2.ToDtype(torch.float32, scale=True)
    normalize, silent, hidden = v2.Normalize(mean.tolist(), std.tolist()), [], []
    jitter = v2.ColorJitter(brightness=0.2)  # it expects floats in [0, 1] and cuts off the rest
    reshaped = images.permute(0, 2, 3, 1).reshape(images.shape)  # (B, H, W, 3), but not moved back
    for i, (name, x, steps) in enumerate((
        ("right: ToDtype(scale=True), Normalize", images, [to_unit, normalize]),
        ("ToDtype without scale=True, Normalize", images, [to_float, normalize]),
        ("ToDtype(scale=True), Normalize twice", images, [to_unit, normalize, normalize]),
        ("ToDtype(scale=True), Normalize, ColorJitter", images, [to_unit, normalize, jitter]),
        ("axes by reshape(3, H, W), then as in row 1", reshaped, [to_unit, normalize]),
        ("Normalize, ToDtype(scale=True)", images, [normalize, to_unit]),
    ), 1):  # fmt: skip
        try:
            x = v2.Compose(steps)(x)
            result = f"{x.mean():9.2f}   {x.std():6.2f}   none"
            far = x.mean().abs() > 0.3 or (x.std() - 1).abs() > 0.3
            (silent if far else hidden).append(str(i))
        except TypeError as error:
            result = f"{'-':>9}   {'-':>6}   TypeError: {str(error).split('.')[0]}"
        print(f"   {i}.  {name:<43}   {result}")
    print(f"   -> no error, but a mean or std far from 0 and 1: rows {', '.join(silent)}")
    print(f"   -> no error, and both fit: rows {', '.join(hidden)}; a fit alone proves nothing")
    return silent, hidden


# --- the lesson --------------------------------------------------------------------------------


def draw(log_dir, dataset, mean, std):
    """Pictures: one after each step, eight of them in seven epochs, a batch augmented both ways."""
    to_tensor, crop, flip, *to_z = make_pipeline(mean, std).transforms
    augment = v2.Compose([crop, flip])
    steps, words = [to_tensor(dataset[0][0])], ["ToImage"]
    for step in (crop, flip, *to_z):
        steps.append(step(steps[-1]))
        words.append(type(step).__name__)
    title = "One picture after each step. Normalize: below 0 is black here, above 1 white"
    images = [*steps, denormalize(steps[-1], mean, std)]
    row = caption_row(title, images, [*words, "denormalize"], height=160)
    images, captions = [], []
    for i in range(8):
        picture, label = dataset[i]
        images += [to_tensor(picture), *(augment(to_tensor(picture)) for _ in range(7))]
        captions += [dataset.classes[label], *(f"epoch {epoch}" for epoch in range(7))]
    batch = steps[0].expand(8, -1, -1, -1)
    both = torch.cat([augment(batch), augment_each(batch, augment)])
    ways = ["as one batch"] * 8 + ["one by one"] * 8
    with SummaryWriter(log_dir, purge_step=0) as writer:
        writer.add_image("transform/steps", row, 0)
        writer.add_image("transform/epochs", caption_grid(torch.stack(images), captions), 0)
        writer.add_image("transform/batch", caption_grid(both, ways), 0)


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=64, download=False):
    if download:
        download_cifar10(root)
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    images, _ = as_tensors(dataset)
    measured = {"everyday": show_everyday(root), "statistics": show_statistics(images)}
    mean, std = (measured["statistics"][name] for name in ("mean", "std"))
    measured |= {
        "by_hand": show_by_hand(dataset, mean, std, count),
        "different": show_draws(images[0], count),
        "passed": show_mistakes(images[:500], mean, std),
    }
    draw(log_dir, dataset, mean, std)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
    return measured


def parse(argv=None):
    parser = options_parser()
    parser.add_argument(
        "--download", action="store_true", help="fetch CIFAR-10 (163 MiB) into dataset2/ first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
