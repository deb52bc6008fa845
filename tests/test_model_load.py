import copy
import pickle
import re
from unittest import mock

import pytest
import torch
from torch import nn


@pytest.fixture
def lesson(load):
    return load("model_load.py")


@pytest.fixture(scope="module")
def moli(load):
    """A trained Moli; read only."""
    torch.manual_seed(0)
    return load("model_load.py").make_moli(30)


@pytest.fixture
def path(moli, tmp_path):
    torch.save(moli.state_dict(), tmp_path / "state.pth")
    return tmp_path / "state.pth"


# --- predictions -------------------------------------------------------------------------------


def test_each_image_is_noise_with_one_colour_more(lesson):
    torch.manual_seed(0)
    x, y = lesson.tinted(300)
    assert x.shape == (300, 3, 32, 32) and y.tolist() == [0, 1, 2] * 100
    mean = x.mean((2, 3))  # (N, 3); the noise of a mean is 1 / 32
    torch.testing.assert_close(mean, torch.eye(3)[y] / 2, atol=0.15, rtol=0)
    assert x.sub(mean[:, :, None, None]).std() == pytest.approx(1, rel=0.01)


def test_the_trained_network_knows_its_colours_and_all_its_tensors_have_moved(lesson, moli):
    torch.manual_seed(1)
    x, y = lesson.tinted(300)
    with torch.no_grad():
        assert not moli.training and (moli(x).argmax(1) == y).float().mean() > 0.98
    assert not any(lesson.equal(moli.state_dict(), lesson.Moli(3).state_dict()))


def test_a_step_of_training_is_sgd_on_the_cross_entropy(lesson):
    torch.manual_seed(4)
    after = lesson.make_moli(1)
    torch.manual_seed(4)
    net = lesson.Moli(3)
    x, y = lesson.tinted(24)
    nn.functional.cross_entropy(net(x), y).backward()
    for p, moved in zip(net.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(moved, p - 0.05 * p.grad)


def test_the_lesson_runs_no_code_from_the_file_that_it_predicts_with(lesson, moli, tmp_path):
    path, marker = tmp_path / "surprise.pth", tmp_path / "marker"
    torch.save({**moli.state_dict(), "surprise": lesson.Surprise(marker)}, path)
    x, y = lesson.tinted(6)
    with pytest.raises(pickle.UnpicklingError):
        lesson.show_everyday(path, x[0])
    with pytest.raises(pickle.UnpicklingError):
        lesson.show_eval(path, x, y)
    assert not marker.exists()


def test_everyday_predicts_with_eval_and_the_loaded_weights(lesson, moli, path, capsys):
    torch.manual_seed(2)
    x, _ = lesson.tinted(6)
    for image, colour in zip(x, ["red", "green", "blue"] * 2, strict=True):
        p = lesson.show_everyday(path, image)
        with torch.no_grad():
            expected = moli(x).softmax(1)
        assert p == pytest.approx(expected[(x == image).all((1, 2, 3))][0].tolist(), abs=1e-5)
        out = capsys.readouterr().out
        assert f"-> the loaded network says {colour}\n" in out
        for name, mean, probability in zip(lesson.CLASSES, image.mean((1, 2)), p, strict=True):
            assert re.search(rf"   {name} +{mean:.2f} +{probability:.3f}\n", out)


def test_in_train_the_company_decides_and_the_statistics_move(lesson, moli, path, capsys):
    torch.manual_seed(3)
    x, y = lesson.tinted(24)
    measured = lesson.show_eval(path, x, y)
    own = lesson.Moli(3)
    own.load_state_dict(moli.state_dict())
    with torch.no_grad():
        expected = {"eval()": [own.eval()(g).softmax(1)[0, 0].item() for g in (x[:1], x[::3], x)]}
        own.train()  # what comes before does not matter in train(): the batch alone decides
        expected["train()"] = [own(g).softmax(1)[0, 0].item() for g in (x[:1], x[::3], x)]
    out = capsys.readouterr().out
    for mode, row in expected.items():
        assert measured["p"][mode] == pytest.approx(row, abs=1e-5)
        assert measured["swing"][mode] == pytest.approx(max(row) - min(row), abs=1e-5)
        for name, p in zip(
            ("no other image", "7 of its colour", "23 of all colours"), row, strict=True
        ):
            assert re.search(rf"   {re.escape(mode)} +{name} +{p:.3f}\n", out)
    assert measured["moved"] == 9
    buffers = {name for name, _ in own.named_buffers()}
    assert len(buffers) == 9  # BatchNorm's means, variances and counters are what moved
    same = dict(
        zip(own.state_dict(), lesson.equal(moli.state_dict(), own.state_dict()), strict=True)
    )
    assert {name for name, unmoved in same.items() if not unmoved} == buffers


# --- names -------------------------------------------------------------------------------------


def test_equal_compares_bit_for_bit_and_by_name(lesson):
    state = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(1)}
    other = {"b": torch.tensor([1.0, 1 + 2**-23]), "a": torch.zeros(2), "d": torch.ones(1)}
    assert lesson.equal(state, other) == [True, False, False]
    assert lesson.equal(state, state) == [True] * 3


def test_a_wrapped_network_has_the_prefix(lesson, moli):
    state = moli.state_dict()
    given = lesson.variants(state)
    assert list(given) == ["complete", "headless", "prefixed", "mended"]
    assert given["prefixed"].keys() == nn.DataParallel(lesson.Moli(3)).state_dict().keys()
    assert list(given["mended"]) == list(given["complete"]) == list(state)
    assert list(given["headless"]) == [key for key in state if key.startswith("features.")]
    assert all(lesson.equal(state, given["mended"]))
    assert all(given["prefixed"][f"module.{key}"] is state[key] for key in state)


def test_a_real_wrapped_state_dict_loads_nothing_either(lesson, moli):
    wrapped = nn.DataParallel(copy.deepcopy(moli)).cpu()  # where there is a GPU, it moves there
    given, net = wrapped.state_dict(), lesson.Moli(3)
    assert lesson.load_into(net, given, strict=False) == [19, 22]
    assert not any(lesson.equal(moli.state_dict(), net.state_dict()))
    assert lesson.load_into(net, given, strict=True) == "RuntimeError"


def test_batch_norm_forgives_its_counters_only_where_the_file_has_no_versions(lesson, moli):
    state = moli.state_dict()
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    rest = {key: tensor for key, tensor in state.items() if key not in counters}
    assert len(counters) == 3
    assert lesson.load_into(lesson.Moli(3), rest, strict=True) == [0, 0]
    for key in counters:
        del state[key]  # state is an OrderedDict with the attribute _metadata: the versions
    assert lesson.load_into(lesson.Moli(3), state, strict=False) == [3, 0]


@pytest.mark.parametrize("strict", [True, False])
def test_load_into_tells_missing_and_unexpected_names(lesson, strict):
    net, given = nn.Linear(2, 3), {"weight": torch.ones(3, 2), "scale": torch.ones(1), "shift": 0}
    told = lesson.load_into(net, given, strict)
    assert told == ("RuntimeError" if strict else [1, 2])
    assert torch.equal(net.weight, torch.ones(3, 2))  # loaded in spite of the error
    given = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    assert lesson.load_into(net, given, strict) == [0, 0]
    assert not net.weight.any()


def test_try_strict_false_does_not_forgive_a_shape(
    lesson, moli, tmp_path, monkeypatch, events, capsys
):
    variants = lesson.variants

    def with_wide(state):
        return {**variants(state), "wide": {**state, "classifier.3.bias": torch.zeros(9)}}

    monkeypatch.setattr(lesson, "variants", with_wide)
    measured = lesson.main(log_dir=tmp_path, steps=1)
    assert measured["names"]["wide"] == (0, "RuntimeError", "RuntimeError", 21)
    row = r"   wide +0  RuntimeError   RuntimeError +21 of 22\n"
    assert re.search(row, capsys.readouterr().out)
    assert events(tmp_path / "wide").Scalars("load/as_saved")[-1].value == 21
    with pytest.raises(RuntimeError, match=r"size mismatch for classifier\.3\.bias"):
        lesson.Moli(3).load_state_dict(with_wide(moli.state_dict())["wide"], strict=False)


# --- devices -----------------------------------------------------------------------------------


def test_where_a_file_of_a_gpu_can_go(lesson, tmp_path, capsys):
    path, state = tmp_path / "gpu.pth", {"a": torch.ones(3)}
    devices = lesson.show_devices(state, path)
    assert lesson.device_after(path, "meta") == "meta"
    assert devices["cpu"] == lesson.device_after(path, "cpu") == "cpu"
    assert '-> with map_location="cpu" they are on cpu; then' in capsys.readouterr().out
    if not torch.cuda.is_available():
        message = "RuntimeError: Attempting to deserialize object on a CUDA device"
        assert devices["None"] == message
    assert torch.equal(torch.load(path, map_location="cpu", weights_only=True)["a"], torch.ones(3))
    assert torch.equal(lesson.read_state(path)["a"], torch.ones(3))


def test_the_best_device_here_is_among_those_tried(lesson, tmp_path, monkeypatch):
    best = torch.device("meta")  # stands for a GPU: it can be loaded to anywhere
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: best)
    devices = lesson.show_devices({"a": torch.ones(3)}, tmp_path / "gpu.pth")
    assert list(devices) == ["None", "cpu", "meta"] and devices["meta"] == "meta"


def test_no_code_runs_on_the_way_to_a_device(lesson, tmp_path):
    torch.save({"a": print}, tmp_path / "print.pth")
    with pytest.raises(pickle.UnpicklingError):
        lesson.device_after(tmp_path / "print.pth", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_file_of_a_gpu_is_what_the_lesson_takes_for_one(lesson, tmp_path):
    torch.save({"a": torch.ones(3, device="cuda:0")}, tmp_path / "real.pth")
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save({"a": torch.ones(3)}, tmp_path / "made.pth")
    for name in ("real", "made"):
        assert lesson.device_after(tmp_path / f"{name}.pth", None) == "cuda:0"
        assert lesson.device_after(tmp_path / f"{name}.pth", "cpu") == "cpu"


# --- code --------------------------------------------------------------------------------------


def test_code_runs_only_unguarded(lesson, moli, tmp_path):
    path, marker, state = tmp_path / "surprise.pth", tmp_path / 'it\'s "here"', moli.state_dict()
    torch.save({**state, "surprise": lesson.Surprise(marker)}, path)
    for load in (lesson.read_state, torch.load, lesson.moli_allowed):
        assert lesson.attempt(load, path, state, marker) == ("UnpicklingError", False)
    assert lesson.attempt(lesson.unguarded, path, state, marker) == (22, True)
    torch.save(lesson.Moli(3), path)
    marker.unlink()
    assert lesson.attempt(lesson.unguarded, path, state, marker) == (0, False)
    assert lesson.attempt(torch.load, path, state, marker) == ("UnpicklingError", False)


def test_each_row_and_loader_is_asked_anew_whether_code_has_run(
    lesson, moli, tmp_path, path, capsys
):
    marker, state = tmp_path / "marker", moli.state_dict()
    torch.save({**state, "surprise": lesson.Surprise(marker)}, tmp_path / "surprise.pth")
    outcomes = lesson.show_code({"a": tmp_path / "surprise.pth", "b": path}, state, marker)
    assert [ran for row in outcomes.values() for _, ran in row.values()] == [False] * 2 + [True] + [
        False
    ] * 3
    out = capsys.readouterr().out
    assert out.count("and code ran") == 1 and "ran with: weights_only=False. Use" in out


def test_the_column_true_is_true_whatever_the_environment_says(lesson, tmp_path, monkeypatch):
    torch.save(print, tmp_path / "print.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        lesson.weights_only(tmp_path / "print.pth")


def test_a_list_of_safe_globals_lets_nothing_else_in(lesson, tmp_path):
    path, marker = tmp_path / "both.pth", tmp_path / "marker"
    torch.save([nn.Linear(2, 2), lesson.Surprise(marker)], path)
    with pytest.raises(pickle.UnpicklingError):
        lesson.moli_allowed(path)
    assert not marker.exists()
    torch.save([nn.Linear(2, 2), nn.Tanh()], path)
    with pytest.raises(pickle.UnpicklingError, match="Tanh"):
        lesson.moli_allowed(path)
    torch.save([nn.Linear(2, 2), nn.SiLU()], path)
    assert isinstance(lesson.moli_allowed(path)[1], nn.SiLU)


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
    with pytest.raises(pickle.UnpicklingError, match=r"^__builtin__\.print is refused$"):
        lesson.read_state(tmp_path / "print.pth")


# --- the whole run -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_loads_bit_for_bit_and_refuses_the_surprise(lesson, tmp_path, events, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path)
    out = capsys.readouterr().out
    assert max(measured["p"]) == measured["p"][1] > 0.6
    assert "-> the loaded network says green" in out

    evaluated = measured["eval"]
    assert evaluated["swing"]["eval()"] < 1e-5 and evaluated["swing"]["train()"] > 0.3
    assert evaluated["p"]["train()"][0] < 0.6 < evaluated["p"]["eval()"][0]
    swing = evaluated["swing"]["train()"]
    assert f"by 0.000 in eval(), by {swing:.3f} in train();" in out
    assert "overwrote 9 of 22 tensors, all in BatchNorm\n" in out

    assert measured["names"] == {
        "complete": (0, [0, 0], [0, 0], 22),
        "headless": (4, "RuntimeError", [4, 0], 18),
        "prefixed": (22, "RuntimeError", [19, 22], 0),
        "mended": (0, [0, 0], [0, 0], 22),
    }
    assert (
        "   prefixed               22  RuntimeError   19 missing, 22 unexpected   0 of 22\n" in out
    )
    assert "-> strict=False loaded 0 tensors of prefixed without an error: so print what\n" in out
    for head in (
        "1. In everyday code: load a network that knows three colours, and predict one image",
        "2. What if eval() is forgotten? One image, red, alone and among others",
        "3. What if names differ? Each state dict is loaded with strict=True, then strict=False",
        '   headless: no classifier; prefixed: all names with "module."; mended: without it again',
        '4. Where do tensors go from a file that says "cuda:0"? (Made here, tagged as by a GPU)',
        "5. What may a file do? How many of its 22 tensors torch.load gives back",
        "6. How can a loader refuse code? Ours may call 4 names and no other",
        "   class    mean of that colour in the image   probability",
        "   mode      predicted together with   probability of its class",
        "   state dict   absent names  strict=True    strict=False                tensors as saved",
        "   map_location   the tensors are then on",
        "   file              weights_only=True        True, Moli allowed       weights_only=False",
        "   file              outcome",
    ):
        assert f"{head}\n" in out
    assert "returns (3 of the 22 absent ones are BatchNorm counters:\n" in out
    rises = {
        "complete": range(1, 23),
        "headless": [*range(1, 19), *[18] * 4],  # the classifier's four tensors come last
        "prefixed": [0] * 22,
        "mended": range(1, 23),
    }
    for run, rise in rises.items():
        logged = events(tmp_path / run).Scalars("load/as_saved")
        assert [event.value for event in logged] == list(rise)
        assert [event.step for event in logged] == list(range(1, 23))

    assert measured["devices"]["cpu"] == "cpu"
    assert lesson.ALLOWED.keys() >= {"collections.OrderedDict"} and len(lesson.ALLOWED) == 4
    refused, whole = ("UnpicklingError", False), (22, False)
    assert [list(row.values()) for row in measured["code"].values()] == [
        [whole, whole, whole], [refused, whole, whole], [refused, refused, (22, True)],
    ]  # fmt: skip
    assert "-> code from a file ran with: weights_only=False. Use" in out
    assert list(measured["code"]) == ["state dict", "whole network", "with code in it"]
    assert list(measured["code"]["state dict"]) == [
        "weights_only=True", "True, Moli allowed", "weights_only=False",
    ]  # fmt: skip
    assert measured["reader"] == {
        "state dict": "22 of 22 tensors",
        "whole network": "model.Moli is refused",
        "with code in it": "__builtin__.exec is refused",
    }
    assert "ended the reading of 2 files" in out
