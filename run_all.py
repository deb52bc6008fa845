"""Run every lesson in learning order, each as its own program, and tell in one line how it went.

    python run_all.py                    all of them
    python run_all.py --only peft        those whose path contains "peft"
    python run_all.py --jobs 2           two at a time

A lesson whose docstring says `Needs CUDA` is skipped where there is none. Status 1 if one failed.
"""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.files import guard, options_parser

ROOT = Path(__file__).resolve().parent
LESSONS = """
00_interactive_playground.py 01_manual_gradient.py 02_autograd_basics.py 03_computational_graph.py
04_hooks.py 05_jacobian_and_advanced_autograd.py 06_gradient_accumulation_and_tricks.py
07_custom_autograd_function.py 08_tensor_operations_and_gpu.py
generate_labels.py read_data.py test_Tf.py Useful_TF.py test_tb.py
dataset_transform.py dataloader.py
nn_module.py nn_linear.py nn_relu.py nn_loss.py nn_optim.py nn_conv2d.py nn_conv.py nn_maxpool.py
nn_common_layers.py nn_seq.py model.py nn_loss_network.py
model_save.py model_load.py model_pretrained.py
train.py train_gpu_1.py train_gpu_2.py Console.py
training_engineering/optimizer_scheduler.py training_engineering/amp_training.py
training_engineering/gradient_checkpoint.py training_engineering/distributed_training.py
loss_functions/contrastive_loss.py loss_functions/kl_divergence.py
loss_functions/focal_loss.py loss_functions/label_smoothing.py
model_architecture/attention_mechanism.py model_architecture/positional_encoding.py
model_architecture/normalization.py model_architecture/residual_connection.py
peft/lora_principle.py peft/adapter_layers.py
evaluation_inference/sampling_strategies.py evaluation_inference/beam_search.py
generative_models/vae_basics.py generative_models/diffusion_basics.py
generative_models/gan_training.py
multimodal/clip_contrastive.py multimodal/cross_attention.py
""".split()  # noqa: SIM905


def lessons(only="", root=ROOT):
    """The lessons that are there, in learning order, whose path contains `only`."""
    return [name for name in LESSONS if only in name and (root / name).is_file()]


def needs_cuda(path):
    """Whether a line of a script's docstring is `Needs CUDA`."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.search(r"^Needs +CUDA$", doc, re.MULTILINE) is not None


def outcome(status, out, err):
    """What one line says of a program that ended with `status`, having printed `out` and `err`."""
    if status == 0:
        return "ok"
    if status < 0:
        return f"failed: killed by {signal.Signals(-status).name}"
    lines = [line for line in (err or out).splitlines() if line.strip()]
    return f"failed: {lines[-1] if lines else 'no message'}"


def run_lesson(name, has_cuda, root, running):
    """(name, seconds, outcome), the outcome being "ok", "skipped: …" or "failed: …".

    While the lesson runs, its process is in the list `running`.
    """
    if needs_cuda(root / name) and not has_cuda:
        return name, 0.0, "skipped: needs CUDA"
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, root / name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUTF8": "1"},  # elsewhere Windows pipes its own code page
    ) as child:
        running += [child]
        printed = child.communicate()
        running.remove(child)
    return name, time.perf_counter() - start, outcome(child.returncode, *printed)


def stop(pool, tasks, running):
    """Begin no more of the tasks, and end the processes that still run."""
    pool.shutdown(wait=False, cancel_futures=True)
    told, began = set(), time.monotonic()
    while not all(task.done() for task in tasks):
        for child in running[:]:
            if time.monotonic() - began > 5:
                child.kill()
            elif child not in told:
                child.terminate()  # once: it may need a while to end its own children
                told.add(child)
        time.sleep(0.02)


def draw_data():
    """Draw the built-in data before several lessons at once would."""
    from support.data import hymenoptera
    from support.drawings import Shapes10

    Shapes10()
    hymenoptera()


def main(only="", jobs=1, root=ROOT):
    """Run the chosen lessons and return their outcomes, in learning order."""
    import torch

    chosen, has_cuda = lessons(only, root), torch.cuda.is_available()
    if jobs > 1:
        draw_data()
    outcomes, running = [], []
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(run_lesson, name, has_cuda, root, running) for name in chosen]
        try:
            for task in tasks:
                name, seconds, how = task.result()
                print(f"{name:<52} {seconds:6.1f} s   {how}", flush=True)
                outcomes.append(how)
        finally:  # Ctrl-C, SIGTERM, a closed pipe
            stop(pool, tasks, running)
    return outcomes


def command(only, jobs):
    """main, and a last line. Returns status 1 if a lesson failed."""
    try:
        outcomes = main(only, jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped") from None
    failed = sum(how.startswith("failed") for how in outcomes)
    print(f"{len(outcomes)} lessons, {failed} failed")
    return min(failed, 1)


def parse(argv=None):
    parser = options_parser()
    parser.add_argument("--only", default="", help="run the lessons whose path contains this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs takes a number from 1 on")
    if not lessons(options.only):
        parser.error(f"no lesson's path contains {options.only!r}")
    return vars(options)


if __name__ == "__main__":
    guard(command, parse)
