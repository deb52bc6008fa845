"""Each transform obeys a small formula, and what looks random repeats with its seed.

    Normalize    (x - mean) / std, undone by x * std + mean
    Resize(s)    the short side becomes s, the long one int(s * long / short): the aspect stays
    Resize(h,w)  exactly (h, w): the aspect goes
    Compose      f then g = g(f(x))
    RandomCrop   a window x[:, i:i+h, j:j+w] whose corner is uniform; the seed fixes it

Checked here   all five, on an image; the crop is a true window of it; seeds repeat and differ; the
               corner is uniform by a chi-square test
TensorBoard    useful_tf/normalize, resize_short, resize_exact, random_crop (step = draw)
Try            Resize before or after Normalize: does the order matter? Hardly: both are linear
Source         torchvision.transforms.v2
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from support.data import first_picture, hymenoptera, hymenoptera_source
from support.files import DATASET, guard

LOG_DIR = Path(__file__).resolve().parent / "runs" / "Useful_TF"


def normalize(x, mean, std):
    """(3, H, W) -> (3, H, W), each channel with its own mean and std."""
    mean, std = torch.tensor(mean), torch.tensor(std)
    return (x - mean[:, None, None]) / std[:, None, None]


def short_side_size(height, width, short):
    """(height, width) after Resize(short)."""
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def find_window(image, crop):
    """The corners (i, j) at which `crop` (C, h, w) is a window of `image` (C, H, W)."""
    h, w = crop.shape[1:]
    windows = image.unfold(1, h, 1).unfold(2, w, 1)  # (C, H-h+1, W-w+1, h, w)
    equal = (windows == crop[:, None, None]).flatten(3).all(-1).all(0)
    return [tuple(corner) for corner in equal.nonzero().tolist()]


def corner_counts(draws, side=8, size=5):
    """How often RandomCrop(size) of a (side, side) image took each possible corner."""
    grid = torch.arange(side * side).view(1, side, side)  # every pixel tells its own place
    crop, corners = v2.RandomCrop(size), side - size + 1
    taken = torch.stack([crop(grid)[0, 0, 0] for _ in range(draws)])
    return (taken // side * corners + taken % side).bincount(minlength=corners**2)


def seeded(transform, x, seed):
    torch.manual_seed(seed)
    return transform(x)


def main(seed=0, log_dir=LOG_DIR, root=DATASET, draws=3200):
    torch.manual_seed(seed)
    folder = hymenoptera(root)
    print(hymenoptera_source(folder))
    picture = first_picture(folder, "bees")
    x = v2.functional.to_dtype(v2.functional.pil_to_tensor(picture), scale=True)
    height, width = x.shape[1:]

    print("1. Normalize: mean 0.5, std 0.5 maps [0, 1] to [-1, 1]")
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
    y = v2.Normalize(mean, std)(x)
    torch.testing.assert_close(y, normalize(x, mean, std))
    back = y * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(back, x)
    half = v2.Normalize([0.5] * 3, [0.5] * 3)(x)
    error = (back - x).abs().max().item()
    print(f"   range {half.min():.3f} … {half.max():.3f}   back again, error {error:.1e}")

    print(f"2. Resize of (height {height}, width {width})")
    short, exact = v2.Resize(128)(x), v2.Resize((128, 128))(x)
    assert short.shape[1:] == short_side_size(height, width, 128)
    assert exact.shape[1:] == (128, 128)
    for name, image in {"Resize(128)": short, "Resize((128, 128))": exact}.items():
        h, w = image.shape[1:]
        print(f"   {name:<20} {(h, w)!s:<12} aspect {w / h:.3f}   was {width / height:.3f}")

    print("3. Compose([Resize, Normalize]) is the one after the other")
    both = v2.Compose([v2.Resize(128), v2.Normalize(mean, std)])(x)
    assert torch.equal(both, v2.Normalize(mean, std)(short))
    swapped = v2.Resize(128)(y)
    print(f"   equal bit for bit   other order differs by {(swapped - both).abs().max():.1e}")

    print("4. RandomCrop(64)")
    crop = v2.RandomCrop(64)
    crops = [seeded(crop, short, s) for s in range(seed, seed + 4)]
    assert torch.equal(crops[0], seeded(crop, short, seed))
    corners = [find_window(short, c) for c in crops]
    print(f"   corners of four seeds {' '.join(f'{c[0]}' for c in corners)}   same seed, same crop")
    counts = corner_counts(draws)
    expected = draws / len(counts)
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    print(
        f"   chi2 of {draws} corners over {len(counts)} places {chi2:.1f}   mean 15, p .001 at 37.7"
    )

    with SummaryWriter(log_dir, purge_step=0) as writer:
        writer.add_image("useful_tf/normalize", (y - y.min()) / (y.max() - y.min()), 0)
        writer.add_image("useful_tf/resize_short", short, 0)
        writer.add_image("useful_tf/resize_exact", exact, 0)
        for step, image in enumerate(crops):
            writer.add_image("useful_tf/random_crop", image, step)
    return {"short": tuple(short.shape), "corners": corners, "chi2": chi2}


if __name__ == "__main__":
    guard(main)
