import gzip
import hashlib
import pickle
import random
import shutil
import tarfile
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder

from support import data
from support.files import DataError


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """A tiny CIFAR-10 as an archive: 10 images a batch file, with MD5 sums to match."""
    rng, folder = np.random.default_rng(0), tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
    labels = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": labels}))
    sums = [[name, md5((folder / name).read_bytes())] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:-1])
    monkeypatch.setattr(CIFAR10, "test_list", sums[-1:])
    meta = {**CIFAR10.meta, "md5": md5((folder / "batches.meta").read_bytes())}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    root = tmp_path / "dataset2"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((root / CIFAR10.filename).read_bytes()))
    return root


@pytest.fixture
def server():
    """A server on this machine; `server.answer` is the body it sends, cut at `server.cut` bytes."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.answer)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            self.reply(b"")

        def do_GET(self):
            self.reply(self.server.answer[: self.server.cut])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.cut = b"archive" * 9000, None
        server.url = f"http://127.0.0.1:{server.server_port}/a.bin"
        threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
        yield server
        server.shutdown()


def test_channel_stats_equal_torch_mean_and_std():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8)
    images[:, 1] //= 3
    mean, std = data.channel_stats(images)
    x = images.double() / 255
    torch.testing.assert_close(mean, x.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, x.std((0, 2, 3), correction=0).float())


def test_without_data_the_drawn_images_stand_in_and_say_where_the_real_ones_would_lie(images_root):
    told = data.source_line(data.open_images(images_root))
    assert told == (
        f"data: Shapes-10, 800 drawn images, as {images_root / CIFAR10.base_folder} is not there; "
        f"for the real CIFAR-10: {data.MEND}"
    )


def test_the_untouched_archive_is_unpacked_and_used(cifar_root):
    train, test = data.open_images(cifar_root), data.open_images(cifar_root, train=False)
    assert (len(train), len(test)) == (50, 10)
    assert data.source_line(train) == "data: CIFAR-10, 50 photographs"
    images, labels = data.as_tensors(train)
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
    np.testing.assert_array_equal(images[3].permute(1, 2, 0), train.data[3])
    assert labels.tolist() == list(range(10)) * 5


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_real_data_is_an_error_that_names_the_file(cifar_root, file, damage):
    data.open_images(cifar_root)
    path = cifar_root / CIFAR10.base_folder / file
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=rf"{file} .*--download mends it"):
        data.open_images(cifar_root)
    data.download_cifar10(cifar_root)  # the archive is whole, so nothing is fetched
    assert path.read_bytes() == whole and len(data.open_images(cifar_root)) == 50


def test_a_damaged_archive_is_an_error_and_never_drawn_over(cifar_root):
    archive = cifar_root / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        data.open_images(cifar_root)
    assert [p.name for p in cifar_root.iterdir()] == [archive.name]


@pytest.mark.parametrize("place", [
    "cifar-10-batches-py/cifar-10-batches-py", "cifar-10-python/cifar-10-batches-py",
    "cifar-10-python", ".", "../data/cifar-10-batches-py",
])  # fmt: skip
def test_cifar10_is_seen_where_people_put_it(cifar_root, place):
    expected = data.open_images(cifar_root).data
    made, there = cifar_root / "made", cifar_root / place
    (cifar_root / CIFAR10.base_folder).rename(made)
    (cifar_root / CIFAR10.filename).unlink()
    shutil.copytree(made, there, dirs_exist_ok=True)
    shutil.rmtree(made)
    found = data.open_images(cifar_root)
    np.testing.assert_array_equal(found.data, expected)
    assert data.source_line(found) == "data: CIFAR-10, 50 photographs"
    again = pickle.loads(pickle.dumps(found))  # as a worker of a DataLoader gets it
    assert type(again) is CIFAR10 and len(again) == 50
    assert len(data.open_images(cifar_root, train=False)) == 10


@pytest.mark.parametrize("name", ["cifar-10-python.tgz", "cifar-10-python (1).tar.gz",
                                  "cifar-10-python.tar"])  # fmt: skip
def test_an_archive_under_another_name_is_unpacked(cifar_root, name):
    archive = cifar_root / CIFAR10.filename
    content = archive.read_bytes()
    archive.rename(cifar_root / name)
    if name.endswith(".tar"):  # as a browser leaves it that unpacks by itself
        (cifar_root / name).write_bytes(gzip.decompress(content))
    assert len(data.open_images(cifar_root)) == 50
    names = sorted(path.name for path in cifar_root.iterdir())
    assert names == sorted([CIFAR10.base_folder, name])


def test_a_damaged_archive_beside_a_whole_one_does_no_harm(cifar_root):
    (cifar_root / "cifar-10-python (1).tar.gz").write_bytes(b"cut")
    assert len(data.open_images(cifar_root)) == 50


def test_an_archive_of_other_images_is_an_error_that_names_it(cifar_root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
    with pytest.raises(DataError, match=r"python\.tar\.gz is damaged \(test_batch in it"):
        data.open_images(cifar_root)


def test_what_looks_like_cifar10_and_is_not_is_named(images_root, tmp_path):
    shutil.copy(images_root / "shapes10.npz", tmp_path)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in ("CIFAR-100-python.tar.gz", "cifar-10-python.tar.gz.part"):
        (tmp_path / name).write_bytes(b"other")
    found = "(but CIFAR-100-python.tar.gz, cifar-10-batches-bin, cifar-10-python.tar.gz.part)"
    assert f"is not there {found}; for" in data.source_line(data.open_images(tmp_path))


def test_a_cut_download_starts_anew_and_only_a_whole_one_gets_its_name(server, tmp_path):
    path, good = tmp_path / "a.bin", md5(server.answer)
    server.cut = 5000
    with pytest.raises(DataError, match=r"cannot fetch .*\(2 MiB\).*by hand"):
        data.fetch(server.url, path, good, "2 MiB")
    assert not path.exists()
    server.cut = None
    data.fetch(server.url, path, good, "2 MiB")
    assert path.read_bytes() == server.answer
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    server.answer = b"other"
    data.fetch(server.url, path, good, "2 MiB")  # whole already: not fetched again


def test_no_network_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"cannot fetch http://127\.0\.0\.1:9/x"):
        data.fetch("http://127.0.0.1:9/x", tmp_path / "x", "0" * 32, "1 MiB")


def test_augment_gives_shifted_and_mirrored_copies_and_nothing_else():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 6, 7), dtype=torch.uint8)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    found = []
    for image, out in zip(padded, data.augment(images), strict=True):
        for i in range(5):
            for j in range(5):
                window = image[:, i : i + 6, j : j + 7]
                found += [
                    (i, j, m) for m in (0, 1) if torch.equal(window.flip(2) if m else window, out)
                ]
    assert len(found) == 40
    rows, columns, mirrored = (set(column) for column in zip(*found, strict=True))
    assert rows == columns == set(range(5)) and mirrored == {0, 1}


def test_normalize_is_the_formula_in_channels_last():
    images, mean, std = torch.randint(0, 256, (5, 3, 8, 8)), torch.rand(3), torch.rand(3) + 0.5
    x = data.normalize(images, mean, std)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[2, 1], (images[2, 1] / 255 - mean[1]) / std[1])


def test_splits_are_disjoint_and_only_the_seed_decides(images_root):
    splits, _ = data.load_splits(images_root, seed=3)
    again, _ = data.load_splits(images_root, seed=3)
    other, _ = data.load_splits(images_root, seed=4)
    assert [len(splits[name][1]) for name in ("train", "val", "test")] == [720, 80, 200]
    images = {name: {i.numpy().tobytes() for i in splits[name][0]} for name in splits}
    assert not images["train"] & images["val"] and not images["train"] & images["test"]
    assert torch.equal(splits["val"][0], again["val"][0])
    assert not torch.equal(splits["val"][0], other["val"][0])


def test_insects_are_jpeg_files_of_several_sizes(insects_root):
    folder = data.hymenoptera(insects_root)
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 2 * (3 + 2)
    sizes = set()
    for path in files:
        with Image.open(path) as image:
            sizes.add(image.size)
            assert image.format == "JPEG"
    assert len(sizes) >= 3
    assert data.class_folder(folder / "val", "bees") == folder / "val" / "bees"


def test_a_damaged_insect_is_drawn_again(tmp_path, monkeypatch):
    small = data.write_hymenoptera_sample
    monkeypatch.setattr(data, "write_hymenoptera_sample", lambda f: small(f, train=1, val=1))
    folder = data.hymenoptera(tmp_path)
    path = folder / "train" / "ants" / "ants_000.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert data.hymenoptera(tmp_path) == folder
    assert path.read_bytes() == whole


def test_photographs_are_used_as_soon_as_they_lie_there(insects_root):
    real = insects_root / "hymenoptera_data"
    (real / "train" / "ants_image").mkdir(parents=True)
    assert data.hymenoptera(insects_root) == real
    assert "photographs" in data.hymenoptera_source(real)
    with pytest.raises(DataError, match="no images in"):
        data.class_folder(real / "train", "ants")
    Image.new("RGB", (4, 4)).save(real / "train" / "ants_image" / "a.jpg")
    assert data.class_folder(real / "train", "ants").name == "ants_image"


@pytest.mark.parametrize("place", ["hymenoptera_data/hymenoptera_data", "."])
@pytest.mark.parametrize("name", ["ants", "ants_image"])
def test_photographs_are_seen_where_people_put_them(insects_root, place, name):
    (insects_root / place / "train" / name).mkdir(parents=True)
    folder = data.hymenoptera(insects_root)
    assert folder == insects_root / place
    assert data.hymenoptera_source(folder) == f"data: the hymenoptera_data photographs in {folder}"


def test_the_zip_of_photographs_is_unpacked_if_it_is_whole(insects_root, monkeypatch):
    archive = insects_root / "hymenoptera_data (1).zip"
    sample = data.hymenoptera(insects_root)
    assert "is not there; photographs: python" in data.hymenoptera_source(sample)
    with zipfile.ZipFile(archive, "w") as photos:
        for path in sample.rglob("*.jpg"):
            photos.write(path, "hymenoptera_data" / path.relative_to(sample))
    assert data.hymenoptera(insects_root) == sample  # its checksum is not the real one's
    assert f"(but {archive.name}); photographs: python" in data.hymenoptera_source(sample)
    monkeypatch.setattr(data, "INSECTS_MD5", md5(archive.read_bytes()))
    folder = data.hymenoptera(insects_root)
    assert folder == insects_root / "hymenoptera_data"
    assert len(data.image_files(folder / "val" / "bees")) == 2


# --- image files as they are in life -----------------------------------------------------------


def test_images_are_what_image_folder_takes_too_save_what_is_hidden(tmp_path):
    folder, picture = tmp_path / "ants", Image.new("RGB", (4, 4))
    for name in ("b.JPG", "a.jpeg", "c.png", "d.webp", "e.bmp", "f.tif"):
        folder.mkdir(exist_ok=True)
        picture.save(folder / name)
    picture.save(folder / "imageNotFound.gif")
    for name in ("Thumbs.db", "desktop.ini", "notes.txt", ".DS_Store"):
        (folder / name).write_bytes(b"no picture")
    for name in ("g.jpg", ".ipynb_checkpoints"):
        (folder / name).mkdir()
    names = [path.name for path in data.image_files(folder)]
    assert names == [Path(path).name for path, _ in ImageFolder(tmp_path).samples]
    assert names == ["a.jpeg", "b.JPG", "c.png", "d.webp", "e.bmp", "f.tif"]
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")  # AppleDouble: ImageFolder fails on it
    assert [path.name for path in data.image_files(folder)] == names
    assert data.class_folder(tmp_path, "ants") == folder


def test_a_class_of_nothing_but_strangers_has_no_images(tmp_path):
    (tmp_path / "ants" / "a.jpg").mkdir(parents=True)
    (tmp_path / "ants" / "imageNotFound.gif").write_bytes(b"GIF")
    with pytest.raises(DataError, match=r"no images in .*ants: .*generate_labels\.py --download"):
        data.class_folder(tmp_path, "ants")


def test_two_images_of_one_stem_are_refused(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(DataError, match="two images named a: one label cannot serve both"):
        data.image_files(tmp_path)


def pixels(path):
    return np.asarray(data.open_rgb(path))


@pytest.mark.parametrize(("suffix", "dtype", "white"), [
    ("png", np.uint16, 65535), ("tif", np.uint16, 65535), ("tif", np.int32, 65535),
    ("tif", np.int32, 255), ("tif", np.float32, 1), ("tif", np.float32, 255),
    ("tif", np.float32, 65535),
])  # fmt: skip
def test_deep_greys_are_scaled_and_not_cut_off(tmp_path, suffix, dtype, white):
    levels = np.array([[0.0, 0.25], [0.5, 1.0]])
    Image.fromarray((levels * white).astype(dtype)).save(tmp_path / f"a.{suffix}")
    got = pixels(tmp_path / f"a.{suffix}")
    assert got.shape == (2, 2, 3) and (got == got[..., :1]).all()
    np.testing.assert_allclose(got[..., 0], levels * 255, atol=1)
    assert got.max() == 255 and got.min() == 0


def test_a_dark_grey_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 1, np.uint16)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").max() == 0


def test_a_photograph_stands_as_the_camera_was_held(tmp_path):
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    got = pixels(tmp_path / "a.png")
    assert got.shape == (4, 2, 3) and got[0, 1].tolist() == [255, 255, 255] and got.sum() == 765


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white_without_a_warning(tmp_path, mode):
    picture = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        picture = Image.new("P", (2, 1), 0)
        picture.putpalette([200, 200, 200, 0, 0, 0])
        picture.putpixel((1, 0), 1)
        picture.info["transparency"] = bytes([255, 0])  # by bytes: Pillow would warn
    picture = picture if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[200] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_keep_black_and_white(tmp_path, mode):
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste("black", (0, 0, 8, 8))
    path = tmp_path / ("a.jpg" if mode == "YCbCr" else "a.tif")  # Pillow 12 cannot read such a TIFF
    picture.convert(mode).save(path)
    assert pixels(path)[0, ::8, 0].tolist() == [0, 255]


@pytest.mark.parametrize("limit", [100, 3])
def test_a_huge_picture_is_read_or_refused_in_a_line_that_names_it(tmp_path, monkeypatch, limit):
    Image.new("RGB", (12, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above, raises above twice
    if limit == 100:
        assert pixels(tmp_path / "a.png").shape == (10, 12, 3)
    else:
        with pytest.raises(DataError, match=r"a\.png is not a readable image: replace or"):
            data.open_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_a_damaged_file_is_a_picture_or_an_error_that_names_it(tmp_path, suffix):
    path, rng = tmp_path / f"a.{suffix}", random.Random(0)
    Image.effect_noise((24, 16), 60).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(3):
            content[rng.randrange(min(len(content), 300))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            assert data.open_rgb(path).mode == "RGB"
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path} is not a readable image")
    assert refused > 10
