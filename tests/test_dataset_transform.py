import hashlib
import pickle
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10


@pytest.fixture
def lesson(load):
    return load("dataset_transform.py")


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


def test_channel_stats_equal_torch_mean_and_std(lesson):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8)
    images[:, 1] //= 3
    mean, std = lesson.channel_stats(images)
    x = images.double() / 255
    torch.testing.assert_close(mean, x.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, x.std((0, 2, 3), correction=0).float())


def test_try_mean_and_std_of_a_half_give_minus_one_to_one(lesson, images_root):
    half = torch.full((3,), 0.5)
    image = lesson.open_images(images_root)[3][0]
    x = lesson.pipeline(half, half, train=False)(image)
    assert -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    torch.testing.assert_close(
        (x * 0.5 + 0.5) * 255, torch.tensor(np.array(image)).permute(2, 0, 1).float()
    )


def test_captions_stand_under_their_pictures(lesson):
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[1] = 200
    grid = lesson.caption_grid(images, ["a", "b", "c"], columns=2, scale=2)
    assert grid.shape == (3, 2 * (16 + 14 + 4), 2 * (16 + 4))
    assert (grid[:, :16, :16] == 0).all() and (grid[:, :16, 20:36] == 200).all()
    assert grid[:, 16:30, :16].min() < 128  # ink


def test_without_data_the_drawn_images_stand_in_and_say_so(lesson, images_root):
    assert "drawn" in lesson.source_line(lesson.open_images(images_root))


def test_the_untouched_archive_is_unpacked_and_used(lesson, cifar_root):
    train, test = lesson.open_images(cifar_root), lesson.open_images(cifar_root, train=False)
    assert (len(train), len(test)) == (50, 10)
    assert lesson.source_line(train) == "data: CIFAR-10, 50 photographs"
    images, labels = lesson.as_tensors(train)
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
    np.testing.assert_array_equal(images[3].permute(1, 2, 0), train.data[3])
    assert labels.tolist() == list(range(10)) * 5


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_real_data_is_an_error_that_names_the_file(lesson, cifar_root, file, damage):
    lesson.open_images(cifar_root)
    path = cifar_root / CIFAR10.base_folder / file
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[:-9])
    with pytest.raises(lesson.DataError, match=rf"{file} .*--download mends it"):
        lesson.open_images(cifar_root)
    lesson.download_cifar10(cifar_root)  # the archive is whole, so nothing is fetched
    assert path.read_bytes() == whole and len(lesson.open_images(cifar_root)) == 50


def test_a_damaged_archive_is_an_error_and_never_drawn_over(lesson, cifar_root):
    archive = cifar_root / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(lesson.DataError, match="damaged"):
        lesson.open_images(cifar_root)
    assert [p.name for p in cifar_root.iterdir()] == [archive.name]


def test_a_cut_download_starts_anew_and_only_a_whole_one_gets_its_name(lesson, server, tmp_path):
    path, good = tmp_path / "a.bin", md5(server.answer)
    server.cut = 5000
    with pytest.raises(lesson.DataError, match=r"cannot fetch .*\(2 MiB\).*by hand"):
        lesson.fetch(server.url, path, good, "2 MiB")
    assert not path.exists()
    server.cut = None
    lesson.fetch(server.url, path, good, "2 MiB")
    assert path.read_bytes() == server.answer
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    server.answer = b"other"
    lesson.fetch(server.url, path, good, "2 MiB")  # whole already: not fetched again


def test_no_network_is_one_clear_line(lesson, tmp_path):
    with pytest.raises(lesson.DataError, match=r"cannot fetch http://127\.0\.0\.1:9/x"):
        lesson.fetch("http://127.0.0.1:9/x", tmp_path / "x", "0" * 32, "1 MiB")


def test_wrong_arguments_end_with_status_2(lesson):
    with pytest.raises(SystemExit) as stop:
        lesson.parse(["--downlaod"])
    assert stop.value.code == 2


@pytest.mark.parametrize("seed", range(3))
def test_main_turns_whole_batches_and_restores_the_images(
    lesson, images_root, tmp_path, seed, events
):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, count=16)
    assert measured["error"] < 1e-6
    assert set(measured["turned"]) <= {0, 16}
    assert set(events(tmp_path).Tags()["images"]) == {
        "images/before", "images/augmented", "images/restored"}  # fmt: skip
