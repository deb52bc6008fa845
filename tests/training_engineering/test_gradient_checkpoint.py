import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

SMALL = {"L": 12, "B": 32, "d": 8}


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/gradient_checkpoint.py")


def kept(forward, net, x, *how):
    """Tensors of the size of x that forward keeps for backward, parameters aside, each once."""
    own = {w.untyped_storage().data_ptr() for w in net.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(net, x, *how)
    del y  # held until here, or memory is used twice
    return sum(sizes.values()) / x.nbytes


# --- what is counted -----------------------------------------------------------------------------


def test_memory_is_counted_by_hand(lesson):
    with lesson.Memory(least=400) as memory:
        a = torch.zeros(100)
        b = a + 1
        b += 1  # in place, and a view: no memory
        b.view(10, 10).t()
        torch.zeros(99)  # too small
        del a
        c = b * 2
        assert sum(memory.sizes.values()) == 800
        d = torch.cat([b, c])
        two = d[:100].chunk(2)  # a tuple of views
        pair = c.sort()  # values, and indices of 8 bytes each
        del b, c, d, two, pair
    assert memory.peak == 400 + 400 + 800 + 1200 and not memory.sizes


def test_products_are_counted_by_hand(lesson):
    a, bias = torch.randn(3, 3), torch.randn(3)
    with lesson.Memory(least=0) as memory:
        a @ a
        torch.addmm(bias, a, a)
        a * a
    assert memory.products == 2


@pytest.mark.parametrize("L", [3, 6, 8])
def test_what_is_in_memory_after_forward_is_what_autograd_keeps(lesson, L):
    """c L without checkpoints, S with: by depth, counted in two ways."""
    net, x = lesson.network(L, 5), torch.randn(7, 5)
    for S in [S for S in range(L + 1) if S == 0 or L % S == 0]:
        expected = S or 3 * L
        assert kept(lesson.run, net, x, S) == lesson.step(lesson.run, net, x, S)[1] == expected
    assert kept(lesson.checkpointed, net, x) == lesson.step(lesson.checkpointed, net, x)[1] == L


@pytest.mark.parametrize("L", [6, 20])
@pytest.mark.parametrize("B", [64, 100])
def test_the_peak_is_segments_and_one_segments_activations(lesson, L, B):
    net, x = lesson.network(L, 8), torch.randn(B, 8)
    for S in [S for S in range(1, L + 1) if L % S == 0]:
        assert abs(lesson.step(lesson.run, net, x, S)[2] - (S + 3 * L / S)) <= 1
    assert lesson.step(lesson.run, net, x, 0)[2] == 3 * L + 4  # the loss and its backward


@pytest.mark.parametrize("S", [1, 2, 4, 8])
def test_price_is_a_second_forward_without_each_segments_last_product(lesson, S):
    net, x, runs, flops = lesson.network(8, 5), torch.randn(7, 5), [], []
    for block in net:  # before: the second run stops early, ahead of a forward hook
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for segments in (0, S):
        with FlopCounterMode(display=False) as counter:
            lesson.run(net, x, segments).sum().backward()
        flops.append(counter.get_total_flops())
    assert len(runs) == 8 + 16
    products = [lesson.step(lesson.run, net, x, segments)[3] for segments in (0, S)]
    assert products == [6 * 8 - 1, 8 * 8 - 1 - S]  # backward: 4 a block, but none for x
    assert flops[1] / flops[0] == pytest.approx(products[1] / products[0])


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("S", [1, 2, 4])
def test_gradients_are_bit_equal_for_the_input_too(lesson, S, p):
    torch.manual_seed(0)
    net, x, found = lesson.network(4, 5, p), torch.randn(7, 5), []
    calls = [(lesson.run, 0), (lesson.run, S), (lesson.checkpointed,), (lesson.two_segments,)]
    for forward, *how in calls:
        leaf = x.clone().requires_grad_()
        grads = lesson.step(forward, copy.deepcopy(net), leaf, *how)[0]
        found.append([leaf.grad, *grads])
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))
    assert all(g.abs().max() > 0 for g in found[0])


def test_step_begins_with_no_gradient_and_the_same_random_numbers(lesson):
    net, x = lesson.network(2, 5, 0.5), torch.randn(7, 5)
    first, second = (lesson.step(lesson.run, net, x, 0)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    net.zero_grad()
    net(x).square().mean().backward()
    assert all(torch.equal(a, w.grad) for a, w in zip(first, net.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_our_checkpoint_is_torchs_and_leaves_the_random_numbers_as_they_were(lesson, dtype):
    torch.manual_seed(0)
    net, x = lesson.network(4, 5, 0.3).to(dtype), torch.randn(7, 5, dtype=dtype)
    results = []
    for call in (lesson.Checkpoint.apply, lambda f, x: lesson.run(f, x, 1), lambda f, x: f(x)):
        leaf = x.clone().requires_grad_()
        net.zero_grad()
        torch.manual_seed(1)
        y = call(net[2:], call(net[:2], leaf))  # two, or the state would be right by chance
        between = torch.rand(3)
        y.square().sum().backward()
        grads = [w.grad for w in net.parameters()]
        results.append([y, between, leaf.grad, *grads, torch.rand(3)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_our_checkpoint_keeps_its_input_alone(lesson):
    net, x = lesson.network(4, 5), torch.randn(7, 5, requires_grad=True)
    assert kept(lambda f, x: lesson.Checkpoint.apply(f, x), net, x) == 1


def test_the_old_form_loses_gradients_and_says_so(lesson):
    net, head, x = lesson.network(2, 5), nn.Linear(5, 1), torch.randn(7, 5)
    with pytest.warns(UserWarning, match="requires_grad=True"):
        y = checkpoint(net, x, use_reentrant=True)
    head(y).sum().backward()
    assert head.weight.grad is not None and all(w.grad is None for w in net.parameters())
    head(lesson.Checkpoint.apply(net, x)).sum().backward()
    assert all(w.grad is None for w in net.parameters()), "ours is the old form"


def test_torchs_checkpoint_sequential_leaves_its_last_segment_out(lesson):
    net, x = lesson.network(6, 5), torch.randn(7, 5, requires_grad=True)
    calls = []
    for block in net:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_sequential(net, 3, x, use_reentrant=False).sum().backward()
    assert len(calls) == 6 + 4


@pytest.mark.parametrize("segments", [-1, 4, 7])
def test_segments_that_do_not_divide_the_blocks_are_refused(lesson, segments):
    with pytest.raises(ValueError, match=f"6 blocks do not split into {segments} equal"):
        lesson.run(lesson.network(6, 5), torch.randn(7, 5), segments)


# --- which layers to wrap ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wraps", "a_block", "again"),
    [((), 3, 0), (((0, 1), (2, 3)), 3, 0), (((1, 2),), 3, 0), (((1, 3),), 2, 0),
     (((0, 2),), 2, 1), (((0, 3),), 1, 1), (((0, 1), (1, 3)), 2, 0)],
)  # fmt: skip
def test_wrapped_layers_keep_and_repeat_what_is_counted_by_hand(lesson, wraps, a_block, again):
    torch.manual_seed(0)
    net, x = lesson.network(4, 5, 0.3), torch.randn(7, 5)
    expected = lesson.step(lesson.run, net, x, 0)
    grads, _, _, products = lesson.step(lesson.run_wrapped, net, x, wraps)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[0], strict=True))
    assert products == expected[3] + 4 * again
    net = lesson.network(4, 5)
    assert kept(lesson.run_wrapped, net, x, wraps) == 4 * a_block
    assert lesson.step(lesson.run_wrapped, net, x, wraps)[1] == 4 * a_block


# --- main ----------------------------------------------------------------------------------------


def test_try_a_block_that_keeps_more_wants_more_segments(lesson, edited, tmp_path, capsys):
    copied = edited(lesson, "nn.Dropout(p))", "nn.SiLU(), nn.Linear(d, d), nn.Dropout(p))")
    result = copied.main(log_dir=tmp_path, B=20, d=8)["segments"]
    assert result["c"] == 5 and result["best"] == 16 and 12 < math.sqrt(5 * 48) < 16
    assert min(result["peaks"].values()) == result["peaks"][16] < result["peaks"][12]
    assert "the peak is least with S = 16" in capsys.readouterr().out
    assert lesson.show_segments(tmp_path / "c3", 48, 20, 8)["best"] == 12


@pytest.mark.parametrize("seed", range(3))
def test_main_counts_what_theory_says(lesson, tmp_path, seed, events, capsys):
    result = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    printed = capsys.readouterr().out
    everyday = [(after, products) for after, _, products in result["everyday"].values()]
    assert everyday == [(12, 23), (4, 27), (7, 26)]
    assert printed.count("16 of 16\n") == 3
    assert "-> a checkpoint around each block: 4 activations instead of 12, 27 products " in printed

    missing = [row[0] for row in result["scratch"].values()]
    off = [row[1] for row in result["scratch"].values()]
    assert missing == [0, 0, 8, 8, 0] and off[0] == off[2] == off[3] == off[4] == 0 < 0.05 < off[1]
    assert f"preserve_rng_state=False                     0 of 16   {off[1]:22.2g}" in printed
    assert 0.2 < off[1] < 2  # relative: the gradients themselves are smaller than 1
    assert "-> 0 parameters without a gradient with use_reentrant=False, 8 with True; " in printed
    assert f"; wrong by {off[1]:.2g} without the state\n" in printed

    segments = result["segments"]
    peaks = segments["peaks"]
    assert segments["c"] == 3 and segments["after"] == {S: S or 36 for S in (0, 1, 2, 3, 4, 6, 12)}
    assert segments["best"] == 6 and min(peaks.values()) == peaks[6] == 12 and peaks[0] == 40
    for S in (1, 2, 3, 4, 6, 12):
        assert re.search(
            rf"^ +{S} +{S} +{peaks[S]} +{S + 36 // S} +{95 - S}$", printed, re.MULTILINE
        )
    assert re.search(r"^ +none +36 +40 +- +71$", printed, re.MULTILINE)
    assert "least with S = 6: 12, not 40, for 89 products, not 71; sqrt(c L) = 6.0\n" in printed
    for run, curve in (("measured", peaks), ("formula", {S: S + 36 / S for S in range(1, 13)})):
        logged = events(tmp_path / run).Scalars("memory/peak")
        assert [e.step for e in logged] == [1, 2, 3, 4, 6, 12]
        assert all(e.value == curve[e.step] for e in logged)
    assert peaks[12] != 15, "or the curves could be exchanged"

    wrapped = list(result["wrapped"].values())
    assert wrapped == [(9, 17), (9, 17), (9, 17), (6, 17), (6, 20), (3, 20)]
    assert "repeats no product: SiLU to Linear 2; keeps least: Linear 1 to Linear 2\n" in printed


def test_each_table_has_its_title_and_heads(lesson, tmp_path, capsys):
    lesson.main(log_dir=tmp_path, **SMALL)
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if re.match(r"\d\. ", line)]
    assert [title[:2] for title in titles] == ["1.", "2.", "3.", "4."]
    assert titles[2] == (
        "3. How many activations are in memory? L = 12 blocks in S segments, c = 3 a block"
    )
    assert titles[3] == "4. Which layers to wrap in each of 3 blocks of Linear 1, SiLU, Linear 2?"
    for title, *words in (
        (
            titles[0],
            "forward",
            "activations",
            "products",
            "gradients",
            "after forward",
            "of a step",
        ),
        (titles[1], "call", "parameters without", "of the others, largest", "relative difference"),
        (titles[2], "segments S", "after forward", "peak, measured", "peak, S + c L / S"),
        (titles[3], "a checkpoint around", "activations", "matrix products", "after forward"),
    ):
        start = lines.index(title) + 1
        assert all(word in " ".join(lines[start : start + 2]) for word in words)


def test_the_rows_wrap_the_layers_that_they_name(lesson, monkeypatch, capsys):
    wrapped = []

    def note(layers, x, use_reentrant):
        wrapped.append([type(layer).__name__ for layer in layers])
        return checkpoint(layers, x, use_reentrant=use_reentrant)

    monkeypatch.setattr(lesson, "checkpoint", note)
    lesson.show_wrapping(1, 7, 5)
    assert wrapped == [
        ["Linear"], ["Linear"], ["SiLU"], ["SiLU", "Linear"], ["Linear", "SiLU"],
        ["Linear", "SiLU", "Linear"],
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_checkpoints_lower_the_peak_of_a_gpu(lesson):
    net, x, peaks = lesson.network(16, 256).cuda(), torch.randn(4096, 256, device="cuda"), {}
    for S in (0, 0, 1, 4, 8):  # a first step: libraries take memory of their own
        net.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        lesson.run(net, x, S).square().mean().backward()
        peaks[S] = (torch.cuda.max_memory_allocated() - before) / x.nbytes
    assert peaks[4] < 0.5 * peaks[0] and peaks[8] < 0.5 * peaks[0] and peaks[4] < peaks[1]
