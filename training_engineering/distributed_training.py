"""DDP trains one network with N processes as one process would with all their examples together.

Each process, a rank, has the whole network and its own share of the batch. DDP, which is
DistributedDataParallel, averages the gradients of all ranks, so that all take the same step. This
is exact if the loss is a mean over examples and no layer mixes examples: BatchNorm does, and needs
torch.nn.SyncBatchNorm. Take DDP when one GPU is too slow, and fully_shard when a network does not
fit into one GPU: each rank keeps only a part of it. Two mistakes give no error: with unequal shares
some examples count more than others, and without set_epoch the order is the same in each epoch.

    all-reduce   leaves the sum of all ranks' tensors on all ranks. A ring cuts the tensor into
                 N chunks. In each of N - 1 steps a rank sends one chunk to the next rank, which
                 adds its own; in N - 1 more steps the finished chunks go round
    bytes        2 (N - 1) / N * S sent by each of N ranks, if the tensor has S bytes: below 2 S

Needs          nn_optim.py, train.py, 06_gradient_accumulation_and_tricks.py for no_sync
Checked here   gradients, losses and weights are one process's; what a rank holds; the ring's sum
TensorBoard    train/loss by step: the curve of ddp lies on the curve of one_process
Try            in show_gradients, write few=6 for few=2: how wrong is the unequal gradient now?
Answer         Less wrong, with most seeds by more than half: the shares are more nearly equal
Source         Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002 (ring); Li et al. 2020 (DDP),
               arXiv:2006.15704; Zhao et al. 2023 (fully sharded), arXiv:2304.11277
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, even while torch is being imported

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter

LOG_DIR = Path(__file__).resolve().parents[1] / "runs/training_engineering/distributed_training"


# --- 1. in everyday code -----------------------------------------------------------------------


def train_ddp(epochs=4):
    """A whole training with DDP. torchrun starts it once for each rank, and sets os.environ."""
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # one for each rank?
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    rank, N = dist.get_rank(), dist.get_world_size()  # rank is 0 to N - 1
    if rank == 0:
        print(f"   {N} ranks on {device.type}, which send by {dist.get_backend()}")

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
        layer = model.module  # the network without DDP: its state_dict() is what to save
        if rank == 0:  # one rank prints, logs and saves
            print(f"   epoch {epoch}: w = {layer.weight.item():.3f}, b = {layer.bias.item():.3f}")
    dist.destroy_process_group()
    return layer


def say(text):
    """Print on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def gathered(tensor):
    """The tensor of every rank, stacked: (N, ...)."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor)
    return torch.stack(copies)


# --- 2. DDP's gradient -------------------------------------------------------------------------


def network():
    """(B, 32) -> (B, 1) in float64; the same weights in every call and on every rank."""
    torch.manual_seed(torch.initial_seed())
    layers = nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1)
    return nn.Sequential(*layers).double()


def examples(n):
    """x (n, 32) and y = sin of its first number (n, 1): the same on every rank."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
    x = torch.randn(n, 32, dtype=torch.float64, generator=generator)
    return x, x[:, :1].sin()


def backward(model, x, y, times=1.0):
    """Add the gradients of `times` the mean squared error; all gradients so far, as a vector."""
    (times * F.mse_loss(model(x), y)).backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def show_gradients(rank, N, B=8, few=2):
    x, y = examples(B * N)
    whole, ddp = backward(network(), x, y), DDP(network())
    equal, unequal, rows = [B] * N, [B * N - few * (N - 1)] + [few] * (N - 1), {}
    shares_of = " and ".join(str(size) for size in unequal)
    say(f"2. Is the gradient of {N} ranks that of one process on all {B * N} examples?")
    say("   examples of the ranks                        relative difference")
    for name, model, sizes, times in (
        (f"{B} each, without DDP", network(), equal, 1),
        (f"{B} each", ddp, equal, 1),
        (f"{B} each, in 2 parts, 1 in no_sync()", ddp, equal, 0.5),
        (shares_of, ddp, unequal, 1),
        (f"{shares_of}, loss * examples / {B}", ddp, unequal, unequal[rank] / B),
    ):
        mine = x.split(sizes)[rank], y.split(sizes)[rank]
        model.zero_grad()
        if "no_sync" in name:
            first, mine = zip(*(t.chunk(2) for t in mine), strict=True)
            with model.no_sync():  # adds the gradients up on this rank, and sends nothing
                backward(model, *first, times)
        rows[name] = ((backward(model, *mine, times) - whole).norm() / whole.norm()).item()
        say(f"   {name:<42}   {rows[name]:19.1g}")
    say("   (Each rank's loss is a mean, and DDP's gradient the mean of the ranks' gradients. In")
    say("   no_sync() DDP sends nothing: two micro-batches cost one exchange instead of two.)")
    wrong = [name for name, off in rows.items() if off > 1e-12]
    say(f"   -> wrong, without an error: {'; '.join(wrong)}")
    return list(rows.values())


# --- 3. a training, stopped and resumed --------------------------------------------------------


def show_training(rank, N, log_dir, file, B=16, epochs=6):
    n, half, rows, weights = 128 * N, epochs // 2, {}, {}
    (x, y), mine = examples(n), DistributedSampler(range(n), N, rank)
    say(f"3. Does DDP with {N} batches of {B} learn the weights of one process with {N * B}?")
    say("   run                     loss of its first   last epoch   ranks differ   from one by")
    for name, model, sampler, size, first in (
        ("one process", network(), DistributedSampler(range(n), 1, 0), B * N, 0),
        ("DDP", DDP(network()), mine, B, 0),
        (f"DDP, resumed at epoch {half}", DDP(network()), mine, B, half),
        ("ranks without DDP", network(), mine, B, 0),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if first:
            state = torch.load(file, weights_only=True)
            model.module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        losses = []
        for epoch in range(first, epochs):
            sampler.set_epoch(epoch)
            for i in torch.tensor(list(sampler)).split(size):
                optimizer.zero_grad()
                losses.append(F.mse_loss(model(x[i]), y[i]))
                losses[-1].backward()
                optimizer.step()
            if name == "DDP" and rank == 0 and epoch + 1 == half:  # one rank writes
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
        losses = gathered(torch.stack(losses).detach()).mean(0).tolist()
        w = weights[name] = gathered(torch.cat([w.detach().flatten() for w in model.parameters()]))
        off = [(w - weights[run][0]).abs().max().item() for run in (name, "one process")]
        rows[name] = losses, *off
        ends = f"{sum(losses[:8]) / 8:17.4f}   {sum(losses[-8:]) / 8:10.4f}"  # 8 steps an epoch
        say(f"   {name:<23}   {ends}   {off[0]:12.1g}   {off[1]:11.1g}")
    for name, run in (("ddp", "DDP"), ("one_process", "one process")) if rank == 0 else ():
        with SummaryWriter(log_dir / name, purge_step=0) as writer:
            for step, loss in enumerate(rows[run][0]):
                writer.add_scalar("train/loss", loss, step)
    same = [name for name, (_, between, from_one) in rows.items() if max(between, from_one) < 1e-9]
    say(f"   -> one process's weights on all ranks: {'; '.join(same)}")
    return list(rows.values())


# --- 4. DataParallel, DDP or fully_shard? ------------------------------------------------------


def show_held(rank, N, B=8):
    x, y = examples(B * N)
    whole, mine, rows = backward(network(), x, y), slice(rank * B, (rank + 1) * B), {}
    sharded, mesh, n = network(), dist.init_device_mesh("cpu", (N,)), len(whole)
    for layer in (sharded[0], sharded[2], sharded[4], sharded):
        fully_shard(layer, mesh=mesh)  # a rank keeps its part, and gathers a layer to run it
    say(f"4. Which way? What a rank or a GPU holds after a step of Adam with {n:,} weights")
    say("   way            processes   weights and Adam's means   gradients are summed by")
    say(f"   DataParallel           1   {3 * n:24,}   GPU 0 alone")
    for name, model, how in (
        ("DDP", DDP(network()), "all-reduce: all sums for each rank"),
        ("fully_shard", sharded, "reduce-scatter: a part for each rank"),
    ):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        F.mse_loss(model(x[mine]), y[mine]).backward()
        optimizer.step()
        grads = [w.grad.full_tensor() if isinstance(w, DTensor) else w.grad
                 for w in model.parameters()]  # fmt: skip
        torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), whole)
        held = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        held = [t.to_local() if isinstance(t, DTensor) else t for t in (*held, *model.parameters())]
        rows[name] = gathered(torch.tensor(sum(t.numel() for t in held))).tolist()
        say(f"   {name:<12}   {N:9}   {rows[name][0]:24,}   {how}")
    say("   (fully_shard gathers a layer's weights before it runs, in forward and in backward.")
    say("   DataParallel needs GPUs and is not measured; PyTorch's documentation advises DDP.)")
    part = max(rows["fully_shard"]) / max(rows["DDP"])
    say(f"   -> DDP if a GPU can hold it all; if not, fully_shard: a rank holds {part:.2f} of it")
    return rows


# --- 5. DistributedSampler ---------------------------------------------------------------------


def share(n, rank, N, epoch, seed=0):
    """The indices that rank `rank` of N sees in `epoch`, a list: DistributedSampler's.

    Take torch.randperm(n) with a generator whose seed is seed + epoch. Repeat its first numbers at
    the end until N divides the count. Give every N-th number, from number `rank` on. Exercise.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return (order + order[: -n % N])[rank::N]


def show_sampler(n=11, N=2):
    print(f"5. Which of {n} examples does each of {N} ranks see, and in which order?")
    print("   epoch                 rank 0                rank 1")
    samplers, orders = [DistributedSampler(range(n), N, rank) for rank in range(N)], []
    for words, epoch in (("set_epoch(0)", 0), ("no set_epoch", 0), ("set_epoch(1)", 1)):
        for sampler in samplers if "no" not in words else ():
            sampler.set_epoch(epoch)
        orders.append([list(sampler) for sampler in samplers])
        assert orders[-1] == [share(n, rank, N, epoch) for rank in range(N)]
        print(f"   {words:<19}   {'   '.join(map(str, orders[-1]))}")
    print(f"   -> another order without set_epoch: {orders[1] != orders[0]}, with it: "
          f"{orders[2] != orders[1]}; seen twice: {sum(map(len, orders[0])) - n}")  # fmt: skip
    return orders


# --- 6. a ring all-reduce, from scratch --------------------------------------------------------


def ring_all_reduce(tensor, rank, N, exchange):
    """The sum of the `tensor` of all N ranks, in place; returns the bytes that this rank has sent.

    Cut tensor.view(-1) by tensor_split(N) into chunks. exchange(out, into, rank, N) sends `out` to
    the next rank and fills `into` from the one before. In step s = 0 to 2 N - 3 rank r sends chunk
    (r - s) % N; what comes is added to chunk (r - s - 1) % N, if s >= N - 1 copied. Exercise.
    """
    chunks, sent = tensor.view(-1).tensor_split(N), 0  # of equal size, or one more
    for step in range(2 * (N - 1)):  # reduce-scatter: sums grow; all-gather: they go round
        out, mine = chunks[(rank - step) % N], chunks[(rank - step - 1) % N]
        came = torch.empty_like(mine)
        exchange(out, came, rank, N)
        mine.copy_(mine + came if step < N - 1 else came)
        sent += out.nbytes
    return sent


def ring_of_threads(tensors):
    """ring_all_reduce among threads, one for each tensor; the bytes that each has sent, a list.

    The exchange puts a clone of `out` into the queue.Queue of the next rank, and copies what its
    own queue holds to `into`. Exercise.
    """
    N = len(tensors)
    links = [queue.Queue() for _ in range(N)]  # links[r] leads to rank r

    def exchange(out, into, rank, N):
        links[(rank + 1) % N].put(out.clone())
        into.copy_(links[rank].get(timeout=300))

    with ThreadPoolExecutor(N) as pool:
        tasks = [pool.submit(ring_all_reduce, t, r, N, exchange) for r, t in enumerate(tensors)]
        return [task.result() for task in tasks]


def show_ring(numbers=840):
    S, sent = 8 * numbers, {}
    print(f"6. A ring all-reduce of S = {S:,} bytes: is the sum right, what is sent?")
    print("   ranks N   largest difference   bytes sent by a rank   2 (N - 1) / N * S")
    for N in (2, 3, 4, 8):
        tensors = [torch.randn(numbers, dtype=torch.float64) for _ in range(N)]
        total = torch.stack(tensors).sum(0)
        sent[N], formula = max(ring_of_threads(tensors)), 2 * (N - 1) * S // N
        off = max((tensor - total).abs().max().item() for tensor in tensors)
        print(f"   {N:7}   {off:18.1g}   {sent[N]:20,}   {formula:17,}")
        assert off < 1e-12 and sent[N] == formula
    print(f"   -> {N} ranks send {sent[N] / S:.2f} times S each, 2 ranks {sent[2] / S:.2f} times")
    return sent


# --- starting the ranks ------------------------------------------------------------------------


def work():
    """Sections 1 to 4 on one rank, which torchrun has started; rank 0 saves what was measured."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_DFL)  # end silently, even while waiting for another rank
    layer = train_ddp()
    if "RANKS" not in os.environ:  # torchrun was called by hand
        return
    seed, *paths = json.loads(os.environ["RANKS"])
    log_dir, folder = map(Path, paths)
    torch.manual_seed(seed)
    rank, N = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), N)  # where the ranks find one another
    dist.init_process_group("gloo", store=store, rank=rank, world_size=N)
    learned = gathered(torch.tensor([layer.weight.item(), layer.bias.item()]).double())
    say(f"   -> [w, b] on each rank: {learned.round(decimals=3).tolist()}")
    measured = {
        "everyday": learned.tolist(),
        "gradients": show_gradients(rank, N),
        "training": show_training(rank, N, log_dir, folder / "checkpoint.pth"),
        "held": show_held(rank, N),
    }
    if rank == 0:
        torch.save(measured, folder / "measured.pth")
    dist.barrier()  # nobody leaves while another still sends
    dist.destroy_process_group()


def start(seed, log_dir, N):
    """Run work() on N ranks, print what they print as it comes, return what was measured."""
    print("1. In everyday code: train_ddp() learns y = w x + b from examples of y = 3 x + 1")
    command = ["--standalone", "--nproc-per-node", str(N), __file__]
    print(f"   $ torchrun {' '.join(command[:-1])} {Path(__file__).name}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        asked = {"RANKS": json.dumps([seed, str(log_dir), folder]), "OMP_NUM_THREADS": "1"}
        asked |= {"USE_LIBUV": "0"} if sys.platform == "win32" else {}  # Windows builds lack it
        with subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command],
            env=os.environ | asked, stdout=subprocess.PIPE, encoding="utf-8",
        ) as ranks:  # fmt: skip
            try:
                for line in ranks.stdout:
                    print(line, end="")
            except BaseException:
                ranks.terminate()  # torchrun ends its ranks
                raise
        if ranks.returncode:
            raise OSError(f"torchrun ended with status {ranks.returncode}")
        return torch.load(Path(folder) / "measured.pth", weights_only=True)


def main(seed=0, log_dir=LOG_DIR, N=2):
    if dist.is_torchelastic_launched():  # by torchrun: this process is one of its ranks
        return work()
    measured = start(seed, log_dir, N)
    torch.manual_seed(seed)
    measured |= {"orders": show_sampler(), "sent": show_ring()}
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
    guard(main)
