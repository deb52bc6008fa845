"""One run of main on three ranks, which are processes of a script: they import its functions."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).resolve().parents[2] / "training_engineering" / "distributed_training.py"
RUNNER = """
import os
import sys
from pathlib import Path

import distributed_training as lesson
import torch
import torch.distributed as dist

work, show_held, show_gradients, barrier = (
    lesson.work, lesson.show_held, lesson.show_gradients, dist.barrier
)


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


def early_end():
    barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    dist.all_reduce(torch.ones(1))


def and_more(rank, N, seed, log_dir, folder):
    def more(rank, N):
        found = {"ring": ring(rank, N), "tried": show_gradients(rank, N, few=6)}
        return {**show_held(rank, N), **found}

    def end():
        try:
            early_end()
            told = "nothing"
        except RuntimeError:
            told = "an error"
        lesson.say(f"rank 0 got {told} when another had ended")
        os._exit(0)

    lesson.show_held, dist.barrier = more, end
    work(rank, N, seed, log_dir, folder)


if __name__ == "__main__":
    lesson.work = and_more
    measured = lesson.main(seed=3, log_dir=Path(sys.argv[1]), world_size=3)
    torch.save(measured, sys.argv[2])
"""


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/distributed_training.py")


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "runner.py").write_text(RUNNER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, folder / "runner.py", folder / "runs", folder / "measured.pth"],
        capture_output=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return torch.load(folder / "measured.pth", weights_only=True), done.stdout, folder / "runs"


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


def test_a_ring_needs_memory_that_it_can_write_to(lesson):
    with pytest.raises(ValueError, match="must be contiguous"):
        lesson.ring_all_reduce(torch.zeros(3, 4).T, 0, 2, None)


def test_costs_by_hand_and_their_order(lesson):
    cost = lesson.all_reduce_seconds(4, 1000, a=1.0, b=0.01)
    assert cost == pytest.approx({"ring": 6 * (1 + 2.5), "tree": 4 * 11, "server": 6 * 11})
    assert lesson.all_reduce_seconds(5, 1000, a=1.0, b=0.01)["tree"] == pytest.approx(6 * 11)
    for size, best in ((100_000_000, "ring"), (10_000, "tree")):
        for N in (8, 64, 1024):
            costs = lesson.all_reduce_seconds(N, size)
            assert min(costs, key=costs.get) == best and costs["server"] == max(costs.values())


@pytest.mark.parametrize("seed", range(3))
def test_ring_and_costs_as_printed(lesson, seed, tmp_path, capsys, events):
    torch.manual_seed(seed)
    assert lesson.show_ring(24) == {2: 192, 3: 256, 4: 288, 8: 336}
    printed = capsys.readouterr().out
    assert "of S = 192 bytes: is the sum right" in printed
    for N, sent in ((2, 192), (3, 256), (4, 288), (8, 336)):
        assert re.search(rf"^ +{N} +(0|\de-1\d) +{sent} +{sent}$", printed, re.MULTILINE)
    assert "-> 8 ranks send 1.75 times the tensor each, 2 ranks 1.00 times" in printed

    assert lesson.show_cost(tmp_path) == ["ring", "tree"]
    printed = capsys.readouterr().out
    assert re.search(r"^ +100MB +64 +18.27 +96.24 +1,010.52$", printed, re.MULTILINE)
    assert re.search(r"^ +10kB +4096 +163.80 +0.50 +170.35$", printed, re.MULTILINE)
    assert "-> among 4096 ranks the ring is fastest for 100 MB, the tree for 10 kB" in printed
    for kind in ("ring", "tree", "server"):
        for name, size in (("100MB", 1e8), ("10kB", 1e4)):
            logged = events(tmp_path / "cost" / kind).Scalars(f"cost/log10_ms_of_{name}")
            assert [e.step for e in logged] == list(range(1, 13))
            for e in logged:
                seconds = lesson.all_reduce_seconds(2**e.step, size)[kind]
                assert 10**e.value == pytest.approx(1e3 * seconds, rel=1e-5)


def test_unequal_shares_give_nobodys_mean():
    g = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert (g[:3].mean() + g[3:].mean()) / 2 != g.mean() == (g[:2].mean() + g[2:].mean()) / 2


def test_a_torchrun_that_fails_shows_what_it_said(lesson, monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="no such rank")
    monkeypatch.setattr(lesson.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(OSError, match="status 1\nno such rank"):
        lesson.show_everyday()


@pytest.mark.parametrize(("signal_name", "status"), [(None, 3), ("SIGKILL", "rank 1 is gone")])
def test_a_rank_that_fails_ends_main_with_its_status(
    lesson, monkeypatch, tmp_path, signal_name, status
):
    def join():
        raise lesson.mp.ProcessExitedException("rank 1 is gone", 1, 99, 3, signal_name)

    monkeypatch.setattr(lesson, "show_everyday", lambda: [])
    monkeypatch.setattr(lesson.mp, "spawn", lambda *args, **options: SimpleNamespace(join=join))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        lesson.main(log_dir=tmp_path)
    assert stop.value.code == status and signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("error", "status"), [(OSError("disk is full"), "disk is full"), (BrokenPipeError(), 1)]
)
def test_a_disk_that_refuses_ends_a_rank_in_one_line(lesson, monkeypatch, tmp_path, error, status):
    def refuse(rank, N):
        assert (rank, N) == (0, 1) and dist.get_world_size() == 1
        raise error

    monkeypatch.setattr(lesson, "show_gradients", refuse)
    monkeypatch.setattr(lesson.os, "dup2", lambda *_: None)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            lesson.work(0, 1, 0, tmp_path, tmp_path)
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == status


# --- three ranks ---------------------------------------------------------------------------------


def test_torchrun_runs_the_whole_script(three_ranks):
    measured, printed, _ = three_ranks
    lines = measured["everyday"]
    assert lines[0].startswith("2 ranks on ") and len(lines) == 5
    assert "   $ torchrun --standalone --nproc-per-node 2 distributed_training.py" in printed
    w = [float(re.search(r"w = ([\d.]+)", line)[1]) for line in lines[1:]]
    assert w == sorted(w) and 2.8 < w[-1] < 3.1
    assert f"-> 2 processes learned w = {w[-1]:.3f}, b = 1.0" in printed
    if torch.cuda.device_count() >= 2:
        assert lines[0] == "2 ranks on cuda, which send by nccl"


def test_three_ranks_have_the_gradient_of_one_process(three_ranks):
    measured, printed, _ = three_ranks
    (alone, none), (equal, sent), (micro, twice), (unequal, _), (mended, _) = measured["gradients"]
    assert equal < 1e-12 and micro < 1e-12 and mended < 1e-12
    assert alone > 0.1 and unequal > 0.01
    assert none == 0 and sent == twice >= 2
    title = "Is a rank's gradient that of one process on all 24 examples?"
    assert printed.count(title) == 2, "only rank 0 prints: once in main, once for Try"
    assert "-> wrong, without an error: equal, but no DDP; unequal, 20 and 2 and 2\n" in printed
    shown = "equal, 2 micro-batches, 1 in no_sync()"
    assert re.search(rf"{re.escape(shown)} +{micro:.1g} +{twice}\n", printed)


def test_try_shares_that_are_more_nearly_equal_err_less(three_ranks):
    measured, printed, _ = three_ranks
    assert 0 < measured["held"]["tried"][3][0] < 0.5 * measured["gradients"][3][0]
    assert "unequal, 12 and 6 and 6" in printed


def test_three_ranks_share_padded_reshuffled_indices(three_ranks):
    first, again, second = three_ranks[0]["orders"]
    assert first == again != second
    for order in (first, second):
        assert len(order) == 12 and sorted(order[:11]) == list(range(11)) and order[11] == order[0]
    assert f"   set_epoch(1)          {second}\n" in three_ranks[1]


def test_a_training_with_ddp_is_that_of_one_process_even_if_resumed(three_ranks, events):
    measured, printed, runs = three_ranks
    one, ddp, resumed, without = measured["training"]
    assert ddp[0] == pytest.approx(one[0], rel=1e-9)
    assert resumed[0] == pytest.approx(one[0][len(one[0]) // 2 :], rel=1e-9)
    assert one[1] == one[2] == ddp[1] == resumed[1] == 0
    assert max(ddp[2], resumed[2]) < 1e-10 and min(without[1:]) > 1e-3
    assert sum(ddp[0][-6:]) < 0.5 * sum(ddp[0][:6])
    assert "-> one process's weights on all ranks: one process; DDP; DDP, resumed\n" in printed
    first, last = (sum(losses) / 6 for losses in (ddp[0][:6], ddp[0][-6:]))
    assert re.search(rf"DDP +{first:.4f} +{last:.4f} +0 +", printed)
    for name, row in (("ddp", ddp), ("one_process", one)):
        assert len(list((runs / name).iterdir())) == 1, "one rank writes"
        logged = events(runs / name).Scalars("train/loss")
        assert [e.step for e in logged] == list(range(len(row[0])))
        assert [e.value for e in logged] == pytest.approx(row[0], rel=1e-6)
    assert ddp[0] != one[0], "or the curves could be exchanged"


def test_fully_shard_holds_a_third_and_ddp_all(three_ranks):
    measured, printed, _ = three_ranks
    ddp, gathers, how = measured["held"]["DDP"]
    n = 32 * 256 + 256 + 256 * 1024 + 1024 + 1024 + 1
    assert ddp == [[n, 2 * n]] * 3 and (gathers, how) == (0, "all-reduce")
    shards, gathers, how = measured["held"]["fully_shard"]
    assert sum(held for held, _ in shards) == n and all(adam == 2 * held for held, adam in shards)
    assert max(held for held, _ in shards) < 0.35 * n
    assert (gathers, how) == (6, "reduce-scatter"), "each layer, forward and backward"
    assert "-> with fully_shard a rank holds at most 0.34 of the weights" in printed
    assert re.search(rf"fully_shard +3 +{shards[0][0]:,} +{shards[0][1]:,} +6 +reduce-sc", printed)


def test_our_ring_among_processes_is_all_reduce(three_ranks):
    assert max(three_ranks[0]["held"]["ring"]) < 1e-12


def test_a_rank_that_ends_early_gives_the_others_an_error(three_ranks):
    assert "rank 0 got an error when another had ended\n" in three_ranks[1]
