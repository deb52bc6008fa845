import torch

from support import pictures


def test_captions_stand_under_their_pictures():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[1] = 200
    grid = pictures.caption_grid(images, ["a", "b", "c"], columns=2, scale=2)
    assert grid.shape == (3, 2 * (16 + 14 + 4), 2 * (16 + 4))
    assert (grid[:, :16, :16] == 0).all() and (grid[:, :16, 20:36] == 200).all()
    assert grid[:, 16:30, :16].min() < 128  # ink


def test_a_row_keeps_each_size_and_writes_below_it():
    grey, colour = torch.full((1, 20, 30), 2.0), torch.zeros(3, 40, 5, dtype=torch.uint8)
    colour[0] = 200
    row = pictures.caption_row("title", [grey, colour], ["one", "two\nlines"])
    assert row.dtype == "uint8" and len(row) == 3
    assert (row[:, 30:50, 10:40] == 255).all()  # 2.0 is cut to 1
    left = 10 + 30 + 10
    assert (row[0, 30:70, left : left + 5] == 200).all()
    assert (row[1:, 30:70, left : left + 5] == 0).all() and row[1, 30:70, left + 6].min() == 255
    assert row[0, 50:70, 10:40].min() < 128 and row[1, 72:, left:].min() < 128  # ink
    assert row[:, :30].min() < 128 and row[:, :30].shape[2] == row.shape[2]


def test_a_row_of_one_height_keeps_the_aspect():
    image = torch.tensor([[[0.0, 1.0]]])
    row = pictures.caption_row("", [image], [""], height=8)
    assert (row[:, 30:38, 10:18] == 0).all() and (row[:, 30:38, 18:26] == 255).all()
    half = pictures.caption_row("", [torch.full((1, 2, 2), 0.5)], [""])
    assert (half[:, 30:32, 10:12] == 128).all()


def test_numbers_are_darker_the_larger_they_are():
    numbers = torch.tensor([[5, 0, 3], [9, 1, 7]])
    picture = pictures.number_grid(numbers, ink=(255, 120, 0), last=9, cell=30)
    assert picture.shape == (3, 60, 90) and picture.dtype == torch.uint8
    corners = picture[:, 2::30, 2::30]  # of each cell, beside its number (3, 2, 3)
    assert (corners[0] == 255).all() and corners[:, 1, 0].tolist() == [255, 120, 0]
    assert (-corners[2].flatten().int()).argsort().tolist() == numbers.flatten().argsort().tolist()
    assert (picture[:, :, 29::30] == 255).all() and (picture[:, 29::30] == 255).all()  # the rules
    assert (picture[0, :29, :29] < 128).any()  # a number in ink


def test_confusion_counts_truth_by_row():
    counts = pictures.confusion_matrix(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 1, 2, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert pictures.confusion_picture(counts, ["a", "b", "c"]).shape == (3, 30 + 156, 80 + 156)
