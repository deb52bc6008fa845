"""The command lines of the training scripts, and the device that one asks for by name."""

import argparse
import re

import torch

from support import checkpoints
from support.files import ROOT, DataError, number, options_parser


def pick_device(name):
    """The device of that name, "auto" being the best one here. Raises DataError if it is not."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name == "auto":
        return best
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend has its own way
        found = "cpu" if best.type == "cpu" else f"{best} and cpu"
        raise DataError(f"no device {name!r} here; there is {found}") from error
    return device


def run_label(text):
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, . - and _")
    return text


def training_parser(epochs=5, batch_size=64, lr=0.1, device="cpu"):
    """What all training scripts are asked. Only what is given is in the answer."""
    parser = options_parser(argument_default=argparse.SUPPRESS)
    add, whole = parser.add_argument, number(int, 1)
    add("--epochs", type=whole, help=f"passes over the training images ({epochs})")
    add("--batch-size", type=whole, help=f"images a step ({batch_size})")
    add("--lr", type=number(float, 1e-12), help=f"the largest learning rate ({lr})")
    add("--seed", type=number(int, 0), help="seed of all that is random (0)")
    add("--limit", type=whole, help="only the first so many images, for a quick try")
    add("--device", help=f"cpu, cuda, cuda:1, mps, xpu, or auto: the best one here ({device})")
    return parser


def train_options(argv=None, checkpoint_dir=ROOT / "checkpoints" / "train"):
    """The options given to train.py, as a dict for its main. Wrong ones end with status 2."""
    parser = training_parser()
    add = parser.add_argument
    add("--run-name", type=run_label, help="the name of the run's folders (the time)")
    resume = "go on from a checkpoint or from a run's folder; alone: from the newest run"
    add("--resume", nargs="?", const="", metavar="PATH", help=resume)
    predict = "the class of these images, by the newest run's best checkpoint (or --resume's)"
    add("--predict", nargs="+", metavar="FILE", help=predict)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if "run_name" in given:
            parser.error("--resume goes on under the old name: leave out --run-name")
        best = "predict" in given
        given["resume"] = checkpoints.find(given["resume"], checkpoint_dir, best)
        for name, value in checkpoints.read(given["resume"])["options"].items():
            if given.get(name, value) != value:
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} was {value} when this run began: leave it out")
    return given
