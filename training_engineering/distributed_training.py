"""DDP trains one network with N processes as one process would with all their examples together.

Each process, a rank, has the whole network and its own share of the batch. DDP, which is
DistributedDataParallel, averages the gradients of all ranks, so that all take the same step. You
need it when one GPU is too slow. Two mistakes give no error: with unequal shares some examples
count more than others, and without set_epoch the order is the same in each epoch. If a rank dies,
the others get an error in their next exchange: start again from the last checkpoint.

    all-reduce   leaves the sum of all ranks' tensors on all ranks. In a ring each rank sends to the
                 next one only: N - 1 times a chunk of a sum, then N - 1 times a finished chunk
    bytes        2 (N - 1) / N * S sent by each rank: less than 2 S for any number of ranks
    seconds      ring  2 (N - 1) (a + b S / N)     tree  2 ceil(log2 N) (a + b S)
                 server  2 (N - 1) (a + b S), where one rank adds for all

    N  ranks     S  bytes of the tensor, S / N of a chunk     a  seconds per message
    b  seconds per byte

Needs          nn_optim.py, train.py, 06_gradient_accumulation_and_tricks.py for no_sync
Checked here   gradients, losses and weights = one process's; the ring's sum and bytes; the
               sampler's order; a resumed training; what a rank holds with DDP and fully_shard
TensorBoard    train/loss by step: ddp lies on one_process. cost/log10_ms_of_100MB and _10kB by
               log2 N: cost/ring is lowest for 100 MB, cost/tree for 10 kB from 4 ranks on
Try            in show_gradients, write few=6 for few=2: how wrong is the unequal gradient now?
Answer         Less wrong, with most seeds by more than half: the shares are more nearly equal
Source         Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002 (ring); Li et al. 2020 (DDP),
               arXiv:2006.15704; Zhao et al. 2023 (fully sharded), arXiv:2304.11277
"""

import argparse
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter

LOG_DIR = Path(__file__).resolve().parents[1] / "runs/training_engineering/distributed_training"
TIMEOUT = timedelta(seconds=300)  # how long a rank waits for the others in one exchange
F64 = torch.float64


# --- 1. in everyday code -----------------------------------------------------------------------


def train_ddp(epochs=4):
    """A whole training with DDP. torchrun starts it once for each rank, and sets os.environ."""
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # one for each rank?
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    rank, N = dist.get_rank(), dist.get_world_size()  # rank is 0 to N - 1
    if rank == 0:
        print(f"{N} ranks on {device.type}, which send by {dist.get_backend()}")

    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 64)[:, None]
    data = TensorDataset(x, 3 * x + 1)
    sampler = DistributedSampler(data)  # gives each rank its own share of the examples
    loader = DataLoader(data, batch_size=8, sampler=sampler)  # 8 for each rank
    model = DDP(nn.Linear(1, 1).to(device))  # all ranks begin with the weights of rank 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # another order in each epoch
        for inputs, targets in loader:
            loss = F.mse_loss(model(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()  # DDP averages the gradients of all ranks
            optimizer.step()  # so that all ranks take the same step
        if rank == 0:  # one rank prints, logs and saves
            layer = model.module  # the network without DDP: its state_dict() is what to save
            print(f"epoch {epoch}: w = {layer.weight.item():.3f}, b = {layer.bias.item():.3f}")
    dist.destroy_process_group()


def show_everyday():
    print("1. In everyday code: train_ddp() learns y = w x + b from examples of y = 3 x + 1")
    command = ["--standalone", "--nproc-per-node", "2"]
    print(f"   $ torchrun {' '.join(command)} {Path(__file__).name}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "win32":
        environment["USE_LIBUV"] = "0"  # PyTorch's Windows builds lack it
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command, __file__],
        env=environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"torchrun ended with status {done.returncode}\n{done.stderr}")
    lines = done.stdout.splitlines()
    print("\n".join(f"   {line}" for line in lines))
    print(f"   -> {lines[0].partition(' ')[0]} processes learned {lines[-1].partition(': ')[2]}")
    return lines


# --- 2. a ring all-reduce, from scratch --------------------------------------------------------


def ring_all_reduce(tensor, rank, N, exchange):
    """The sum of the `tensor` of all N ranks, in place; returns the bytes that this rank has sent.

    Cut tensor.view(-1) by tensor_split(N) into chunks. exchange(out, into, rank, N) sends `out` to
    the next rank and fills `into` from the one before. In step s of the first N - 1 rank r sends
    chunk r - s and adds what comes to chunk r - s - 1; in the next N - 1 it sends chunk r + 1 - s
    and overwrites chunk r - s; all modulo N. ValueError "... must be contiguous" if the tensor is a
    view that is not contiguous. Exercise.
    """
    if not tensor.is_contiguous():
        raise ValueError("ring_all_reduce works in place: the tensor must be contiguous")
    chunks = tensor.view(-1).tensor_split(N)  # of equal size, or one more
    sent = 0

    def pass_on(i):
        """Send chunk i on; receive chunk i - 1: the chunk of ours, and what came."""
        nonlocal sent
        out, mine = chunks[i % N], chunks[(i - 1) % N]
        came = torch.empty_like(mine)
        exchange(out, came, rank, N)
        sent += out.numel() * out.element_size()
        return mine, came

    for step in range(N - 1):  # reduce-scatter: the sum grows from rank to rank
        mine, came = pass_on(rank - step)
        mine += came
    for step in range(N - 1):  # all-gather: chunk rank + 1 is finished here
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

    def exchange(out, into, rank, N):
        links[(rank + 1) % N].put(out.clone())
        into.copy_(links[rank].get(timeout=TIMEOUT.total_seconds()))

    with ThreadPoolExecutor(N) as pool:
        tasks = [pool.submit(ring_all_reduce, t, r, N, exchange) for r, t in enumerate(tensors)]
        return [task.result() for task in tasks]


def show_ring(numbers=840):
    print(f"2. A ring all-reduce of S = {8 * numbers:,} bytes: is the sum right, what is sent?")
    print("   ranks N   largest difference   bytes sent by a rank   2 (N - 1) / N * S")
    sent = {}
    for N in (2, 3, 4, 8):
        tensors = [torch.randn(numbers, dtype=F64) for _ in range(N)]
        total = torch.stack(tensors).sum(0)
        sent[N], formula = max(ring_of_threads(tensors)), 2 * (N - 1) * 8 * numbers // N
        off = max((tensor - total).abs().max().item() for tensor in tensors)
        print(f"   {N:7}   {off:18.1g}   {sent[N]:20,}   {formula:15,}")
        assert off < 1e-12 and sent[N] == formula
    print(f"   -> {N} ranks send {sent[N] / (8 * numbers):.2f} times the tensor each, 2 ranks "
          f"{sent[2] / (8 * numbers):.2f} times")  # fmt: skip
    return sent


def all_reduce_seconds(N, size, a=2e-5, b=8e-11):
    """{"ring", "tree", "server": seconds} of an all-reduce of S = `size` bytes over N ranks.

    ring 2 (N - 1) (a + b S / N), tree 2 ceil(log2 N) (a + b S), server 2 (N - 1) (a + b S), with
    a = 20 us a message and b = 1 / (12.5 GB/s). Exercise.
    """
    return {
        "ring": 2 * (N - 1) * (a + b * size / N),
        "tree": 2 * math.ceil(math.log2(N)) * (a + b * size),
        "server": 2 * (N - 1) * (a + b * size),
    }


def show_cost(log_dir):
    print("3. Which all-reduce is fastest? Formulas, with a = 20 us and 1 / b = 12.5 GB/s")
    print("   tensor   ranks N     ring, ms     tree, ms   server, ms")
    best = []
    writers = {kind: SummaryWriter(log_dir / "cost" / kind, purge_step=0)
               for kind in ("ring", "tree", "server")}  # fmt: skip
    for name, size in (("100MB", 100_000_000), ("10kB", 10_000)):
        for k in range(1, 13):
            cost = all_reduce_seconds(2**k, size)
            for kind, writer in writers.items():
                writer.add_scalar(f"cost/log10_ms_of_{name}", math.log10(1e3 * cost[kind]), k)
            if k in (1, 6, 12):
                ms = "   ".join(f"{1e3 * seconds:10,.2f}" for seconds in cost.values())
                print(f"   {name:<6}   {2**k:7}   {ms}")
        best.append(min(cost, key=cost.get))
    for writer in writers.values():
        writer.close()
    print(f"   -> among {2**k} ranks the {best[0]} is fastest for 100 MB, the {best[1]} for 10 kB")
    return best


# --- 4. DDP's gradient -------------------------------------------------------------------------


def say(text):
    """Print on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def network():
    """(B, 32) -> (B, 1), 2.2 MB in float64: several buckets; the same weights in every call."""
    torch.manual_seed(torch.initial_seed())
    layers = nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1)
    return nn.Sequential(*layers).to(F64)


def examples(n):
    """x (n, 32) and y = sin of its first number (n, 1): the same on every rank."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
    x = torch.randn(n, 32, dtype=F64, generator=generator)
    return x, x[:, :1].sin()


def backward(model, x, y, times=1.0):
    """Add the gradients of `times` the mean squared error; all gradients so far, as a vector."""
    (times * F.mse_loss(model(x), y)).backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def show_gradients(rank, N, B=8, few=2):
    x, y = examples(B * N)
    whole = backward(network(), x, y)
    ddp = DDP(network(), bucket_cap_mb=1)  # gradients are sent in buckets of about 1 MB
    for _ in range(2):  # DDP sorts its buckets after the first pass
        backward(ddp, x, y)
    equal, unequal, rows = [B] * N, [B * N - few * (N - 1)] + [few] * (N - 1), {}
    say(f"4. Is a rank's gradient that of one process on all {B * N} examples?")
    say(f"   shares of {N} ranks                        relative difference   buckets sent")
    for name, model, shares, times in (
        ("equal, but no DDP", network(), equal, 1),
        ("equal", ddp, equal, 1),
        ("equal, 2 micro-batches, 1 in no_sync()", ddp, equal, 0.5),
        (f"unequal, {' and '.join(str(share) for share in unequal)}", ddp, unequal, 1),
        ("unequal, loss * share / mean share", ddp, unequal, unequal[rank] / B),
    ):
        mine = x.split(shares)[rank], y.split(shares)[rank]
        model.zero_grad()
        with CommDebugMode() as sent:  # counts what goes from rank to rank
            if "no_sync" in name:
                first, mine = zip(*(t.chunk(2) for t in mine), strict=True)
                with model.no_sync():  # adds up the gradients, sends nothing
                    backward(model, *first, times)
                assert sent.get_total_counts() == 0
            off = backward(model, *mine, times) - whole
        rows[name] = (off.norm() / whole.norm()).item(), sent.get_total_counts()
        say(f"   {name:<38}   {rows[name][0]:19.1g}   {rows[name][1]:12}")
    wrong = [name for name, row in rows.items() if row[0] > 1e-12]
    say(f"   -> wrong, without an error: {'; '.join(wrong)}")
    return list(rows.values())


# --- 5. a training, stopped and resumed --------------------------------------------------------


def gathered(tensor):
    """The tensor of every rank, stacked: (N, ...)."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor)
    return torch.stack(copies)


def show_sampler(rank, N, n=11):
    say(f"5. In which order do {N} ranks see {n} examples?")
    sampler, orders = DistributedSampler(range(n), N, rank), []
    for words, epoch in (("set_epoch(0)", 0), ("again, no set_epoch", None), ("set_epoch(1)", 1)):
        if epoch is not None:
            sampler.set_epoch(epoch)
        orders.append(gathered(torch.tensor(list(sampler))).T.flatten().tolist())
        say(f"   {words:<19}   {orders[-1]}")
    return orders


def train(model, optimizer, samplers, epoch, x, y, B):
    """An epoch on the joined batches of `samplers`, one's own or those of all: a loss per step."""
    losses = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shares = [torch.tensor(list(sampler)).split(B) for sampler in samplers]
    for parts in zip(*shares, strict=True):
        i = torch.cat(parts)
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(x[i]), y[i]))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def show_training(rank, N, log_dir, file, n=256, B=16, epochs=6):
    data, rows, weights = (*examples(n), B), {}, {}
    samplers = [DistributedSampler(range(n), N, r) for r in range(N)]
    say("   Is a training with DDP that of one process? Weights differ by at most:")
    say("                       loss, first   and last epoch   between ranks   from one process's")
    for name, model, mine, first in (
        ("one process", network(), samplers, 0),
        ("DDP", DDP(network()), [samplers[rank]], 0),
        ("DDP, resumed", DDP(network()), [samplers[rank]], epochs // 2),
        ("ranks without DDP", network(), [samplers[rank]], 0),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if first:
            state = [torch.load(file, weights_only=True) if rank == 0 else None]
            dist.broadcast_object_list(state)  # others may be on machines without that file
            model.module.load_state_dict(state[0]["model"])
            optimizer.load_state_dict(state[0]["optimizer"])
        losses = []
        for epoch in range(first, epochs):
            losses.append(train(model, optimizer, mine, epoch, *data))
            if name == "DDP" and rank == 0 and epoch + 1 == epochs // 2:  # one rank writes
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
        losses = gathered(torch.stack(losses)).mean(0)  # (epochs, steps)
        weights[name] = gathered(torch.cat([w.detach().flatten() for w in model.parameters()]))
        off = [(weights[name] - w[0]).abs().max().item() for w in
               (weights[name], weights["one process"])]  # fmt: skip
        rows[name] = losses.flatten().tolist(), *off
        ends = f"{losses[0].mean():11.4f}   {losses[-1].mean():14.4f}"
        say(f"   {name:<17}   {ends}   {off[0]:13.1g}   {off[1]:18.1g}")
    for name, run in (("ddp", "DDP"), ("one_process", "one process")) if rank == 0 else ():
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for step, loss in enumerate(rows[run][0]):
                writer.add_scalar("train/loss", loss, step)
    same = [name for name, (_, between, from_one) in rows.items() if max(between, from_one) < 1e-9]
    say(f"   -> one process's weights on all ranks: {'; '.join(same)}")
    return list(rows.values())


# --- 6. DataParallel, DDP or fully_shard? ------------------------------------------------------


def held(tensors):
    """How many numbers of the tensors this rank holds."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)


def show_held(rank, N, B=8):
    x, y = examples(B * N)
    whole, share, rows = backward(network(), x, y), slice(rank * B, (rank + 1) * B), {}
    sharded, mesh = network(), init_device_mesh("cpu", (N,))
    for layer in (sharded[0], sharded[2], sharded[4], sharded):
        fully_shard(layer, mesh=mesh)  # a rank keeps its part, and gathers a layer to run it
    n = len(whole)
    say(f"6. Which way? A network of {n:,} weights, {N} ranks or GPUs, one step of Adam")
    say("                              a rank holds      numbers   all-gathers   gradients are")
    say("                  processes        weights      of Adam    of weights   summed by")
    say(f"   DataParallel           1   {n:12,}   {2 * n:10,}             -   GPU 0")
    for name, model in (("DDP", DDP(network())), ("fully_shard", sharded)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with CommDebugMode() as sent, warnings.catch_warnings(action="ignore"):  # of its own hooks
            F.mse_loss(model(x[share]), y[share]).backward()
        optimizer.step()
        grads = [w.grad.full_tensor() if isinstance(w, DTensor) else w.grad
                 for w in model.parameters()]  # fmt: skip
        torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), whole)
        adam = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
        counts = {str(kind): count for kind, count in sent.get_comm_counts().items()}
        gathers = sum(count for kind, count in counts.items() if "gather" in kind)
        how = "reduce-scatter" if any("scatter" in kind for kind in counts) else "all-reduce"
        holds = gathered(torch.tensor([held(model.parameters()), held(adam)])).tolist()
        rows[name] = holds, gathers, how
        say(f"   {name:<12}   {N:9}   {holds[0][0]:12,}   {holds[0][1]:10,}   {gathers:11}   {how}")
    say("   (DataParallel needs GPUs and is not measured. In each step GPU 0 sends its weights to")
    say("   the others and adds their gradients. PyTorch's documentation advises DDP instead.)")
    most = max(weights for weights, _ in rows["fully_shard"][0]) / n
    say(f"   -> with fully_shard a rank holds at most {most:.2f} of the weights")
    return rows


# --- starting the ranks of sections 4 to 6 -----------------------------------------------------


def work(rank, N, seed, log_dir, folder):
    """One rank; rank 0 leaves what was measured in a file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at Ctrl-C, or with the parent, silently
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    store = dist.FileStore(str(folder / "store"), N)  # where the ranks find one another
    dist.init_process_group("gloo", store=store, rank=rank, world_size=N, timeout=TIMEOUT)
    try:
        measured = {
            "gradients": show_gradients(rank, N),
            "orders": show_sampler(rank, N),
            "training": show_training(rank, N, log_dir, folder / "checkpoint.pth"),
            "held": show_held(rank, N),
        }
        if rank == 0:
            torch.save(measured, folder / "measured.pth")
    except OSError as error:  # told here in one line, since the parent only learns the status
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1 if isinstance(error, BrokenPipeError) else str(error))
    dist.barrier()  # nobody leaves while another still sends
    dist.destroy_process_group()


def main(seed=0, log_dir=LOG_DIR, world_size=2):
    if dist.is_torchelastic_launched():  # by torchrun: this process is one of its ranks
        return train_ddp()
    torch.manual_seed(seed)
    measured = {"everyday": show_everyday(), "sent": show_ring(), "best": show_cost(log_dir)}
    with tempfile.TemporaryDirectory() as folder:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # not for ranks that still import
        ranks = mp.spawn(work, (world_size, seed, log_dir, Path(folder)), nprocs=world_size,
                         join=False, daemon=True)  # fmt: skip
        signal.signal(signal.SIGINT, before)
        try:
            while not ranks.join():
                pass
        except mp.ProcessExitedException as ended:
            sys.exit(str(ended) if ended.signal_name else ended.exit_code)
        measured |= torch.load(Path(folder) / "measured.pth", weights_only=True)
    print(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?smoothing=0#timeseries")
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
