import pytest
import torch
from torch.utils.data import TensorDataset


@pytest.fixture
def lesson(load):
    return load("dataloader.py")


@pytest.fixture
def numbered(lesson):
    return lesson.Numbered(TensorDataset(torch.arange(23) * 10, torch.zeros(23)))


def test_numbered_items_know_their_place(numbered):
    x, _, index = numbered[7]
    assert (x, index, len(numbered)) == (70, 7, 23)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_an_epoch_is_a_permutation(lesson, numbered, batch_size):
    order = lesson.epoch_indices(lesson.seeded_loader(numbered, 3, batch_size=batch_size))
    assert sorted(order.tolist()) == list(range(23))
    assert order.tolist() != list(range(23))


def test_only_the_seed_decides_the_order(lesson, numbered):
    def order(seed):
        return lesson.epoch_indices(lesson.seeded_loader(numbered, seed, batch_size=5)).tolist()

    torch.manual_seed(0)
    first = order(1)
    torch.manual_seed(99)
    assert order(1) == first != order(2)


def test_try_drop_last_drops_other_images_each_epoch(lesson, numbered):
    loader = lesson.seeded_loader(numbered, 0, batch_size=5, drop_last=True)
    missing = [set(range(23)) - set(lesson.epoch_indices(loader).tolist()) for _ in range(5)]
    assert all(len(m) == 3 for m in missing) and len(set(map(frozenset, missing))) > 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_brings_the_same_batches(lesson, numbered):
    orders = [
        lesson.epoch_indices(lesson.seeded_loader(numbered, 0, batch_size=4, num_workers=n))
        for n in (0, 1)
    ]
    assert torch.equal(*orders)


@pytest.mark.parametrize("seed", range(3))
def test_main_counts_batches_and_logs_two_epochs(lesson, images_root, tmp_path, seed, events):
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, count=100, batch_size=16, workers=0
    )
    assert measured["lengths"] == {False: (7, 4), True: (6, 16)}
    assert measured["fixed"] < 10
    tags = {"epoch_0/batch", "epoch_1/batch"}
    assert set(events(tmp_path / "shuffled").Tags()["images"]) == tags
    pictures = [events(tmp_path / "in_order").Images(tag) for tag in sorted(tags)]
    assert pictures[0][2].encoded_image_string == pictures[1][2].encoded_image_string
