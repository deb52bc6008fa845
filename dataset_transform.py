"""Without augmentation a transform pipeline changes only the form: undo it and the image is back.

    ToImage      PIL (W, H) -> uint8 tensor (3, H, W) in 0..255, the same numbers
    ToDtype      x / 255 -> float32 in [0, 1]
    Normalize    (x - mean[c]) / std[c] -> mean 0, std 1 over the data set, channel by channel

Augmentation (RandomCrop, RandomHorizontalFlip) changes content: each epoch sees another version of
an image under the same label. It is for training images only. Called on a whole batch, a random v2
transform draws once for all of it, so a batch is augmented image by image or by code of its own.

Checked here   shape, dtype and range after each step; mean 0, std 1 over the set; the inverse; and
               that a flip on a batch turns all its images or none
TensorBoard    images/before, images/augmented, images/restored
Try            mean = std = 0.5 in Normalize: which range results? [-1, 1], whatever the images
Source         Krizhevsky 2009 (CIFAR-10); torchvision.transforms.v2
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from support.data import as_tensors, channel_stats, download_cifar10, open_images, source_line
from support.files import DATASET2, guard, options_parser
from support.pictures import caption_grid

LOG_DIR = Path(__file__).resolve().parent / "runs" / "dataset_transform"


def pipeline(mean, std, train=True):
    """The v2 transform from a PIL image to a normalised float32 tensor (3, 32, 32)."""
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else []
    form = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
    return v2.Compose([v2.ToImage(), *augment, *form])


def denormalize(x, mean, std):
    """The inverse of Normalize, for x of shape (..., 3, H, W)."""
    return x * std.view(3, 1, 1) + mean.view(3, 1, 1)


def trace(image, transform):
    """The name of each step of `transform`, and what one PIL image is after it."""
    yield "PIL image", v2.functional.pil_to_tensor(image)
    for step in transform.transforms:
        image = step(image)
        yield type(step).__name__, image


def main(seed=0, log_dir=LOG_DIR, root=DATASET2, count=64, download=False):
    if download:
        download_cifar10(root)
    torch.manual_seed(seed)
    dataset = open_images(root)
    print(source_line(dataset))
    images, _ = as_tensors(dataset)
    mean, std = channel_stats(images)

    print("1. one image through the pipeline")
    for name, x in trace(dataset[0][0], pipeline(mean, std)):
        print(
            f"   {name:<22} {tuple(x.shape)!s:<12} {x.dtype!s:<14} {x.min():8.3f} … {x.max():8.3f}"
        )

    form = pipeline(mean, std, train=False)
    print("2. normalised with the set's own mean and standard deviation, all images")
    form_batch = v2.Compose(form.transforms[1:])  # a batch is a tensor already
    moments = torch.zeros(2, 3, dtype=torch.float64)  # E[x], E[x^2] by channel
    for batch in images.split(2000):
        x = form_batch(batch).double()
        moments += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
    moments /= len(images) * 32 * 32
    moments[1] = (moments[1] - moments[0].square()).sqrt()
    theory = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    torch.testing.assert_close(moments, theory, rtol=0, atol=1e-4)
    rows = zip(("mean", "std"), (mean, std), moments, (0, 1), strict=True)
    for name, before, after, target in rows:
        off = (after - target).abs().max()
        print(f"   {name:<5} before {before.numpy().round(3)}   after, off {target} by {off:.0e}")

    print("3. back again, and sample by sample against by the batch")
    singles = torch.stack([form(dataset[i][0]) for i in range(count)])  # (count, 3, 32, 32)
    torch.testing.assert_close(singles, form_batch(images[:count]))
    restored = denormalize(singles, mean, std)
    error = (restored - images[:count] / 255).abs().max().item()
    assert error < 1e-6
    print(f"   largest |restored - original| {error:.1e}   batch = samples: yes")

    print(f"4. RandomHorizontalFlip on a batch of {count}: images turned, in eight calls")
    flip = v2.RandomHorizontalFlip()
    same = [(flip(images[:count]) == images[:count]).flatten(1).all(1) for _ in range(8)]
    turned = [count - int(kept.sum()) for kept in same]
    assert set(turned) <= {0, count}
    print(f"   {' '.join(f'{n}' for n in turned)}   one draw for all: 0 or {count}")

    augmented = torch.stack([pipeline(mean, std)(dataset[i][0]) for i in range(count)])
    names = [dataset.classes[dataset.targets[i]] for i in range(count)]
    with SummaryWriter(log_dir, purge_step=0) as writer:
        for tag, x in {
            "before": images[:count],
            "augmented": denormalize(augmented, mean, std),
            "restored": restored,
        }.items():
            pixels = x if x.dtype == torch.uint8 else (x * 255).round().clamp(0, 255).byte()
            writer.add_image(f"images/{tag}", caption_grid(pixels, names), 0)
    return {"mean": mean.tolist(), "moments": moments.tolist(), "error": error, "turned": turned}


def parse(argv=None):
    parser = options_parser()
    parser.add_argument(
        "--download", action="store_true", help="fetch CIFAR-10 (163 MiB) into dataset2/ first"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard(main, lambda: vars(parse()))
