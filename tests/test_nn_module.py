import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_module.py")


def rows_of(out, start):
    """The words of each printed line that begins with `start`."""
    return [line.split() for line in out.splitlines() if line.strip().startswith(start)]


# --- in everyday code --------------------------------------------------------------------------


def test_the_everyday_network_is_counted_and_called_by_hand(lesson, capsys):
    assert lesson.show_everyday() == (13, [13, 1])
    out = capsys.readouterr().out
    assert "print(net) shows TwoLayers(\n     (hidden): Linear(in_features=2, out_f" in out
    assert rows_of(out, "hidden.") == [["hidden.weight", "(3,", "2)", "6"],
                                       ["hidden.bias", "(3,)", "3"]]  # fmt: skip
    assert rows_of(out, "last.") == [["last.weight", "(1,", "3)", "3"], ["last.bias", "(1,)", "1"]]
    assert "-> 13 numbers to learn. All set to 1, they make 13 of [1, 2] and 1 of [1, -4];\n" in out
    assert "\n      by hand 3 * 4 + 1 and, as relu makes -2 a 0, 3 * 0 + 1\n" in out


def test_two_layers_with_a_relu_between_them(lesson):
    torch.manual_seed(0)
    net, x = lesson.TwoLayers(), torch.randn(50, 2)
    hidden = (x @ net.hidden.weight.T + net.hidden.bias).clamp(min=0)
    assert (hidden == 0).any() and net(x).shape == (50, 1)
    torch.testing.assert_close(net(x), hidden @ net.last.weight.T + net.last.bias)


# --- what is found -----------------------------------------------------------------------------


def nested(lesson, base):
    """A module with a parameter after a submodule, which holds a submodule of its own."""

    class Outer(base):
        def __init__(self):
            super().__init__()
            self.inner = lesson.zoo(base)
            self.last = nn.Parameter(torch.ones(1))
            self.bare = nn.Linear(3, 2, bias=False)  # its _parameters["bias"] is None

    return Outer()


def test_ours_registers_and_names_like_nn_module(lesson):
    ours, theirs = nested(lesson, lesson.OurModule), nested(lesson, nn.Module)
    for table, named in {"_parameters": theirs.named_parameters(),
                         "_buffers": theirs.named_buffers()}.items():  # fmt: skip
        named = dict(named)
        walked = lesson.walk(ours, table)
        assert [*walked] == [*named] and walked
        assert all(walked[name].shape == named[name].shape for name in named)
        same = lesson.walk(theirs, table)
        assert all(same[name] is tensor for name, tensor in named.items())
    assert [*lesson.walk(nn.Linear(1, 1), "_parameters", "a.")] == ["a.weight", "a.bias"]
    assert ours.inner.tensor.tolist() == [1] * 4 and ours.inner is ours._modules["inner"]


def test_ours_switches_everything_that_is_found(lesson):
    ours = nested(lesson, lesson.OurModule)
    assert ours.training
    ours.train(False)
    assert not ours.training and not ours.inner.training
    assert not ours.inner.module_list[1].training and ours.inner.plain_list[1].training
    ours.train()
    assert ours.training and ours.inner.module_list[1].training


def test_a_call_is_forward_and_then_the_hooks(lesson):
    for base in (nn.Module, lesson.OurModule):
        module, seen, x = lesson.zoo(base), [], torch.ones(2, 4)
        for number in (1, 2):
            hook = lambda *args, number=number, seen=seen: seen.append((number, *args))  # noqa: E731
            if base is nn.Module:
                module.register_forward_hook(hook)
            else:
                module._hooks.append(hook)
        output = module(x)
        assert [number for number, *_ in seen] == [1, 2]
        for _, owner, (given,), out in seen:
            assert owner is module and given is x and out is output
        assert torch.equal(module.forward(x), output) and len(seen) == 2


def test_the_zoo_uses_its_layer_its_parameter_and_its_buffer(lesson):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4)
    for base in (nn.Module, lesson.OurModule):
        module = lesson.zoo(base)
        module.layer.load_state_dict({"weight": weight, "bias": bias})
        module.parameter.data.fill_(2)
        module.buffer.fill_(3)
        torch.testing.assert_close(module(x), (x @ weight.T + bias) * 2 + 3)


def test_what_is_seen_of_a_module_in_float32(lesson):
    module = lesson.zoo(nn.Module)
    assert lesson.seen_by(module, "layer") == (True, True, False)
    assert lesson.seen_by(module, "plain_list") == (False, False, False)
    module.plain_list[0].double()
    assert lesson.seen_by(module, "plain_list") == (False, False, True)
    assert lesson.seen_by(module.double(), "buffer") == (False, True, True)


def test_a_buffer_that_is_not_persistent_is_moved_but_not_saved(lesson):
    module = nn.Module()
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    assert lesson.seen_by(module.double(), "scratch") == (False, False, True)


def test_a_parameter_comes_after_init_and_keeps_its_kind(lesson):
    for base in (nn.Module, lesson.OurModule):
        early = type("Early", (base,), {"__init__": lambda self: None})()
        with pytest.raises(AttributeError):
            early.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="cannot assign"):
        nn.Linear(2, 2).weight = torch.ones(2, 2)


def test_only_dropout_and_batch_norm_read_the_flag_and_eval_still_records():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    reads = {}
    for layer in (nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Linear(8, 2),
                  nn.ReLU(), nn.MaxPool2d(2), nn.LayerNorm(8)):  # fmt: skip
        y = layer.train()(x), layer.eval()(x)
        reads[type(layer).__name__] = not torch.equal(*y)
        for output in y:
            (gradient,) = torch.autograd.grad(output.square().sum(), x)
            assert gradient.any()
    assert [name for name, does in reads.items() if does] == ["Dropout", "BatchNorm2d"]


def test_names_that_ours_misses_stop_the_lesson(lesson, monkeypatch):
    walk = lesson.walk
    monkeypatch.setattr(lesson, "walk", lambda *given: dict([*walk(*given).items()][:-1]))
    with pytest.raises(AssertionError):
        lesson.show_found()


# --- what a list loses -------------------------------------------------------------------------


def test_the_network_is_its_layers_with_tanh_between_them(lesson):
    torch.manual_seed(0)
    for container in (list, nn.ModuleList):
        net, x = lesson.Net(container, width=5, depth=3), torch.randn(7, 1)
        h = x
        for layer in (net.first, *net.hidden):
            h = torch.tanh(F.linear(h, layer.weight, layer.bias))
        torch.testing.assert_close(net(x), F.linear(h, net.last.weight, net.last.bias))
        assert len(net.hidden) == 3 and net.hidden[2].weight.shape == (5, 5)


def test_autograd_computes_the_lists_gradients_and_zero_grad_misses_them(lesson):
    torch.manual_seed(0)
    net, x = lesson.Net(list), torch.randn(16, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        net(x).sum().backward()
        norms.append((net.first.weight.grad.norm(), net.hidden[0].weight.grad.norm()))
    (first, hidden), (first_again, hidden_again) = norms
    assert hidden > 0
    torch.testing.assert_close(first_again, first)
    torch.testing.assert_close(hidden_again, 2 * hidden)


@pytest.mark.parametrize("lr", [0.05, 0.2])
def test_the_fit_is_the_loop_and_measures_a_distance(lesson, events, tmp_path, lr):
    x = torch.linspace(-1, 1, 9)[:, None]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(lesson.Net(nn.ModuleList, width=4))
    net, twin = nets
    with lesson.SummaryWriter(tmp_path) as writer:
        losses, moved = lesson.fit(net, x, x.sin(), 4, lr, writer)
    start = [layer.weight.detach().clone() for layer in twin.hidden]
    for step in range(4):
        loss = (twin(x) - x.sin()).square().mean()
        squares = sum((layer.weight - w).square().sum()
                      for layer, w in zip(twin.hidden, start, strict=True))  # fmt: skip
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        assert moved[step] == pytest.approx(squares.item() ** 0.5, rel=1e-4, abs=1e-7)
        parameters = [*twin.parameters()]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= lr * g
    assert moved[0] == 0 < moved[1]
    for tag, values in (("train/loss", losses), ("hidden/moved", moved)):
        logged = events(tmp_path).Scalars(tag)
        assert [e.step for e in logged] == [0, 1, 2, 3]
        assert [e.value for e in logged] == pytest.approx(values)


def test_try_the_lists_parameters_are_trained_but_still_not_saved(lesson, edited, tmp_path, capsys):
    reader = edited(
        lesson,
        "SGD(net.parameters(), lr)",
        "SGD(nn.ModuleList([net.first, *net.hidden, net.last]).parameters(), lr)",
    )
    listed, held = reader.main(log_dir=tmp_path)["nets"].values()
    assert listed["losses"] == pytest.approx(held["losses"], rel=1e-5)
    assert listed["moved"] == pytest.approx(held["moved"], rel=1e-5, abs=1e-7)
    assert held["losses"][-1] < 0.05 and held["moved"][-1] > 0.5
    assert held["off"] == 0 and listed["off"] > 0.2
    assert "look: " in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_main_shows_what_the_plain_list_loses(lesson, events, tmp_path, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path)
    assert measured["everyday"] == (13, [13, 1])
    assert measured["seen"] == {
        "parameter": (True, True, True), "buffer": (False, True, True),
        "tensor": (False, False, False), "layer": (True, True, True),
        "plain_list": (False, False, False), "module_list": (True, True, True),
    }  # fmt: skip
    assert measured["found"] == ["parameter", "layer.weight", "layer.bias",
                                 "module_list.0.weight", "module_list.0.bias",
                                 "buffer"]  # fmt: skip
    listed, held = measured["nets"].values()
    assert len(listed["losses"]) == 300 and listed["losses"][0] == held["losses"][0]
    torch.manual_seed(seed)
    net, x = lesson.Net(list), torch.linspace(-1, 1, 128)[:, None]
    first = F.mse_loss(net(x), torch.sin(3 * x)).item()
    assert listed["losses"][0] == pytest.approx(first, rel=1e-5)
    assert not any(listed["moved"]) and held["moved"][-1] > 0.5
    assert held["losses"][-1] < 0.05 < 0.1 < listed["losses"][-1] < 0.16
    assert held["off"] == 0 and listed["off"] > 0.2
    assert (listed["parameters"], held["parameters"]) == (97, 97 + 2 * (32 * 32 + 32))
    for run, net in measured["nets"].items():
        for tag, values in (("train/loss", net["losses"]), ("hidden/moved", net["moved"])):
            logged = [event.value for event in events(tmp_path / run).Scalars(tag)]
            assert logged == pytest.approx(values)
    (on, listed_on), (off, listed_off) = measured["zeros"].values()
    assert all(0.47 < share < 0.53 for share in (on, listed_on, listed_off)) and off == 0

    out = capsys.readouterr().out
    assert rows_of(out, "plain_list") == [["plain_list", "no", "no", "no", "no", "table"]]
    assert rows_of(out, "buffer") == [["buffer", "no", "yes", "yes", "_buffers"]]
    assert rows_of(out, "layer ") == [["layer", "yes", "yes", "yes", "_modules"]]
    assert rows_of(out, "parameter ") == [["parameter", *["yes"] * 3, "_parameters"]]
    assert "-> nothing finds tensor and plain_list. Of 6 tensors in nn.Module\n" in out
    assert f"\n      OurModule has 6: {', '.join(measured['found'])}\n" in out
    for head in (
        "1. How do I write a network,",
        "   named_parameters()   shape    numbers\n",
        "2. Which attributes does each call find? OurModule is our own class, without nn.Module\n",
        "   self.         parameters()   state_dict()   double()   entered by OurModule in\n",
        "3. What does a list lose? Two equal networks learn y = sin(3 x), 300 steps",
        "   hidden      numbers    loss at          weights of hidden   outputs of a reloaded\n",
        "   layers in   to learn   start      end   layers moved by     copy differ by up to\n",
        "4. What does eval() switch?",
        "   mode      Dropout in the ModuleList   Dropout in the list\n",
        "look: tensorboard --logdir ",
    ):
        assert head in out
    for run, start in (("plain_list", "list"), ("module_list", "ModuleList")):
        net = measured["nets"][run]
        numbers = net["losses"][0], net["losses"][-1], net["moved"][-1], net["off"]
        forms = (f"{n:.{d}f}" for n, d in zip(numbers, (4, 4, 2, 2), strict=True))
        assert rows_of(out, start) == [[start, f"{net['parameters']:,}", *forms]]
    assert "shows only the layers first and last, and the hidden layers\n" in out
    assert "\n      moved by 0.00: look for yours in print(net)\n" in out
    assert rows_of(out, "train()") == [["train()", f"{on:.0%}", f"{listed_on:.0%}"]]
    assert rows_of(out, "eval()") == [["eval()", "0%", f"{listed_off:.0%}"]]
    assert f"-> after eval() the list's Dropout still sets {listed_off:.0%} to 0\n" in out
