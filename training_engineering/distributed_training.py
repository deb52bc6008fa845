"""In a ring all-reduce no rank sends more than twice the gradient, among 4,096 ranks as among 2.

    all-reduce     N - 1 steps in which each rank passes a sum of a chunk on (reduce-scatter), then
                   N - 1 in which it passes the finished chunk on (all-gather); a chunk is size / N
    time           a a message, b a byte:  ring    2 (N - 1) (a + b S / N)
                                           tree    2 ceil(log2 N) (a + b S)
                                           server  2 (N - 1) (a + b S)      one port for all workers
    DDP            each rank has the model and its share of the batch; while backward goes on, each
                   bucket of finished gradients is divided by N and all-reduced

Equal shares of a mean loss give the mean of the whole batch, unequal ones do not. For 100 MB this
model has the ring ahead of a plain tree up to 4,096 ranks, for 10 kB behind it from a few ranks on:
2 (N - 1) latencies add up.

    python training_engineering/distributed_training.py                 starts its two ranks itself
    torchrun --standalone --nproc-per-node=2 training_engineering/distributed_training.py
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 …

Checked here   ring = dist.all_reduce, its bytes counted; DDP's gradient = one process's on the
               whole batch; weights equal on all ranks; no_sync; the sampler; a resumed checkpoint;
               what a rank holds under DDP and under fully_shard; a rank that dies ends the others
TensorBoard    train/loss by step in ddp, one_process: one line; cost/large_log10_ms (100 MB) and
               cost/small_log10_ms (10 kB) by log2 N in cost/ring, tree, server
Try            shares of 3 and 1 examples in place of 2 and 2: whose gradient is it? Nobody's mean
Source         Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002 (ring); Li et al. 2020 (DDP),
               arXiv:2006.15704; Zhao et al. 2023 (FSDP), arXiv:2304.11277
"""

import argparse
import logging
import math
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DistributedSampler
from torch.utils.tensorboard import SummaryWriter

TOPIC = "training_engineering"
LOG_DIR = Path(__file__).resolve().parents[1] / "runs" / TOPIC / "distributed_training"
TIMEOUT = timedelta(seconds=60)  # how long a rank waits for the others in one call
LIBUV = sys.platform != "win32"  # not in PyTorch's Windows builds


def say(text):
    """Print on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)


# --- ring all-reduce ---------------------------------------------------------------------------


def exchange_p2p(out, into, rank, world_size):
    """Send `out` to the next rank of the ring while receiving `into` from the one before."""
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    operations = [(dist.isend, out, right), (dist.irecv, into, left)]
    present = [dist.P2POp(*operation) for operation in operations if operation[1].numel()]
    for request in dist.batch_isend_irecv(present) if present else ():
        request.wait()


def ring_all_reduce(tensor, rank, world_size, exchange=exchange_p2p):
    """The sum of all ranks' `tensor`, in place; returns the bytes that this rank has sent.

    Cut tensor.view(-1) by tensor_split(world_size) into chunks. exchange(out, into, rank,
    world_size) sends `out` to the next rank and fills `into` from the one before. In step s of the
    first N - 1 rank r sends chunk r - s and adds what comes to chunk r - s - 1; in the next N - 1
    it sends chunk r + 1 - s and overwrites chunk r - s; all modulo N. ValueError "… must be
    contiguous" if the tensor is a view that is not contiguous. Exercise.
    """
    if not tensor.is_contiguous():
        raise ValueError("ring_all_reduce works in place: the tensor must be contiguous")
    chunks = tensor.view(-1).tensor_split(world_size)  # of equal size, or one more
    sent = 0

    def pass_on(i):
        """Send chunk i on; receive chunk i - 1: the chunk of ours, and what came."""
        nonlocal sent
        out, mine = chunks[i % world_size], chunks[(i - 1) % world_size]
        came = torch.empty_like(mine)
        exchange(out, came, rank, world_size)
        sent += out.numel() * out.element_size()
        return mine, came

    for step in range(world_size - 1):  # reduce-scatter: the sum grows from rank to rank
        mine, came = pass_on(rank - step)
        mine += came
    for step in range(world_size - 1):  # all-gather: chunk rank + 1 is finished here
        mine, came = pass_on(rank + 1 - step)
        mine.copy_(came)
    return sent


def ring_of_threads(tensors):
    """ring_all_reduce among threads, one for each tensor; the bytes that each has sent, a list.

    A queue.Queue leads to each rank; the exchange puts a clone of `out` into the next rank's and
    copies what its own holds to `into`. Exercise.
    """
    N = len(tensors)
    links = [queue.Queue() for _ in range(N)]  # links[r] leads to rank r

    def exchange(out, into, rank, world_size):
        links[(rank + 1) % world_size].put(out.clone())
        into.copy_(links[rank].get(timeout=TIMEOUT.total_seconds()))

    with ThreadPoolExecutor(N) as pool:
        tasks = [
            pool.submit(ring_all_reduce, t, rank, N, exchange) for rank, t in enumerate(tensors)
        ]
        return [task.result() for task in tasks]


def all_reduce_seconds(N, size, latency=2e-5, per_byte=8e-11):
    """{"ring", "tree", "server": seconds} of an all-reduce of `size` bytes over N ranks.

    With a = latency and b = per_byte, S = size: ring 2 (N - 1) (a + b S / N), tree 2 ceil(log2 N)
    (a + b S), server 2 (N - 1) (a + b S). 20 us a message, 12.5 GB/s a link. Exercise.
    """
    return {
        "ring": 2 * (N - 1) * (latency + per_byte * size / N),
        "tree": 2 * math.ceil(math.log2(N)) * (latency + per_byte * size),
        "server": 2 * (N - 1) * (latency + per_byte * size),
    }


def show_ring(size=840 * 1024):
    print(f"1. ring all-reduce of {size:,} bytes: sent by a rank, and 2 (N - 1) / N of it")
    sent = {}
    for N in (2, 3, 4, 8):
        tensors = [torch.randn(size // 8, dtype=torch.float64) for _ in range(N)]
        total = torch.stack(tensors).sum(0)
        each = ring_of_threads(tensors)
        for tensor in tensors:
            torch.testing.assert_close(tensor, total)
        sent[N] = max(each)
        assert set(each) == {2 * (N - 1) * size // N}
        print(f"   N {N}   sent {sent[N]:9,}   theory {2 * (N - 1) / N * size:11,.0f}")
    return sent


def show_cost(log_dir):
    print("2. milliseconds of an all-reduce by the model: ring, tree, parameter server")
    costs, worlds = {}, [2**k for k in range(1, 13)]
    for name, size in (("large", 100_000_000), ("small", 10_000)):
        costs[name] = {N: all_reduce_seconds(N, size) for N in worlds}
        for N in (2, 64, 4096):
            shown = "   ".join(f"{kind} {1e3 * t:10.2f}" for kind, t in costs[name][N].items())
            print(f"   {size:11,} bytes   N {N:4}   {shown}")
    for kind in ("ring", "tree", "server"):
        with SummaryWriter(log_dir / "cost" / kind, purge_step=0) as writer:
            for name, by_world in costs.items():
                for N, cost in by_world.items():
                    ms = math.log10(1e3 * cost[kind])
                    writer.add_scalar(f"cost/{name}_log10_ms", ms, round(math.log2(N)))
    return costs


# --- ranks -------------------------------------------------------------------------------------


def pick_device(local_rank, local_ranks):
    """NCCL and a GPU for each rank of this machine, or else gloo on the CPU."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks:
        torch.cuda.set_device(local_rank)
        return "nccl", torch.device("cuda", local_rank)
    return "gloo", torch.device("cpu")


def serve_store():
    """The store where ranks meet, on a port that the system chooses and this process holds."""
    return dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False,
                         use_libuv=LIBUV)  # fmt: skip


def join(rank, world_size, port):
    """Make this process rank `rank`; returns its device."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at Ctrl-C, or with the parent, silently
    backend, device = pick_device(rank, world_size)
    store = dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT, use_libuv=LIBUV)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    return device


def leave():
    dist.barrier()  # nobody leaves while another still sends
    dist.destroy_process_group()


def start_ranks(work, world_size, *args):
    """Run work(rank, world_size, port, *args) in `world_size` new processes."""
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)  # silent when it ends the others
    store, before = serve_store(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:  # while they import, the ranks inherit that Ctrl-C is the parent's affair
        context = mp.spawn(
            work, (world_size, store.port, *args), nprocs=world_size, join=False, daemon=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    while not context.join():
        pass


def gathered(tensor):
    """The tensor of every rank, stacked: (N, …)."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return torch.stack(copies)


# --- what DDP does -----------------------------------------------------------------------------


def network(device):
    """(B, 32) -> (B, 1), of 2.2 MB in float64: several buckets; the same weights in every call."""
    torch.manual_seed(torch.initial_seed())
    layers = nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1)
    return nn.Sequential(*layers).to(device, torch.float64)


def examples(n, device):
    """x (n, 32) and y = sin of its first number (n, 1): the same on every rank."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
    x = torch.randn(n, 32, dtype=torch.float64, generator=generator)
    return x.to(device), x[:, :1].sin().to(device)


def loss_gradient(model, x, y):
    """The gradients of the mean squared error, as one vector."""
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def counting_ddp(device):
    """A DDP network, and a list that gets the size of each bucket as it is all-reduced."""
    model, buckets = DDP(network(device), bucket_cap_mb=1), []

    def hook(state, bucket):
        buckets.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    return model, buckets


def show_p2p(rank, N, device):
    generator, off, sent = torch.Generator().manual_seed(rank), 0.0, {}  # each rank its own numbers
    for size in (840, 7, 1):
        tensor = torch.randn(size, dtype=torch.float64, generator=generator).to(device)
        expected = tensor.clone()
        sent[size] = ring_all_reduce(tensor, rank, N)
        dist.all_reduce(expected)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)
        off = max(off, (tensor - expected).abs().max().item())
    theory = 2 * (N - 1) / N * 840 * 8
    say(f"3. {N} processes, {dist.get_backend()}: ring = dist.all_reduce; bytes of 840 numbers")
    say(f"   largest difference {off:.0e}   sent {sent[840]:,}   theory {theory:,.0f}")
    return sent[840], theory


def show_gradients(rank, N, device, B=8):
    x, y = examples(B * N, device)
    whole = loss_gradient(network(device), x, y)
    model, buckets = counting_ddp(device)
    share = slice(rank * B, (rank + 1) * B)
    loss_gradient(model, x[share], y[share])  # DDP sorts its buckets after the first pass
    buckets.clear()
    equal = loss_gradient(model, x[share], y[share])
    torch.testing.assert_close(equal, whole, rtol=0, atol=1e-12)
    count = len(buckets)
    shares = [B * N - 2 * (N - 1)] + [2] * (N - 1)
    x, y = x.split(shares)[rank], y.split(shares)[rank]
    unequal = loss_gradient(model, x, y)
    off = [(g - whole).norm().item() / whole.norm().item() for g in (equal, unequal)]
    say(f"4. DDP's gradient against one process's on all {B * N} examples, relative")
    say(f"   equal shares {off[0]:.0e}   unequal shares {off[1]:.3f}   buckets {count}")
    return {"equal": off[0], "unequal": off[1], "buckets": count}


def show_no_sync(rank, N, device, B=4, micro_batches=3):
    x, y = (t.chunk(N)[rank].chunk(micro_batches) for t in examples(B * N * micro_batches, device))
    whole = loss_gradient(network(device), *examples(B * N * micro_batches, device))
    model, buckets = counting_ddp(device)
    with model.no_sync():
        for i in range(micro_batches - 1):
            (F.mse_loss(model(x[i]), y[i]) / micro_batches).backward()
    before = len(buckets)
    (F.mse_loss(model(x[-1]), y[-1]) / micro_batches).backward()
    gradient = torch.cat([w.grad.flatten() for w in model.parameters()])
    torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)
    say(f"5. {micro_batches} micro-batches, all but the last under no_sync: buckets sent")
    say(f"   before the last {before}   with it {len(buckets) - before}   "
        f"off by {(gradient - whole).abs().max():.0e}")  # fmt: skip
    return before, len(buckets) - before


def show_sampler(rank, N, device, n=11):
    sampler = DistributedSampler(range(n), N, rank, shuffle=True, seed=0)
    orders = []
    for epoch in (None, None, 1):  # None: forgotten
        if epoch is not None:
            sampler.set_epoch(epoch)
        mine = gathered(torch.tensor(list(sampler), device=device))
        orders.append(mine.T.flatten().tolist())
    padding = len(orders[0]) - n
    assert sorted(orders[0][:n]) == list(range(n)) and orders[0][n:] == orders[0][:padding]
    assert orders[0] == orders[1] != orders[2]
    say(f"6. DistributedSampler, {n} examples for {N} ranks: each once, then {padding} again")
    say(f"   epoch 0, and again without set_epoch   {orders[1]}")
    say(f"   epoch 1   {orders[2]}")
    return orders


def train(model, optimizer, samplers, x, y, epochs, B):
    """Yields the loss of each step on the joined batches of the samplers: one's own, or all."""
    for epoch in epochs:
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [torch.tensor(list(sampler), device=x.device).split(B) for sampler in samplers]
        for parts in zip(*shares, strict=True):
            i = torch.cat(parts)
            loss = F.mse_loss(model(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def start(model):
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def spread(model):
    """Largest difference of a weight between any rank and rank 0."""
    weights = gathered(torch.cat([w.detach().flatten() for w in model.parameters()]))
    return (weights - weights[0]).abs().max().item()


def show_training(rank, N, device, log_dir, folder, n=256, B=16, epochs=6):
    x, y = examples(n, device)
    samplers = [DistributedSampler(range(n), N, r, seed=0) for r in range(N)]
    mine, half = ([samplers[rank]], x, y), epochs // 2
    model, optimizer = start(DDP(network(device)))
    losses = list(train(model, optimizer, *mine, range(half), B))
    if rank == 0:  # all ranks hold the same: one of them writes
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"epoch": half}, folder / "checkpoint.pth")
    losses += train(model, optimizer, *mine, range(half, epochs), B)
    losses = torch.tensor(losses, dtype=torch.float64, device=device)
    losses = gathered(losses).mean(0).tolist()

    alone, alone_optimizer = start(network(device))
    expected = list(train(alone, alone_optimizer, samplers, x, y, range(epochs), B))
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    weights = list(model.module.parameters()), list(alone.parameters())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-10)

    resumed, optimizer = start(DDP(network(device)))
    file = folder / "checkpoint.pth"
    state = [None]
    if rank == 0:
        state = [torch.load(file, weights_only=True, map_location="cpu")]
    dist.broadcast_object_list(state)  # the others may be on machines without that disk
    resumed.module.load_state_dict(state[0]["model"])
    optimizer.load_state_dict(state[0]["optimizer"])
    list(train(resumed, optimizer, *mine, range(state[0]["epoch"], epochs), B))
    pairs = zip(resumed.parameters(), model.parameters(), strict=True)
    off = max((a - b).abs().max().item() for a, b in pairs)
    ranks_off = spread(model)
    assert ranks_off == 0 and off < 1e-12  # new buckets may add three ranks in another order
    if rank == 0:
        for name, curve in (("ddp", losses), ("one_process", expected)):
            with SummaryWriter(log_dir / name, purge_step=0) as writer:
                for step, loss in enumerate(curve):
                    writer.add_scalar("train/loss", loss, step)
    say(f"7. {epochs} epochs of DDP, stopped and resumed after {half}: loss, differences")
    say(f"   loss {losses[0]:.4f} -> {losses[-1]:.4f}   one process {expected[-1]:.4f}   "
        f"between ranks {ranks_off:g}   resumed {off:.0e}")  # fmt: skip
    return losses, expected


def show_fully_shard(rank, N, device, B=8):
    (x, y), model = examples(B * N, device), network(device)
    whole = loss_gradient(network(device), x, y)
    numbers = {"DDP": sum(w.numel() for w in model.parameters())}
    mesh = init_device_mesh(device.type, (N,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)  # gathered just before it is used, and let go after
    fully_shard(model, mesh=mesh)
    mine = torch.tensor([sum(w.to_local().numel() for w in model.parameters())], device=device)
    numbers["fully_shard"] = gathered(mine).flatten().tolist()
    share = slice(rank * B, (rank + 1) * B)
    F.mse_loss(model(x[share]), y[share]).backward()
    gradient = torch.cat([w.grad.full_tensor().flatten() for w in model.parameters()])
    torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)
    assert sum(numbers["fully_shard"]) == numbers["DDP"]
    _, optimizer = start(model)
    optimizer.step()
    state = (s for w in optimizer.state.values() for s in w.values() if isinstance(s, DTensor))
    adam = sum(s.to_local().numel() for s in state)
    say("8. numbers that each rank holds: weights; of Adam on rank 0")
    say(f"   DDP {numbers['DDP']:,} each   Adam {2 * numbers['DDP']:,}")
    say(f"   fully_shard {numbers['fully_shard']}   Adam {adam:,}   "
        f"gradient off by {(gradient - whole).abs().max():.0e}")  # fmt: skip
    assert adam == 2 * numbers["fully_shard"][rank]
    return numbers


def show_data_parallel(rank, device):
    """DataParallel is one process: what it does is seen on rank 0 alone."""
    if rank:
        return None
    x, y = examples(16, device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    plain, parallel = network(device), network(device)
    if gpus:  # without, it would only call the model
        parallel = nn.DataParallel(parallel)
    off = (loss_gradient(plain, x, y) - loss_gradient(parallel, x, y)).abs().max().item()
    copies = gpus * sum(w.numel() for w in plain.parameters()) if gpus > 1 else 0
    say("9. DataParallel: one process, which sends the model to each GPU in every forward pass")
    say(f"   GPUs {gpus}   numbers sent a step {copies:,}   gradient off by {off:.0e}"
        if gpus else "   skipped: no GPU for it here")  # fmt: skip
    return {"gpus": gpus, "off": off}


def all_sections(rank, N, device, log_dir, folder):
    return {
        "p2p": show_p2p(rank, N, device),
        "gradients": show_gradients(rank, N, device),
        "no_sync": show_no_sync(rank, N, device),
        "orders": show_sampler(rank, N, device),
        "training": show_training(rank, N, device, log_dir, folder),
        "held": show_fully_shard(rank, N, device),
        "data_parallel": show_data_parallel(rank, device),
    }


def work(rank, world_size, port, seed, log_dir, folder):
    """A rank that mp.spawn started; rank 0 leaves its results in a file."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    device = join(rank, world_size, port)
    try:
        measured = all_sections(rank, world_size, device, log_dir, folder)
        if rank == 0:
            torch.save(measured, folder / "measured.pth")
    except OSError as error:  # told here in one line, since the parent only learns the status
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1 if isinstance(error, BrokenPipeError) else str(error))
    leave()


def die(rank, world_size, port):
    """The last rank dies while the others wait for it in an all-reduce."""
    device = join(rank, world_size, port)
    if rank == world_size - 1:
        raise RuntimeError("out of memory, say")
    dist.all_reduce(torch.ones(1, device=device))


def show_death(world_size):
    print(f"10. rank {world_size - 1} dies while the others wait for it")
    began = time.perf_counter()
    try:
        start_ranks(die, world_size)
    except mp.ProcessRaisedException as error:
        seconds = time.perf_counter() - began
        print(f"   all ended with: {str(error).strip().splitlines()[-1]}")
        print(f"   seconds, starting them included: {seconds:.0f}   a rank would wait {TIMEOUT}")
        return seconds
    raise AssertionError("the run went on without a rank")


def run_under_torchrun(seed, log_dir):
    """This process is one of torchrun's ranks: the same sections, without the death."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, N, local_rank, local_ranks = (int(os.environ[name]) for name in names)
    backend, device = pick_device(local_rank, local_ranks)
    device_id = device if backend == "nccl" else None
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    torch.manual_seed(seed)
    if rank == 0:
        show_ring()
        show_cost(log_dir)
    with tempfile.TemporaryDirectory() as folder:
        measured = all_sections(rank, N, device, log_dir, Path(folder))
    leave()
    return measured


def main(seed=0, log_dir=LOG_DIR, world_size=2):
    if dist.is_torchelastic_launched():
        return run_under_torchrun(seed, log_dir)
    torch.manual_seed(seed)
    measured = {"sent": show_ring(), "costs": show_cost(log_dir)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_ranks(work, world_size, seed, log_dir, Path(folder))
        except mp.ProcessExitedException as ended:
            sys.exit(str(ended) if ended.signal_name else ended.exit_code)
        measured |= torch.load(Path(folder) / "measured.pth", weights_only=True)
    measured["death"] = show_death(world_size)
    return measured


def guard(main, *flags):
    """Run main as a program: Ctrl-C, a closed pipe and a disk that refuses end it in one line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    options, lost = vars(parser.parse_args()), []
    if hasattr(sys.stdout, "reconfigure"):  # any path, on any console, and logs that fill
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    threading.excepthook = lost.append  # what TensorBoard's thread could not write
    try:
        main(**options)
        if not lost:
            return
        raise lost[0].exc_value
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except OSError as error:
        status = f"cannot log to {LOG_DIR}: {error}" if lost else str(error)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what print still holds has nowhere to go
    sys.exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the ranks share the cores
    guard(main)
