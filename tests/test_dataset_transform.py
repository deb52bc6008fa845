import numpy as np
import pytest
import torch


@pytest.fixture
def lesson(load):
    return load("dataset_transform.py")


def test_try_mean_and_std_of_a_half_give_minus_one_to_one(lesson, images_root):
    half = torch.full((3,), 0.5)
    image = lesson.open_images(images_root)[3][0]
    x = lesson.pipeline(half, half, train=False)(image)
    assert -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    torch.testing.assert_close(
        (x * 0.5 + 0.5) * 255, torch.tensor(np.array(image)).permute(2, 0, 1).float()
    )


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
