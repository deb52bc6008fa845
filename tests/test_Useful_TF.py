import pytest
import torch
from torchvision.transforms import v2


@pytest.fixture
def lesson(load):
    return load("Useful_TF.py")


def test_normalize_is_torchvisions(lesson):
    torch.manual_seed(0)
    x, mean, std = torch.rand(3, 5, 4), [0.1, 0.5, 0.9], [2.0, 0.3, 0.7]
    torch.testing.assert_close(lesson.normalize(x, mean, std), v2.Normalize(mean, std)(x))


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (33, 33), (37, 99), (100, 31)])
@pytest.mark.parametrize("short", [7, 16, 50])
def test_the_short_side_formula(lesson, size, short):
    assert v2.Resize(short)(torch.rand(3, *size)).shape[1:] == lesson.short_side_size(*size, short)


def test_a_crop_is_found_where_it_was_cut(lesson):
    torch.manual_seed(0)
    image = torch.rand(3, 12, 15)
    assert lesson.find_window(image, image[:, 2:7, 9:13]) == [(2, 9)]
    assert lesson.find_window(image, torch.rand(3, 5, 4)) == []


def test_try_resize_and_normalize_change_places(lesson):
    torch.manual_seed(0)
    x, norm, resize = torch.rand(3, 40, 50), v2.Normalize([0.5] * 3, [0.2] * 3), v2.Resize(16)
    torch.testing.assert_close(norm(resize(x)), resize(norm(x)))


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_uniform_crops(lesson, insects_root, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=insects_root, draws=1600)
    assert measured["chi2"] < 37.7
    assert all(len(corners) == 1 for corners in measured["corners"])
    assert len(set(map(tuple, measured["corners"]))) > 1
