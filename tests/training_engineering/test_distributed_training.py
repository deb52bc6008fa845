"""Processes are started by running scripts: a spawned rank must find its functions by import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "training_engineering" / "distributed_training.py"
RUNNER = """
import sys
from pathlib import Path
import torch
from distributed_training import main

if __name__ == "__main__":
    torch.save(main(seed=3, log_dir=Path(sys.argv[1]), world_size=3), sys.argv[2])
"""
DYING = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    sys.exit("rank 1 dies")
dist.all_reduce(torch.ones(1))
"""


@pytest.fixture(scope="module")
def lesson(load):
    return load("training_engineering/distributed_training.py")


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, encoding="utf-8",
        env=environment, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "runner.py").write_text(RUNNER, encoding="utf-8")
    done = run(folder / "runner.py", folder / "runs", folder / "measured.pth")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "measured.pth", weights_only=True), done.stdout, folder / "runs"


def torchrun(script):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script)


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


def test_a_ring_needs_memory_that_it_can_write_to(lesson):
    with pytest.raises(ValueError, match="must be contiguous"):
        lesson.ring_all_reduce(torch.zeros(3, 4).T, 0, 2)


def test_costs_by_hand_and_their_order(lesson):
    cost = lesson.all_reduce_seconds(4, 1000, latency=1.0, per_byte=0.01)
    assert cost == pytest.approx({"ring": 6 * (1 + 2.5), "tree": 4 * 11, "server": 6 * 11})
    for size, best in ((100_000_000, "ring"), (10_000, "tree")):
        for N in (8, 64, 1024):
            costs = lesson.all_reduce_seconds(N, size)
            assert min(costs, key=costs.get) == best and costs["server"] == max(costs.values())


def test_the_store_takes_a_free_port_of_its_own(lesson):
    stores = [lesson.serve_store() for _ in range(3)]
    assert len({store.port for store in stores}) == 3 and all(store.port > 0 for store in stores)


def test_try_unequal_shares_give_nobodys_mean():
    g = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert (g[:3].mean() + g[3:].mean()) / 2 != g.mean() == (g[:2].mean() + g[2:].mean()) / 2


def test_three_ranks_agree_with_one_process(three_ranks):
    measured, printed, _ = three_ranks
    gradients = measured["gradients"]
    assert gradients["equal"] < 1e-12 and gradients["unequal"] > 0.01 and gradients["buckets"] >= 2
    assert measured["no_sync"][0] == 0 < measured["no_sync"][1]
    ddp, alone = measured["training"]
    assert measured["p2p"][0] == measured["p2p"][1] == 4 * 840 * 8 / 3
    assert ddp == pytest.approx(alone, rel=1e-9) and ddp[-1] < 0.5 * ddp[0]
    assert printed.count("DDP's gradient") == 1, "only rank 0 prints"


def test_three_ranks_share_padded_reshuffled_indices(three_ranks):
    first, again, second = three_ranks[0]["orders"]
    assert first == again != second
    for order in (first, second):
        assert len(order) == 12 and sorted(order[:11]) == list(range(11)) and order[11] == order[0]


def test_fully_shard_holds_a_third_and_ddp_all(three_ranks):
    held = three_ranks[0]["held"]
    assert sum(held["fully_shard"]) == held["DDP"] and len(held["fully_shard"]) == 3
    assert max(held["fully_shard"]) < 0.4 * held["DDP"]
    assert three_ranks[0]["data_parallel"]["off"] < 1e-12


def test_a_ring_that_only_multiplies_is_found_out(lesson):
    tensors = [torch.full((4,), float(rank)) for rank in range(3)]
    lesson.ring_of_threads(tensors)
    assert all((tensor == 3).all() for tensor in tensors)  # 0 + 1 + 2, not 3 times one's own


def test_a_dead_rank_ends_the_run_and_curves_are_written_once(three_ranks, events):
    measured, printed, runs = three_ranks
    assert measured["death"] < 40 and "RuntimeError: out of memory, say" in printed
    for name in ("ddp", "one_process"):
        assert len(list((runs / name).iterdir())) == 1
        steps = [event.step for event in events(runs / name).Scalars("train/loss")]
        assert steps == list(range(len(measured["training"][0])))
    costs = [e.value for e in events(runs / "cost" / "ring").Scalars("cost/large_log10_ms")]
    assert len(costs) == 12 and 10 ** costs[0] == pytest.approx(8.04, abs=0.01)


def test_torchrun_runs_the_same_script(tmp_path):
    copy = tmp_path / "training_engineering" / SCRIPT.name
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)  # its runs/ then lies here
    done = torchrun(copy)
    assert done.returncode == 0, done.stderr
    assert (
        "3. 2 processes, gloo" in done.stdout and "between ranks 0   resumed 0e+00" in done.stdout
    )
    assert any((tmp_path / "runs").rglob("ddp/*tfevents*"))


def test_under_torchrun_a_dead_rank_ends_the_others(tmp_path):
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    done = torchrun(tmp_path / "dying.py")
    assert done.returncode != 0 and "rank 1 dies" in done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_take_nccl(lesson):
    assert lesson.pick_device(0, 2)[0] == "nccl"
