import torch

from support import pictures


def test_captions_stand_under_their_pictures():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[1] = 200
    grid = pictures.caption_grid(images, ["a", "b", "c"], columns=2, scale=2)
    assert grid.shape == (3, 2 * (16 + 14 + 4), 2 * (16 + 4))
    assert (grid[:, :16, :16] == 0).all() and (grid[:, :16, 20:36] == 200).all()
    assert grid[:, 16:30, :16].min() < 128  # ink


def test_confusion_counts_truth_by_row():
    counts = pictures.confusion_matrix(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 1, 2, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert pictures.confusion_picture(counts, ["a", "b", "c"]).shape == (3, 30 + 156, 80 + 156)
