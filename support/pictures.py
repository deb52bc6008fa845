"""Pictures for TensorBoard: grids and rows with captions, heat, the confusion matrix, the graph."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


def caption_grid(images, captions, columns=8, scale=3):
    """uint8 images (N, 3, H, W), enlarged, each over its caption: one picture (3, H', W') uint8."""
    side, line = images.shape[-1] * scale, 14
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (side + 4), rows * (side + line + 4)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (side + 4), i // columns * (side + line + 4)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        grid.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + side), caption, "black", font)
    return np.asarray(grid).transpose(2, 0, 1)


def caption_row(title, images, captions, height=None):
    """Images (1 or 3, H, W) of any sizes side by side under a title, each over its own words.

    They are uint8, or floats, of which what lies outside [0, 1] is cut off as TensorBoard does it.
    `height` enlarges or shrinks each to so many pixels. Returns one picture (3, H', W') uint8.
    """
    font, line, gap = ImageFont.load_default(16), 20, 10
    shown = []
    for image in images:
        image = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).byte()
        shown.append(Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()))
        if height:
            width = max(1, round(shown[-1].width * height / shown[-1].height))
            shown[-1] = shown[-1].resize((width, height), Image.Resampling.NEAREST)
    words = [caption.split("\n") for caption in captions]
    widths = [max(picture.width, *(int(font.getlength(text)) + 1 for text in lines)) + gap
              for picture, lines in zip(shown, words, strict=True)]  # fmt: skip
    top, tallest = line + gap, max(picture.height for picture in shown)
    width = max(sum(widths), int(font.getlength(title)) + gap) + gap
    row = Image.new("RGB", (width, top + tallest + max(map(len, words)) * line + gap), "white")
    pen, x = ImageDraw.Draw(row), gap
    pen.text((gap, gap // 2), title, "black", font)
    for picture, lines, step in zip(shown, words, widths, strict=True):
        row.paste(picture, (x, top))
        pen.text((x, top + picture.height + 1), "\n".join(lines), "black", font, spacing=2)
        x += step
    return np.asarray(row).transpose(2, 0, 1)


def framed(heat, first, size):
    """heat (H, W) as grey levels (3, H, W), a red frame around the square of `size` at `first`."""
    picture = (heat / heat.max()).expand(3, -1, -1).clone()
    low, high = first - 1, first + size  # the frame itself lies outside the field
    red = torch.tensor([1.0, 0, 0])[:, None]
    for edge in (low, high):
        picture[:, edge, low : high + 1] = red
        picture[:, low : high + 1, edge] = red
    return picture


def heat_over(grey, heat):
    """Heat (N, h, w) of any size in red over grey pictures (N, H, W) in [0, 1]: (N, 3, H, W).

    The hottest place of each picture is pure red; where there is no heat the grey stays.
    """
    red = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-9)
    red = F.interpolate(red[:, None], grey.shape[1:], mode="bilinear")  # (N, 1, H, W)
    return grey[:, None] * (1 - red) + red * torch.tensor([1.0, 0, 0]).view(3, 1, 1)


def heat_columns(title, grey, heats, captions, height=192):
    """Pictures in [0, 1] side by side under a title, each above its heats and its words.

    grey (N, H, W); `heats` is a list of maps (N, h, w), from top to bottom. As many are drawn as
    there are captions. Returns one picture (3, H', W') uint8.
    """
    n = len(captions)
    rows = [torch.zeros_like(grey), *heats]  # over the uppermost picture lies no heat
    columns = torch.cat([heat_over(grey[:n], heat[:n]) for heat in rows], dim=2)
    return caption_row(title, columns, captions, height)


def path_over_contours(f, path, centre, reach, words, size=420):
    """Points (n, 2) and the joints between them over bands of grey of f: (size, size, 3) uint8.

    A point is (w, b): w goes to the right, b upwards, from `reach` below `centre` (2,) to `reach`
    above it. f takes tensors w and b that broadcast. `words` are written on top.
    """
    offset = torch.linspace(-reach, reach, size, dtype=path.dtype)
    surface = f(centre[0] + offset, centre[1] + offset.flip(0)[:, None])  # (size, size)
    band = (1.5 * surface.clamp_min(0.01).log2()).floor()
    shade = (band - band.min()) / (band.max() - band.min())  # 0 lowest ... 1 highest
    picture = Image.fromarray((40 + 210 * shade).byte().numpy()).convert("RGB")
    pen, middle = ImageDraw.Draw(picture), (size - 1) / 2
    w, b = (path - centre).T * middle / reach
    points = (torch.stack([w, -b], 1) + middle).tolist()  # column, row
    pen.line([tuple(point) for point in points], fill="firebrick", width=2)
    for column, row in points:
        pen.ellipse((column - 3, row - 3, column + 3, row + 3), fill="firebrick")
    w, b = centre.tolist()
    frame = f"right: w {w - reach:g} to {w + reach:g}   up: b {b - reach:g} to {b + reach:g}"
    pen.text((8, 4), words, fill="black", font_size=21)
    pen.text((8, size - 8), frame, fill="black", font_size=21, anchor="ls")
    return np.array(picture)


@torch.no_grad()
def regions(model, x, t, side=48):
    """The square -1 ... 1, each place pale in the colour of its class by the model, and points x.

    x (N, 2), t (N,) their classes 0, 1, 2: dots in red, green, blue. Returns (3, side, side) uint8.
    """
    palette = torch.tensor([[230, 60, 50], [40, 150, 70], [50, 90, 220]], dtype=torch.uint8)
    along = torch.linspace(-1, 1, side)
    places = torch.cartesian_prod(along, along).flip(1)  # (side * side, 2), row by row
    picture = 170 + palette[model(places).argmax(1)].view(side, side, 3) // 3
    column, row = ((x + 1) / 2 * (side - 1)).round().long().clamp(0, side - 1).T
    picture[row, column] = palette[t]
    return picture.permute(2, 0, 1)  # (3, side, side)


def number_grid(numbers, ink, last, cell=26):
    """A matrix of whole numbers in 0..last as uint8 (3, H, W): each in its cell, large ones darker.

    `ink` is the colour (red, green, blue) of the cell of `last`.
    """
    picture = Image.new("RGB", (numbers.shape[1] * cell, len(numbers) * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, row in enumerate(numbers.tolist()):
        for j, number in enumerate(row):
            left, top, share = j * cell, i * cell, (number + 4) / (last + 4)
            shade = tuple(round(255 - (255 - c) * share) for c in ink)
            pen.rectangle((left, top, left + cell - 2, top + cell - 2), shade)
            pen.text((left + 5, top + 5), str(number), "black", font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def prediction_grid(images, labels, predictions, classes, count=64):
    """The first test images; each caption is the prediction, and the truth where it is wrong."""
    pairs = zip(labels[:count].tolist(), predictions[:count].tolist(), strict=True)
    captions = [classes[p] if p == y else f"{classes[p]}? {classes[y]}" for y, p in pairs]
    return caption_grid(images[:count].cpu(), captions, scale=4)


def confusion_matrix(labels, predictions, K):
    """Counts (K, K): row = truth, column = prediction."""
    return (labels * K + predictions).bincount(minlength=K * K).view(K, K).cpu()


def confusion_picture(counts, classes, cell=52):
    """The matrix as a picture (3, H, W) uint8: the darker, the larger the share of its row."""
    K, left, top = len(classes), 80, 30
    picture = Image.new("RGB", (left + K * cell, top + K * cell), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    pen.text((4, 8), "truth | said", "gray", font)
    for i in range(K):
        pen.text((4, top + i * cell + cell // 3), classes[i][:12], "black", font)
        pen.text((left + i * cell + 2, 8), classes[i][:7], "black", font)
        for j in range(K):
            x, y, shade = left + j * cell, top + i * cell, int(255 * (1 - share[i, j].item()))
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), (shade, shade, 255))
            ink = "white" if shade < 128 else "black"
            pen.text((x + 12, y + cell // 3), str(counts[i, j].item()), ink, font)
    return np.asarray(picture).transpose(2, 0, 1)


def draw_graph(writer, model, device="cpu"):
    """The network in TensorBoard, without torch.jit.trace's notice that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.add_graph(model.eval(), torch.zeros(1, 3, 32, 32, device=device))


def log_test(writer, step, options, split, classes, predictions, loss, accuracy):
    """Predictions and confusion as pictures, options and metrics as hparams: one row a run there.

    Returns the counts (K, K): row = truth, column = prediction.
    """
    images, labels = split
    counts = confusion_matrix(labels, predictions, len(classes))
    grid = prediction_grid(images, labels, predictions, classes)
    writer.add_image("test/predictions", grid, step)
    writer.add_image("test/confusion", confusion_picture(counts, classes), step)
    given = {name: value for name, value in options.items() if value is not None}
    metrics = {"test/loss": loss, "test/accuracy": accuracy}  # they become scalars, too
    writer.add_hparams(given, metrics, run_name=".", global_step=step)
    return counts
