import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

SMALL = {"depths": (4, 8), "L": 12, "B": 32, "d": 8, "width": 16}


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/gradient_checkpoint.py")


@pytest.mark.parametrize("segments", [0, 1, 2, 3, 6])
def test_bytes_saved_are_counted_by_hand(lesson, segments):
    net, x = lesson.network(6, 5), torch.randn(7, 5)
    activations = segments or 3 * 6
    assert lesson.saved_bytes(net, x, segments) == activations * 7 * 5 * 4


def test_a_tensor_that_two_operations_save_counts_once(lesson):
    class Twice(nn.Module):
        def forward(self, x):
            y = x.exp()  # saves y
            return y * y  # saves y, twice

    x = torch.randn(3, 5, requires_grad=True)
    assert lesson.saved_bytes(nn.Sequential(Twice()), x, 0) == 3 * 5 * 4


def test_alive_counts_a_peak_by_hand(lesson):
    with lesson.Alive(least=400) as alive:
        a = torch.zeros(100)
        b = a + 1
        b += 1  # in place, and a view: no memory
        b.view(10, 10).t()
        torch.zeros(99)  # too small
        del a
        c = b * 2
        assert sum(alive.sizes.values()) == 800
        d = torch.cat([b, c])
        del b, c, d
    assert alive.peak == 400 + 400 + 800 and not alive.sizes


@pytest.mark.parametrize("L", [6, 20])
@pytest.mark.parametrize("B", [64, 100])
def test_the_peak_is_segments_and_one_segments_activations(lesson, L, B):
    net, x = lesson.network(L, 8), torch.randn(B, 8)
    for S in lesson.divisors(L):
        with lesson.Alive(least=B * 8 * 4) as alive:
            lesson.step(net, x, S)
        assert abs(alive.peak / (B * 8 * 4) - (S + 3 * L / S)) <= 1


def test_try_a_block_that_saves_more_wants_more_segments(lesson):
    class Deep(nn.Module):
        """Saves 7: the inputs of 4 linear layers, and those of 3 SiLU."""

        def __init__(self, d):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(4))

        def forward(self, x):
            y = self.layers[0](x)
            for layer in self.layers[1:]:
                y = layer(F.silu(y))
            return x + y

    L, unit = 48, 64 * 8 * 4
    net, x, peaks = nn.Sequential(*(Deep(8) for _ in range(L))), torch.randn(64, 8), {}
    assert lesson.saved_bytes(net, x, 0) == 7 * L * unit
    for S in (8, 12, 16, 24):
        with lesson.Alive(least=unit) as alive:
            lesson.step(net, x, S)
        peaks[S] = alive.peak / unit
        assert abs(peaks[S] - (S + 7 * L / S)) <= 1
    assert min(peaks, key=peaks.get) == 16 and 12 < math.sqrt(7 * L) < 24


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("S", [1, 2, 4])
def test_gradients_are_bit_equal_for_the_input_too(lesson, S, p):
    torch.manual_seed(0)
    net, x, found = lesson.network(4, 5, p), torch.randn(7, 5), {}
    for segments in (0, S):
        leaf = x.clone().requires_grad_()
        grads = lesson.step(copy.deepcopy(net), leaf, segments, seed=3)
        found[segments] = [leaf.grad, *grads]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[S], strict=True))
    assert found[0][0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_our_checkpoint_is_torchs_and_leaves_the_random_numbers_as_they_were(lesson, dtype):
    torch.manual_seed(0)
    net, x = lesson.network(3, 5, 0.3).to(dtype), torch.randn(7, 5, dtype=dtype)
    results = []
    for call in (lesson.Checkpoint.apply, lambda f, x: lesson.run(f, x, 1), lambda f, x: f(x)):
        leaf = x.clone().requires_grad_()
        net.zero_grad()
        torch.manual_seed(1)
        y = call(net, leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(w.grad for w in net.parameters()), torch.rand(3)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


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


@pytest.mark.parametrize("seed", range(3))
def test_main_counts_what_theory_says(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    assert result["saved"]["plain", 8] == 6 * result["saved"]["segments_4", 8]
    assert result["best"] == 6 and min(result["peaks"].values()) == result["peaks"][6] == 12
    assert result["runs"] == [12, 24] and 1.2 < result["flops"] < 4 / 3
    off = result["off"]
    assert off["checkpoint"] == off["our Checkpoint"] == 0
    assert off["without random state"] > 0.01 * off["scale"]
    assert result["reentrant"] == {False: 8, True: 0}
    assert [e.step for e in events(tmp_path / "peak" / "model").Scalars("memory/peak")] == [
        1, 2, 3, 4, 6, 12
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_checkpoints_lower_the_peak_of_a_gpu(lesson):
    peaks = lesson.show_cuda(L=16, B=4096, d=256)
    assert min(peaks[S] for S in (4, 8)) < 0.5 * peaks[0]
