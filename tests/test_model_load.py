import pickle
from unittest import mock

import pytest
import torch
from torch import nn


@pytest.fixture
def lesson(load):
    return load("model_load.py")


def test_our_reader_reads_what_torch_reads(lesson, tmp_path):
    torch.manual_seed(0)
    big = torch.randn(6, 8)
    state = {
        "transposed": big.T,
        "window": big[1:4, ::3],
        "number": torch.tensor(7),
        "numbers": {"lr": 0.1, "names": ["a", "b"]},
    }
    torch.save(state, tmp_path / "state.pth")
    ours, theirs = lesson.read_state(tmp_path / "state.pth"), torch.load(tmp_path / "state.pth")
    for key in ("transposed", "window", "number"):
        assert torch.equal(ours[key], state[key]) and torch.equal(theirs[key], state[key])
        assert ours[key].stride() == theirs[key].stride()
    assert ours["numbers"] == theirs["numbers"]


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), print, [torch.float16, print]])
def test_our_reader_refuses_what_torch_refuses_and_says_what(lesson, tmp_path, thing):
    torch.save(thing, tmp_path / "thing.pth")
    for load in (lesson.read_state, torch.load):
        with pytest.raises(pickle.UnpicklingError):
            load(tmp_path / "thing.pth")
    torch.save(print, tmp_path / "print.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"print is refused"):
        lesson.read_state(tmp_path / "print.pth")


def test_code_runs_only_unguarded(lesson, tmp_path):
    path, marker = tmp_path / "surprise.pth", tmp_path / 'it\'s "here"'
    torch.save({"weights": torch.ones(2), "surprise": lesson.Surprise(marker)}, path)
    assert lesson.attempt(lesson.read_state, path, marker) == ("UnpicklingError", False)
    assert lesson.attempt(torch.load, path, marker) == ("UnpicklingError", False)
    assert lesson.attempt(lesson.unguarded, path, marker) == ("dict", True)


def test_a_list_of_safe_globals_lets_nothing_else_in(lesson, tmp_path):
    path, marker = tmp_path / "both.pth", tmp_path / "marker"
    torch.save([nn.Linear(2, 2), lesson.Surprise(marker)], path)
    with torch.serialization.safe_globals([nn.Linear]), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not marker.exists()


def test_every_tensor_of_the_saved_model_has_moved(lesson):
    torch.manual_seed(0)
    assert not any(lesson.equal(lesson.make_moli().state_dict(), lesson.Moli().state_dict()))


def test_a_wrapped_model_has_the_prefix(lesson):
    state = lesson.Moli().state_dict()
    assert (
        lesson.variants(state)["prefixed"].keys()
        == nn.DataParallel(lesson.Moli()).state_dict().keys()
    )
    assert lesson.variants(state)["mended"].keys() == state.keys()


def test_try_strict_false_does_not_forgive_a_shape(lesson):
    three, ten = lesson.Moli(3), lesson.Moli()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for classifier\.3\.weight"):
            ten.load_state_dict(three.state_dict(), strict=strict)
    state = {k: v for k, v in three.state_dict().items() if not k.startswith("classifier.3")}
    (missing, unexpected, untouched), _ = lesson.load_loosely(state, ten.state_dict())
    assert (missing, unexpected) == (2, 0) and untouched >= 2


def test_where_a_file_of_a_gpu_can_go(lesson, tmp_path):
    path = tmp_path / "cuda.pth"
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save({"a": torch.ones(3)}, path)
    assert lesson.device_after(path, "meta") == "meta"
    assert lesson.device_after(path, "cpu") == "cpu"
    if not torch.cuda.is_available():
        assert lesson.device_after(path, None) == "RuntimeError"
    assert torch.equal(lesson.read_state(path)["a"], torch.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_file_of_a_gpu_is_what_the_lesson_takes_for_one(lesson, tmp_path):
    torch.save({"a": torch.ones(3, device="cuda:0")}, tmp_path / "real.pth")
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save({"a": torch.ones(3)}, tmp_path / "made.pth")
    for name in ("real", "made"):
        assert lesson.device_after(tmp_path / f"{name}.pth", None) == "cuda:0"


@pytest.mark.parametrize("seed", range(3))
def test_main_loads_bit_for_bit_and_refuses_the_surprise(lesson, tmp_path, events, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path)
    assert list(measured["same"].values()) == [0, 22, 22, 22, 22]
    refused, ran = ("UnpicklingError", False), ("list", True)
    assert list(measured["outcomes"]["surprise"].values()) == [refused, refused, ran]
    assert list(measured["outcomes"]["whole model"].values()) == [refused, refused, ("Moli", False)]
    assert set(measured["outcomes"]["state dict"].values()) == {("OrderedDict", False)}
    assert measured["keys"] == {
        "complete": (0, 0, 0),
        "headless": (4, 0, 4),
        "prefixed": (19, 22, 22),
        "mended": (0, 0, 0),
    }
    last = {run: events(tmp_path / run).Scalars("load/as_saved")[-1] for run in measured["keys"]}
    assert {run: event.value for run, event in last.items()} == {
        "complete": 22, "headless": 18, "prefixed": 0, "mended": 22,
    }  # fmt: skip
    assert all(event.step == 22 for event in last.values())
    assert measured["devices"]["cpu"] == "cpu"
