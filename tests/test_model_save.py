import math
import pickle
import re
import sys
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.files import DataError


@pytest.fixture
def lesson(load):
    return load("model_save.py")


@pytest.fixture
def fitted(lesson):
    """(x, y, net, optimizer) after 5 of 20 epochs."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16)[:, None]
    net = lesson.make_net()
    optimizer = lesson.make_optimizer(net)
    lesson.fit(net, optimizer, x, x.square(), range(5), 20)
    return x, x.square(), net, optimizer


# --- files -------------------------------------------------------------------------------------


def test_a_whole_model_and_its_state_dict_hold_the_same_bytes(lesson, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    lesson.save(net, tmp_path / "whole.pth")
    lesson.save(net.state_dict(), tmp_path / "state.pth")
    held = {}
    for name in ("whole", "state"):
        with ZipFile(tmp_path / f"{name}.pth") as file:  # a file of torch.save is a zip
            held[name] = [file.read(n) for n in file.namelist() if "/data/" in n]
    assert held["whole"] == held["state"]
    assert b"".join(held["state"]) == b"".join(
        t.numpy().tobytes() for t in net.state_dict().values()
    )


def test_a_whole_model_names_its_classes_and_a_state_dict_does_not(lesson, tmp_path):
    lesson.save(lesson.make_net(), tmp_path / "whole.pth")
    lesson.save(lesson.make_net().state_dict(), tmp_path / "state.pth")
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint
    assert "torch.nn.modules.linear.Linear" in unsafe(tmp_path / "whole.pth")
    assert unsafe(tmp_path / "state.pth") == []


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


def test_a_failed_torch_save_leaves_what_nothing_can_load(lesson, tmp_path, capsys):
    lesson.show_failed_save(tmp_path)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "old.pth")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        torch.save({"a": torch.zeros(1000), "f": lambda: 0}, tmp_path / "old.pth")
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "old.pth", weights_only=True)
    rows = re.findall(r"^   (torch\.save|save) +([\d,]+) +([\d,]+)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["torch.save", "save"]
    assert rows[0][1] == rows[1][1] == rows[1][2] != rows[0][2]
    state = torch.load(tmp_path / "over_a_good_file.pth", weights_only=True)
    assert torch.equal(state["weights"], torch.zeros(1000))  # the old ones


# --- the best epoch ----------------------------------------------------------------------------


def test_fit_best_is_the_loop_written_out(lesson, tmp_path):
    torch.manual_seed(1)
    x, x_val = torch.randn(6, 1), torch.randn(30, 1)
    y, y_val = (2 * x).sin() + torch.randn(6, 1), (2 * x_val).sin()
    net = lesson.make_net()
    other = lesson.make_net()
    other.load_state_dict(net.state_dict())
    optimizer, losses, states = torch.optim.Adam(other.parameters(), lr=0.05), [], []
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(other(x), y).backward()
        optimizer.step()
        losses.append(F.mse_loss(other(x_val), y_val).item())
        states.append({name: tensor.clone() for name, tensor in other.state_dict().items()})
    best, kept, copied = lesson.fit_best(net, x, y, x_val, y_val, 60, tmp_path)
    assert best == min(losses) and losses.index(best) not in (0, 59)
    files = [torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("best", "last")]
    right = [states[losses.index(best)], states[-1]]
    for state, wanted in zip([*files, copied, kept], [*right, *right], strict=True):
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert kept["0.weight"].data_ptr() == net[0].weight.data_ptr()  # no copy, as it says


def test_the_best_epoch_is_sought_on_the_sine_that_the_noise_hides(lesson, tmp_path, monkeypatch):
    given, fit_best = [], lesson.fit_best
    monkeypatch.setattr(lesson, "fit_best", lambda *args: given.extend(args) or fit_best(*args))
    torch.manual_seed(0)
    lesson.show_best(tmp_path, 5)
    _, x, y, x_val, y_val, *_ = given
    for grid, n in ((x, 16), (x_val, 101)):
        assert grid.shape == (n, 1) and (grid[0], grid[-1]) == (-1, 1)
    assert torch.equal(y_val, torch.sin(3 * x_val))
    assert 0.25 < (y - torch.sin(3 * x)).std() < 0.75


# --- going on ----------------------------------------------------------------------------------


def test_the_learning_rate_is_half_a_cosine(lesson):
    rates = [lesson.learning_rate(epoch, 12) for epoch in range(13)]
    net = lesson.make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for rate in rates:
        assert rate == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert rates[3] == pytest.approx(0.05 * (2 + 2**0.5) / 4)


def test_the_first_step_of_a_new_adam_moves_every_weight_by_the_learning_rate(lesson):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16)[:, None]
    net = lesson.make_net()
    optimizer = torch.optim.Adam(net.parameters(), eps=0)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    loss = F.mse_loss(net(x), x.square()).item()
    losses = lesson.fit(net, optimizer, x, x.square(), range(3, 4), 10)
    step = (nn.utils.parameters_to_vector(net.parameters()) - before).detach().abs()
    torch.testing.assert_close(step, torch.full_like(step, lesson.learning_rate(3, 10)))
    assert losses == [loss] and lesson.learning_rate(10, 10) == 0


@pytest.mark.parametrize("forget", [None, "optimizer", "epoch"])
def test_resume_gives_back_what_was_not_forgotten(lesson, tmp_path, fitted, forget):
    x, _, net, optimizer = fitted
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 5}
    lesson.save(state, tmp_path / "state.pth")
    again, its_optimizer, epoch = lesson.resume(tmp_path / "state.pth", forget)
    assert torch.equal(again(x), net(x))
    assert epoch == (0 if forget == "epoch" else 5)
    steps = [entry["step"].item() for entry in its_optimizer.state.values()]
    assert steps == ([] if forget == "optimizer" else [5.0] * 4)
    assert its_optimizer.param_groups[0]["params"][0] is again[0].weight


def test_resume_runs_no_code_from_the_file(lesson, tmp_path, fitted):
    _, _, net, optimizer = fitted
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": print}
    lesson.save(state, tmp_path / "state.pth")
    with pytest.raises(pickle.UnpicklingError):
        lesson.resume(tmp_path / "state.pth")


def test_every_state_dict_is_loaded_without_code(lesson, tmp_path, monkeypatch):
    asked, load = [], torch.load

    def watched(path, **options):
        asked.append((path.name, options["weights_only"]))
        return load(path, **options)

    monkeypatch.setattr(torch, "load", watched)
    lesson.main(log_dir=tmp_path / "runs", checkpoint_dir=tmp_path, epochs=2, total=4)
    assert {name for name, safe in asked if not safe} == {"net.pth"}  # the whole network
    safe = {name for name, safe in asked if safe}
    assert safe == {"linear.pth", "last.pth", "best.pth", "checkpoint.pth", "net_state.pth"}


# --- the class ---------------------------------------------------------------------------------


def test_what_each_way_of_saving_survives(lesson, tmp_path):
    torch.manual_seed(0)
    same, other = "same outputs", "other outputs, no error"
    assert lesson.show_whole(tmp_path) == {
        "nothing": [same, same],
        "net.py is now nets.py": ["ModuleNotFoundError", same],
        "Net is now Network": ["AttributeError", same],
        "hidden is now first": ["AttributeError", "RuntimeError"],
        "tanh is now relu": [other, other],
    }


def test_a_whole_model_of_a_renamed_layer_loads_and_fails_when_it_is_called(lesson, tmp_path):
    lesson.show_whole(tmp_path)
    with lesson.module_of("net", lesson.NET_PY.replace("hidden", "first")):
        net = torch.load(tmp_path / "net.pth", weights_only=False)
        assert list(dict(net.named_children())) == ["hidden", "out"]
        with pytest.raises(AttributeError, match="first"):
            net(torch.zeros(1, 1))


def test_a_state_dict_of_a_renamed_layer_is_mended_by_renaming_its_keys(lesson, tmp_path):
    torch.manual_seed(0)
    lesson.show_whole(tmp_path)
    x, state = torch.randn(4, 1), torch.load(tmp_path / "net_state.pth", weights_only=True)
    with lesson.module_of("net", lesson.NET_PY) as module:
        old = torch.load(tmp_path / "net.pth", weights_only=False)
    with lesson.module_of("net", lesson.NET_PY.replace("hidden", "first")) as module:
        new = module.Net()
        with pytest.raises(RuntimeError, match=r'Missing key.*"first\.weight"'):
            new.load_state_dict(state)
        new.load_state_dict({k.replace("hidden", "first"): v for k, v in state.items()})
        assert torch.equal(new(x), old(x))


def test_the_module_of_the_demonstration_is_gone_afterwards(lesson):
    with lesson.module_of("net", lesson.NET_PY) as module:
        assert pickle.loads(b"cnet\nNet\n.") is module.Net
    assert "net" not in sys.modules


# --- Try, and the whole run --------------------------------------------------------------------


def test_try_plain_sgd_has_nothing_to_forget(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "make_optimizer", lambda net: torch.optim.SGD(net.parameters()))
    measured = lesson.main(log_dir=tmp_path / "runs", checkpoint_dir=tmp_path, epochs=5, total=40)
    distance = measured["distance"]
    assert distance["resumed"] == distance["without_optimizer"] == 0 < distance["without_epoch"]

    def with_momentum(net):
        return torch.optim.SGD(net.parameters(), momentum=0.9)

    monkeypatch.setattr(lesson, "make_optimizer", with_momentum)
    distance = lesson.show_resume(tmp_path / "again", tmp_path, 40)["distance"]
    assert distance["resumed"] == 0 < distance["without_optimizer"]


@pytest.mark.parametrize("seed", range(3))
def test_main_resumes_bit_for_bit_and_only_with_optimizer_and_epoch(
    lesson, tmp_path, events, capsys, seed
):
    runs, files = tmp_path / "runs", tmp_path / "checkpoints"
    measured = lesson.main(seed=seed, log_dir=runs, checkpoint_dir=files)
    out = capsys.readouterr().out
    assert measured["same"] == [False, True]
    assert "-> the output is the saved one: before loading False, after it True\n" in out
    state = torch.load(files / "linear.pth", weights_only=True)
    w1, w2, bias = *state["weight"][0].tolist(), state["bias"].item()
    assert f"   weight               (1, 2)    {w1:.4f}, {w2:.4f}\n" in out
    assert f"   bias                 (1,)      {bias:.4f}\n" in out
    for network in ("saved", "new, after"):
        assert f"   {network:<20} {w1 + 2 * w2 + bias:21.4f}\n" in out

    kept, best = measured["kept"], measured["best"]
    assert kept["best.pth"] == kept["best = copy.deepcopy(net.state_dict())"] == best
    assert kept["last.pth"] == kept["best = net.state_dict()"] > 1.1 * best
    assert f"{kept['last.pth']:15.4f}\n" in out
    ways = "best.pth and best = copy.deepcopy(net.state_dict())"
    assert f"-> the lowest loss of all epochs is {best:.4f}; it is kept by\n      {ways};\n" in out

    losses, distance = measured["losses"], measured["distance"]
    assert losses["resumed"] == losses["never_stopped"][100:]
    assert distance["resumed"] == 0
    assert 0.02 < distance["without_optimizer"] < 2 and 0.02 < distance["without_epoch"] < 2
    assert losses["without_optimizer"][0] == losses["without_epoch"][0] == losses["resumed"][0]
    assert max(losses["without_optimizer"]) > 1.5 * max(losses["resumed"])
    assert losses["never_stopped"][-1] < 0.05 < losses["never_stopped"][0]
    begin = f"-> all begin at loss {losses['resumed'][0]:.4f}: their weights are right."
    assert f"{begin} But only resumed\n" in out
    for run, rate in {
        "resumed": "0.025",
        "without_optimizer": "0.025",
        "without_epoch": "0.050",
    }.items():
        first, largest = losses[run][0], max(losses[run])
        row = rf"   {run} +{rate} +{first:.4f} +{largest:.4f} +{distance[run]:.2f}\n"
        assert re.search(row, out)
    for run, values in losses.items():
        logged = events(runs / run).Scalars("train/log10_loss")
        assert [e.step for e in logged] == list(range(200 - len(values), 200))
        assert [e.value for e in logged] == pytest.approx([math.log10(v) for v in values], abs=1e-5)

    for head in (
        "1. In everyday code: is the loaded network the saved one?",
        "2. How do you keep the best epoch? Validation loss: on points that are not trained on",
        "3. Does a training go on as if never stopped? 200 epochs, loaded after 100",
        "4. torch.save(net) or torch.save(net.state_dict())? Used after a change of net.py",
        "5. What is left of the old file if a save over it fails? (A lambda cannot be saved)",
        "   in the file          shape     values",
        "   network              output for x = (1, 2)",
        "   what is loaded after 400 epochs           validation loss",
        "      net.state_dict() alone shares memory with the weights, and changes with them",
        "                       lr in its     loss in its   largest   largest weight difference",
        "   run                 first epoch   first epoch   loss      from never_stopped at end",
        "   what changed            whole network             state dict",
        "   saved by              bytes before   bytes left",
    ):
        assert f"{head}\n" in out
    assert "-> the whole network survives 0 of 4 changes, the state dict 2;" in out
    assert '"tanh is now relu" goes unnoticed' in out
    assert measured["unharmed"] == {"torch.save": False, "save": True}
    assert "-> the old file is whole after: save\n" in out
    assert all(path.suffix == ".pth" for path in files.iterdir())


def test_the_largest_distance_of_a_weight_is_told(lesson, tmp_path, monkeypatch):
    """By a fit whose end is known: the last bias is a number of its own, all else is 0."""
    ends = iter([0.0, 5.0, 5.0, 5.5, 3.0])

    def fit(net, optimizer, x, y, epochs, total):
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
            net[2].bias.fill_(next(ends))
        return [1.0] * len(epochs)

    monkeypatch.setattr(lesson, "fit", fit)
    distance = lesson.show_resume(tmp_path / "runs", tmp_path, 4)["distance"]
    assert distance == {"resumed": 0, "without_optimizer": 0.5, "without_epoch": 2}
