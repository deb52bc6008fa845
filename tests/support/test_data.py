import hashlib
import pickle
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10

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


def test_without_data_the_drawn_images_stand_in_and_say_so(images_root):
    assert "drawn" in data.source_line(data.open_images(images_root))


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
