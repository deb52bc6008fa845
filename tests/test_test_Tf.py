import numpy as np
import pytest
import torch
from torchvision import transforms


@pytest.fixture
def lesson(load):
    return load("test_Tf.py")


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_the_formula_is_to_tensor(lesson, array):
    x = lesson.to_tensor(array)
    assert x[2, 4, 6] == array[4, 6, 2] / np.float32(255)
    assert torch.equal(x, transforms.ToTensor()(array))


def test_v2_agrees_within_one_rounding(lesson, array):
    torch.testing.assert_close(
        lesson.new_to_tensor()(array), lesson.to_tensor(array), atol=6e-8, rtol=0
    )


def test_floats_pass_unscaled(lesson, array):
    assert transforms.ToTensor()(array.astype(np.float32)).max() == array.max()


def test_try_from_numpy_keeps_shape_and_type(array):
    x = torch.from_numpy(array)
    assert x.shape == (5, 7, 3) and x.dtype == torch.uint8


def test_main(lesson, insects_root, tmp_path, events):
    measured = lesson.main(log_dir=tmp_path, root=insects_root)
    assert measured["shape"][0] == 3
    assert list(measured["refused"].values()) == ["TypeError", "TypeError", "ValueError"]
    assert len(events(tmp_path).Tags()["images"]) == 4
