import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.files import DataError


@pytest.fixture
def lesson(load):
    return load("model_save.py")


def test_a_whole_model_and_its_state_dict_hold_the_same_bytes(lesson, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    lesson.save(net, tmp_path / "whole.pth")
    lesson.save(net.state_dict(), tmp_path / "state.pth")
    whole, state = (lesson.read_zip(tmp_path / f"{name}.pth")[1] for name in ("whole", "state"))
    assert whole == state
    assert b"".join(state) == b"".join(t.numpy().tobytes() for t in net.state_dict().values())


def test_the_names_in_a_file_are_those_that_torch_counts_as_unsafe(lesson, tmp_path):
    path, state = tmp_path / "whole.pth", tmp_path / "state.pth"
    lesson.save(lesson.Moli(), path)
    lesson.save(lesson.Moli().state_dict(), state)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert "model.Moli" in unsafe and set(unsafe) < set(lesson.names_in(path))
    assert all(not name.startswith(("model.", "torch.nn")) for name in lesson.names_in(state))


def test_save_replaces_whole_or_not_at_all(lesson, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "state.pth"
    lesson.save({"a": torch.arange(5)}, path)
    lesson.save({"a": torch.arange(7)}, path)
    good = path.read_bytes()
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(7))

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full_disk)
    with pytest.raises(DataError, match=r"cannot write .*state\.pth: No space left") as error:
        lesson.save({"a": torch.arange(9)}, path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]


def test_what_each_way_of_saving_survives(lesson, tmp_path):
    torch.manual_seed(0)
    outcomes = lesson.survive(tmp_path, torch.linspace(-1, 1, 9)[:, None])
    same = "same outputs"
    assert outcomes == {
        "nothing": (same, same),
        "class moved": ("ModuleNotFoundError on loading", same),
        "class renamed": ("AttributeError on loading", same),
        "layer renamed": ("loads; AttributeError on calling", "RuntimeError on loading"),
        "tanh to relu": ("other outputs, no error",) * 2,
    }


def test_a_state_dict_of_a_renamed_layer_is_mended_by_renaming_its_keys(lesson, tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(4, 1), tmp_path / "net_state.pth"
    lesson.survive(tmp_path, x)
    old = lesson.load_state(path, lesson.Net)
    with lesson.net_py(lesson.inspect.getsource(lesson.Net).replace("hidden", "first")) as module:
        new, state = module.Net(), torch.load(path, weights_only=True)
        with pytest.raises(RuntimeError, match=r'Missing key.*"first\.weight"'):
            new.load_state_dict(state)
        new.load_state_dict({k.replace("hidden", "first"): v for k, v in state.items()})
        assert torch.equal(new(x), old(x))


def test_the_module_of_the_demonstration_is_gone_afterwards(lesson):
    with lesson.net_py("class Net: pass"):
        assert pickle.loads(b"cnet\nNet\n.").__name__ == "Net"
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(b"cnet\nNet\n.")


def test_the_first_step_of_a_new_adam_moves_every_weight_by_the_learning_rate(lesson):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16)[:, None]
    net = lesson.Net()
    optimizer = torch.optim.Adam(net.parameters(), eps=0)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    loss = lesson.fit(net, optimizer, x, x.square(), range(3, 4), 10)
    step = (nn.utils.parameters_to_vector(net.parameters()) - before).detach().abs()
    torch.testing.assert_close(step, torch.full_like(step, lesson.learning_rate(3, 10)))
    assert len(loss) == 1 and lesson.learning_rate(10, 10) == 0


@pytest.mark.parametrize("forget", [None, "optimizer", "epoch"])
def test_resume_gives_back_what_was_not_forgotten(lesson, tmp_path, forget):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16)[:, None]
    net = lesson.Net()
    optimizer = torch.optim.Adam(net.parameters())
    lesson.fit(net, optimizer, x, x, range(5), 20)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 5}
    lesson.save(state, tmp_path / "state.pth")
    again, its_optimizer, epoch = lesson.resume(tmp_path / "state.pth", forget)
    assert torch.equal(again(x), net(x))
    assert epoch == (0 if forget == "epoch" else 5)
    assert bool(its_optimizer.state) == (forget != "optimizer")


def test_try_a_state_dict_in_memory_moves_with_the_weights(lesson):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16)[:, None]
    net = lesson.Net()
    best, copied, loss = net.state_dict(), copy.deepcopy(net.state_dict()), F.mse_loss(net(x), x)
    lesson.fit(net, torch.optim.Adam(net.parameters()), x, x, range(3), 10)
    now = F.mse_loss(net(x), x)
    net.load_state_dict(best)
    assert torch.equal(F.mse_loss(net(x), x), now) and not torch.equal(now, loss)
    net.load_state_dict(copied)
    assert torch.equal(F.mse_loss(net(x), x), loss)


@pytest.mark.parametrize("seed", range(3))
def test_main_resumes_bit_for_bit_and_only_with_optimizer_and_epoch(lesson, tmp_path, events, seed):
    runs, checkpoints = tmp_path / "runs", tmp_path / "checkpoints"
    measured = lesson.main(seed=seed, log_dir=runs, checkpoint_dir=checkpoints)
    losses, distance = measured["losses"], measured["distance"]
    assert losses["resumed"] == losses["never_stopped"][100:]
    assert distance["resumed"] == 0
    assert distance["without_optimizer"] > 0.02 and distance["without_epoch"] > 0.02
    assert losses["without_optimizer"][0] == losses["resumed"][0]
    assert max(losses["without_optimizer"]) > 1.5 * max(losses["resumed"])
    assert measured["readable"] == {"torch.save": False, "save": True}
    for run, values in losses.items():
        logged = events(runs / run).Scalars("train/log10_loss")
        assert [e.step for e in logged] == list(range(200 - len(values), 200))
        assert logged[-1].value == pytest.approx(math.log10(values[-1]), abs=1e-5)
    assert sorted(path.suffix for path in checkpoints.iterdir()) == [".pth"] * 5
