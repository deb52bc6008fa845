import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def lesson(load):
    return load("nn_module.py")


def nested(lesson, base):
    """A module with a parameter after a submodule, which holds a submodule of its own."""

    class Outer(base):
        def __init__(self):
            super().__init__()
            self.inner = lesson.zoo(base)
            self.last = nn.Parameter(torch.ones(1))

    return Outer()


def test_ours_registers_and_names_like_nn_module(lesson):
    ours, theirs = nested(lesson, lesson.OurModule), nested(lesson, nn.Module)
    for table, named in {"_parameters": theirs.named_parameters(),
                         "_buffers": theirs.named_buffers()}.items():  # fmt: skip
        named = dict(named)
        walked = dict(lesson.walk(ours, table))
        assert [*walked] == [*named] and walked
        assert all(walked[name].shape == named[name].shape for name in named)


def test_ours_switches_everything_that_is_registered(lesson):
    ours = nested(lesson, lesson.OurModule).train(False)
    assert not ours.training and not ours.inner.training
    assert not ours.inner.module_list[1].training and ours.inner.plain_list[1].training
    assert ours.train().inner.module_list[1].training


def test_a_call_is_forward_and_then_the_hooks(lesson):
    for base in (nn.Module, lesson.OurModule):
        module, seen, x = lesson.zoo(base), [], torch.ones(2, 4)
        module.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        output = module(x)
        ((owner, (given,), out),) = seen
        assert owner is module and given is x and out is output
        assert torch.equal(module.forward(x), output) and len(seen) == 1


def test_a_buffer_that_is_not_persistent_is_moved_but_not_saved():
    module = nn.Module()
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    assert module.double().scratch.dtype == torch.float64 and not module.state_dict()


def test_a_parameter_comes_after_init_and_keeps_its_kind(lesson):
    for base in (nn.Module, lesson.OurModule):
        early = type("Early", (base,), {"__init__": lambda self: None})()
        with pytest.raises(AttributeError):
            early.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="cannot assign"):
        nn.Linear(2, 2).weight = torch.ones(2, 2)


def test_only_dropout_and_batch_norm_read_the_flag():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    reads = {}
    for layer in (nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Linear(8, 2),
                  nn.ReLU(), nn.MaxPool2d(2), nn.LayerNorm(8)):  # fmt: skip
        reads[type(layer).__name__] = not torch.equal(layer.train()(x), layer.eval()(x))
    assert [name for name, does in reads.items() if does] == ["Dropout", "BatchNorm2d"]


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


def test_try_the_lists_parameters_are_trained_but_still_not_saved(lesson, tmp_path):
    torch.manual_seed(0)
    net, x = lesson.Net(list), torch.linspace(-1, 1, 128)[:, None]
    parameters = [*net.parameters(), *(p for layer in net.hidden for p in layer.parameters())]
    with lesson.SummaryWriter(tmp_path) as writer:
        loss, moved = lesson.fit(net, parameters, x, torch.sin(6 * x), 150, 3e-3, writer)
    assert loss < 0.1 and moved > 1
    copy = lesson.Net(list)
    copy.load_state_dict(net.state_dict())  # strict, and it does not complain
    assert F.mse_loss(copy(x), net(x)) > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_main_shows_what_the_plain_list_loses(lesson, events, tmp_path, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, steps=150)
    assert measured["seen"] == {
        "parameter": (True, True, True), "buffer": (False, True, True),
        "tensor": (False, False, False), "layer": (True, True, True),
        "plain_list": (False, False, False), "module_list": (True, True, True),
    }  # fmt: skip
    hidden, seen = measured["nets"]["plain_list"], measured["nets"]["module_list"]
    assert hidden["moved"] == 0 and seen["moved"] > 1
    assert seen["loss"] < 0.1 < 0.35 < hidden["loss"]
    assert seen["error"] == 0 and hidden["error"] > 0.05
    assert seen["parameters"] - hidden["parameters"] == 2 * (32 * 32 + 32)
    assert measured["hooks"] == {"Module": (1, 0), "OurModule": (1, 0)}
    (on, listed, gradient), (off, still_on, same) = measured["zeros"].values()
    assert all(0.47 < share < 0.53 for share in (on, listed, still_on)) and off == 0
    assert gradient == same == 4
    moved = events(tmp_path / "plain_list").Scalars("hidden/moved")
    assert len(moved) == 150 and not any(event.value for event in moved)
