"""One run of main on three ranks: torchrun starts RUNNER, which imports the lesson, on each."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

SCRIPT = Path(__file__).resolve().parents[2] / "training_engineering" / "distributed_training.py"
RUNNER = f"""
import sys
import warnings
from collections import Counter

sys.path.insert(0, {str(SCRIPT.parent)!r})
import distributed_training as lesson
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

show_gradients, show_held, backward = lesson.show_gradients, lesson.show_held, lesson.backward
calls = []


class Exchanges(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "c10d" in operation.namespace:
            self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {{}}))


def exchange(out, into, rank, N):
    operations = [dist.P2POp(dist.isend, out, (rank + 1) % N),
                  dist.P2POp(dist.irecv, into, (rank - 1) % N)]
    present = [operation for operation in operations if operation.tensor.numel()]
    for request in dist.batch_isend_irecv(present) if present else ():
        request.wait()


def ring(rank, N):
    off = []
    for size in (840, 7, 1):
        mine = torch.Generator().manual_seed(rank)
        tensor = torch.randn(size, dtype=torch.float64, generator=mine)
        expected = tensor.clone()
        dist.all_reduce(expected)
        lesson.ring_all_reduce(tensor, rank, N, exchange)
        off.append((tensor - expected).abs().max().item())
    return off


def counted(*args):
    with Exchanges() as sent:
        found = backward(*args)
    calls.append(dict(sent.counts))
    return found


def gradients_and_more(rank, N):
    lesson.backward = counted
    found = [show_gradients(rank, N)]
    lesson.backward = backward
    return [*found, calls, show_gradients(rank, N, few=6), ring(rank, N)]


def held_and_more(rank, N):
    with Exchanges() as sent:
        found = show_held(rank, N)
    return {{**found, "sent": dict(sent.counts)}}


if __name__ == "__main__":
    warnings.simplefilter("error")
    lesson.show_gradients, lesson.show_held = gradients_and_more, held_and_more
    lesson.work()
"""


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/distributed_training.py")


@pytest.fixture(scope="module")
def three_ranks(lesson, tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("ranks"), io.StringIO()
    (folder / "runner.py").write_text(RUNNER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setattr(lesson, "__file__", str(folder / "runner.py"))
        measured = lesson.main(seed=3, log_dir=folder / "runs", N=3)
    return measured, printed.getvalue(), folder / "runs"


# --- without processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(840,), (7, 3), (2,), (0,)])
@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_ring_among_threads_is_the_sum_and_counts_its_bytes(lesson, N, shape, dtype):
    torch.manual_seed(0)
    tensors = [torch.randint(-8, 8, shape).to(dtype) for _ in range(N)]  # exact in every dtype
    total = torch.stack(tensors).sum(0)
    sent = lesson.ring_of_threads(tensors)
    assert all(torch.equal(tensor, total) for tensor in tensors)
    assert sum(sent) == 2 * (N - 1) * total.numel() * dtype.itemsize
    assert max(sent) - min(sent) <= 2 * dtype.itemsize


def test_a_ring_that_only_multiplies_is_found_out(lesson):
    tensors = [torch.full((4,), float(rank)) for rank in range(3)]
    lesson.ring_of_threads(tensors)
    assert all((tensor == 3).all() for tensor in tensors)  # 0 + 1 + 2, not 3 times one's own


def test_ring_sends_the_chunks_in_the_order_that_is_told(lesson):
    sent = []

    def exchange(out, into, rank, N):
        assert (rank, N) == (1, 3)
        sent.append(out.clone().tolist())
        into.fill_(10.0 ** len(sent))

    tensor = torch.tensor([1.0, 2.0, 3.0])
    assert lesson.ring_all_reduce(tensor, 1, 3, exchange) == 4 * 4
    assert sent == [[2.0], [11.0], [103.0], [1000.0]]  # chunks 1, 0; then 2, 1
    assert tensor.tolist() == [10000.0, 1000.0, 103.0]


@pytest.mark.parametrize("seed", range(3))
def test_the_ring_as_printed(lesson, seed, capsys):
    torch.manual_seed(seed)
    assert lesson.show_ring(24) == {2: 192, 3: 256, 4: 288, 8: 336}
    printed = capsys.readouterr().out
    assert "of S = 192 bytes: is the sum right" in printed
    for N, sent in ((2, 192), (3, 256), (4, 288), (8, 336)):
        assert re.search(rf"^ +{N} +(0|\de-1\d) +{sent} +{sent}$", printed, re.MULTILINE)
    assert "-> 8 ranks send 1.75 times S each, 2 ranks 1.00 times\n" in printed


@pytest.mark.parametrize(("n", "N"), [(11, 2), (12, 3), (7, 5), (10, 4)])
def test_shares_are_those_of_distributed_sampler(lesson, n, N):
    for epoch in (0, 3):
        for rank in range(N):
            sampler = DistributedSampler(range(n), N, rank, seed=5)
            sampler.set_epoch(epoch)
            assert lesson.share(n, rank, N, epoch, seed=5) == list(sampler)
    assert lesson.share(n, 0, N, 0) == list(DistributedSampler(range(n), N, 0))


def test_the_samplers_orders_as_printed(lesson, capsys):
    first, again, second = lesson.show_sampler(7, 2)
    assert first == again != second
    for a, b in (first, again, second):
        assert sorted(set(a + b)) == list(range(7)) and len(a) == len(b) == 4
    printed = capsys.readouterr().out
    assert f"   set_epoch(1)          {second[0]}   {second[1]}\n" in printed
    assert "-> another order without set_epoch: False, with it: True; seen twice: 1\n" in printed


def test_unequal_shares_give_nobodys_mean():
    g = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert (g[:3].mean() + g[3:].mean()) / 2 != g.mean() == (g[:2].mean() + g[2:].mean()) / 2


def instead_of_torchrun(lesson, monkeypatch, code):
    """start() runs `code` in place of torchrun; the process, once it is started, in a list."""
    started, popen = [], subprocess.Popen

    def run(command, **options):
        assert command[1:3] == ["-m", "torch.distributed.run"] and command[-1] == lesson.__file__
        started.append(popen([sys.executable, "-c", code], **options))
        return started[0]

    monkeypatch.setattr(lesson.subprocess, "Popen", run)
    return started


def test_a_torchrun_that_fails_ends_main(lesson, monkeypatch, tmp_path, capsys):
    instead_of_torchrun(lesson, monkeypatch, "print('epoch 0'); raise SystemExit(3)")
    with pytest.raises(OSError, match="torchrun ended with status 3"):
        lesson.start(0, tmp_path, 2)
    assert capsys.readouterr().out.endswith("distributed_training.py\nepoch 0\n")


def test_a_console_that_closes_ends_the_ranks(lesson, monkeypatch, tmp_path):
    code = "import time; print('epoch 0', flush=True); time.sleep(60)"
    started = instead_of_torchrun(lesson, monkeypatch, code)

    def closed(text, **options):
        if started:
            raise BrokenPipeError

    monkeypatch.setattr(lesson, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        lesson.start(0, tmp_path, 2)
    assert started[0].poll()


# --- three ranks ---------------------------------------------------------------------------------


def test_torchrun_runs_the_whole_script(three_ranks):
    measured, printed, _ = three_ranks
    lines = printed.splitlines()
    assert lines[1] == "   $ torchrun --standalone --nproc-per-node 3 runner.py"
    gpus = torch.cuda.device_count() >= 3
    assert (
        lines[2]
        == f"   3 ranks on {'cuda, which send by nccl' if gpus else 'cpu, which send by gloo'}"
    )
    w = [float(re.search(r"w = ([\d.]+)", line)[1]) for line in lines[3:7]]
    assert w == sorted(w) and 2 < w[-1] < 3.1
    assert measured["everyday"] == [measured["everyday"][0]] * 3
    assert (
        lines[7].startswith(f"   -> [w, b] on each rank: [[{w[-1]}, ")
        and lines[7].count(str(w[-1])) == 3
    )


def test_three_ranks_have_the_gradient_of_one_process(three_ranks):
    measured, printed, _ = three_ranks
    alone, equal, micro, unequal, mended = measured["gradients"][0]
    assert equal < 1e-12 and micro < 1e-12 and mended < 1e-12
    assert alone > 0.1 and unequal > 0.01
    title = "Is the gradient of 3 ranks that of one process on all 24 examples?"
    assert printed.count(title) == 2, "only rank 0 prints: once in main, once for Try"
    assert "-> wrong, without an error: 8 each, without DDP; 20 and 2 and 2\n" in printed
    shown = "8 each, in 2 parts, 1 in no_sync()"
    assert re.search(rf"^   {re.escape(shown)} +{micro:.1g}$", printed, re.MULTILINE)


def test_no_sync_sends_nothing_and_ddp_all_reduces(three_ranks):
    whole, alone, equal, first, second, unequal, mended = three_ranks[0]["gradients"][1]
    assert whole == alone == {}
    assert not {kind for kind in first if kind != "broadcast_"}, "at most DDP's sorted buckets"
    for sent in (equal, second, unequal, mended):
        assert sent["allreduce_"] >= 1 and sent.keys() <= {"allreduce_", "broadcast_"}


def test_try_shares_that_are_more_nearly_equal_err_less(three_ranks):
    (_, _, _, unequal, _), _, (_, _, _, tried, _), _ = three_ranks[0]["gradients"]
    assert 0 < tried < 0.5 * unequal
    assert "12 and 6 and 6" in three_ranks[1]


def test_our_ring_among_processes_is_all_reduce(three_ranks):
    assert max(three_ranks[0]["gradients"][3]) < 1e-12


def test_a_training_with_ddp_is_that_of_one_process_even_if_resumed(three_ranks, events):
    measured, printed, runs = three_ranks
    one, ddp, resumed, without = measured["training"]
    assert len(one[0]) == 6 * 8 and ddp[0] == pytest.approx(one[0], rel=1e-9)
    assert resumed[0] == pytest.approx(one[0][24:], rel=1e-9)
    assert one[1] == one[2] == ddp[1] == resumed[1] == 0
    assert max(ddp[2], resumed[2]) < 1e-10 and min(without[1:]) > 1e-3
    assert sum(ddp[0][-8:]) < 0.5 * sum(ddp[0][:8])
    assert "3. Does DDP with 3 batches of 16 learn the weights of one process with 48?" in printed
    assert (
        "-> one process's weights on all ranks: one process; DDP; DDP, resumed at epoch 3\n"
        in printed
    )
    for name, row in (("one process", one), ("DDP", ddp), ("DDP, resumed at epoch 3", resumed)):
        first, last = (sum(losses) / 8 for losses in (row[0][:8], row[0][-8:]))
        shown = rf"^   {name} +{first:.4f} +{last:.4f} +{row[1]:.1g} +{row[2]:.1g}$"
        assert re.search(shown, printed, re.MULTILINE)
    for name, row in (("ddp", ddp), ("one_process", one)):
        assert len(list((runs / name).iterdir())) == 1, "one rank writes"
        logged = events(runs / name).Scalars("train/loss")
        assert [e.step for e in logged] == list(range(len(row[0])))
        assert [e.value for e in logged] == pytest.approx(row[0], rel=1e-6)
    assert ddp[0] != one[0], "or the curves could be exchanged"


def test_fully_shard_holds_a_third_and_ddp_all(three_ranks):
    held, printed = three_ranks[0]["held"], three_ranks[1]
    n = 32 * 256 + 256 + 256 * 1024 + 1024 + 1024 + 1
    assert held["DDP"] == [3 * n] * 3
    assert sum(held["fully_shard"]) == 3 * n and max(held["fully_shard"]) < 0.35 * 3 * n
    assert re.search(rf"^   DDP +3 +{3 * n:,} +all-reduce: ", printed, re.MULTILINE)
    assert re.search(rf"^   DataParallel +1 +{3 * n:,} +GPU 0 alone$", printed, re.MULTILINE)
    assert re.search(
        rf"^   fully_shard +3 +{held['fully_shard'][0]:,} +reduce-sc", printed, re.MULTILINE
    )
    assert (
        "-> DDP if a GPU can hold it all; if not, fully_shard: a rank holds 0.34 of it" in printed
    )
    sent = held["sent"]
    assert sent["_allgather_base_"] == 6, "each layer, in forward and in backward"
    assert sent["_reduce_scatter_base_"] == 3 and sent["allreduce_"] >= 1
