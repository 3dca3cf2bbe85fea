"""A run's folder: its history, its checkpoints, and how to go on from one.

    with Run(args, settings) as run:
        run.restore(model, optimizer, scaler)
        for epoch in run.epochs():
            ...
            run.keep(epoch, trained, tested, times, drift, correct)

A run is its settings, and its length is not one of them: with constant rates ten epochs are the
beginning of fifty. So one folder holds history.csv, a row per epoch, an epochN.pt for each length
N that was asked for, and latest.pt, the newest state to go on from, while it is newer than those.
"""

import glob
import io
import math
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from torch import nn

from data import UserError
from plumbing import ranks, terminal
from plumbing.files import check_writable, locked, remove_leftovers, write_csv, write_file
from plumbing.machine import device_name, memory_is_full
from plumbing.settings import Settings

RARELY = 20  # times its own duration: how long after a checkpoint the next unasked one may come
HASHES = {  # what a setting that is a hash stands for
    "train_data": "training pictures",
    "test_data": "test pictures",
    "initial_network": "initial weights",
}
NEEDED = {"settings", "facts", "history", "model", "seconds", "test_correct"}


class Run:
    """A run's folder while one process trains in it.

    folder: where it is; missing: the lengths, in epochs, that are still to be trained. Entering
    raises UserError when another process is in the folder, and when it holds another run or a
    damaged checkpoint.
    """

    def __init__(self, args: Namespace, settings: Settings):
        self.args, self.settings, self.folder = args, settings, args.out / settings.name
        self.missing = sorted(set(args.epochs))
        self.started, self.fill_seconds = args.started, 0.0
        self.checkpoint, self.history, self.parts = None, [], {}
        self.first = 1  # epoch of this process
        self.newest = self.rows = 0  # epochs in the newest checkpoint; rows of history.csv
        self.written, self.writing = time.monotonic(), 0.0  # when the last one was, how long

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            if ranks.rank() == 0:
                stack.enter_context(locked(self.args.out, self.settings.name))
                remove_leftovers(self.folder)
                check_writable(self.folder / "history.csv")
                self.look()
            self.missing, self.checkpoint = ranks.told((self.missing, self.checkpoint))
            self.held = stack.pop_all()
        return self

    def __exit__(self, error: type | None, *_) -> None:
        self.held.close()
        if error is None:
            ranks.leave()

    def look(self) -> None:
        """Find out what is there already, and what of it to go on from."""
        saved = {}
        for file in sorted(self.folder.glob("*.pt")):
            saved[file.name] = read_checkpoint(file)
            self.check_same(file, saved[file.name]["settings"])
        if not saved:
            if self.args.resume:
                self.say_nearest()
            return
        ends = {name: len(checkpoint["history"]) for name, checkpoint in saved.items()}
        last = max(ends, key=ends.get)  # epochN.pt before latest.pt, if both have come as far
        longest = saved[last]["history"]
        self.newest = self.rows = len(longest)
        write_history(self.folder, longest)  # in case it was killed just before that
        if last != "latest.pt":  # or before this
            (self.folder / "latest.pt").unlink(missing_ok=True)
        if not self.args.resume:
            print(f"again    from the start (--resume would go on after epoch {self.newest})")
            return
        self.missing = [n for n in self.missing if f"epoch{n}.pt" not in saved]
        usable = [name for name, end in ends.items() if self.missing and end < self.missing[0]]
        if usable:
            self.checkpoint = saved[max(usable, key=ends.get)]

    def say_nearest(self) -> None:
        """With --resume and nothing to go on from, a run that is nearly this one may be meant."""
        ours, nearest = self.settings, None
        for folder in self.args.out.glob(f"{glob.escape(ours.dataset)}-{ours.strategy}-*"):
            files = sorted(folder.glob("*.pt"))
            if files and f"-s{ours.seed}" in folder.name:
                theirs = {"ranks": 1} | read_checkpoint(files[-1])["settings"]
                differing = [name for name, value in asdict(ours).items() if theirs[name] != value]
                if not nearest or len(differing) < len(nearest[1]):
                    nearest = folder, differing
        if nearest:
            folder, differing = nearest
            what = f"{folder} differs in {', '.join(differing)}"
            print(f"begins   there is nothing to go on from; the nearest run, {what}")

    def check_same(self, file: Path, before: dict) -> None:
        """Raises UserError if the checkpoint in `file` is of a run with other settings."""
        before = {"ranks": 1} | before  # of a time when there was no other number
        for name, value in asdict(self.settings).items():
            if before.get(name) != value:
                differs = f"was trained with {name} {before.get(name)}, not {value}"
                if name in HASHES:
                    differs = f"was trained with other {HASHES[name]}"
                raise UserError(
                    f"{file} {differs}: go on as it began, use another --out, or delete "
                    f"{self.folder}"
                )

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Put back what a stopped run had reached, and remember what to keep of this one."""
        self.parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        if self.checkpoint:
            for name, part in self.parts.items():
                part.load_state_dict(self.checkpoint[name])
            self.history = list(self.checkpoint["history"])
            self.started -= self.checkpoint["seconds"]
            self.checkpoint = None  # its memory is needed
            print(f"resumed  after epoch {len(self.history)}")
        self.first = len(self.history) + 1
        terminal.print_header()

    def epochs(self) -> range:
        """The epochs to train, counted from 1."""
        return range(len(self.history) + 1, self.missing[-1] + 1)

    def keep(
        self,
        epoch: int,
        trained: tuple[float, float],
        tested: tuple[float, float],
        times: tuple[float, float],
        drift: dict[str, float],
        correct: torch.Tensor,
    ) -> None:
        """Keep an epoch, on the disk when it is time. trained, tested: loss and accuracy; times:
        seconds of all, and of training; correct: bool [test images]. Raises FloatingPointError
        for a loss that is not finite, which is not kept."""
        if not math.isfinite(trained[0] + tested[0]):
            kept = f"; {self.folder} keeps epoch {self.newest}" if self.newest else ""
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch} with --lr "
                f"{self.settings.learning_rates}: try lower rates{kept}"
            )
        row = {"epoch": epoch, "train_loss": trained[0], "train_accuracy": trained[1]}
        row |= {"test_loss": tested[0], "test_accuracy": tested[1]}
        row |= {"seconds": times[0], "train_seconds": times[1]}
        row |= {f"{stage}_drift": distance for stage, distance in drift.items()}
        self.history.append(row)
        if ranks.rank() == 0:
            self.save(epoch, correct.cpu())
        terminal.print_epoch(row, self.missing[-1])
        if epoch == self.first:
            terminal.print_time_left(row["seconds"] * (self.missing[-1] - epoch))
        if epoch in self.missing:
            seconds = time.monotonic() - self.started
            print(f"saved    {self.folder}/epoch{epoch}.pt, {seconds:.1f} s in all", flush=True)

    def save(self, epoch: int, correct: torch.Tensor) -> None:
        """epochN.pt for a length that was asked for; else latest.pt, but seldom enough that
        writing takes under a twentieth of the time; and history.csv. What has come further is
        not taken back."""
        due = time.monotonic() - self.written >= RARELY * self.writing
        if epoch in self.missing:
            self.write(f"epoch{epoch}.pt", correct)
            if epoch >= self.newest:
                (self.folder / "latest.pt").unlink(missing_ok=True)
        elif due and epoch > self.newest:
            self.write("latest.pt", correct)
        if epoch >= self.rows:
            write_history(self.folder, self.history)

    def write(self, name: str, correct: torch.Tensor) -> None:
        """One checkpoint: plain values and tensors, so that weights_only=True can read it."""
        start, file = time.monotonic(), io.BytesIO()
        content = {"settings": asdict(self.settings), "facts": self.facts()}
        content |= {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"history": self.history, "test_correct": correct}
        content["seconds"] = start - self.started
        torch.save(content, file)  # into memory: it says less than a sentence when a disk is full
        write_file(self.folder / name, file.getbuffer())
        self.newest = max(self.newest, len(self.history))
        self.written = time.monotonic()
        self.writing = self.written - start

    def facts(self) -> dict:
        """What does not tell runs apart: where things were, and what trained it."""
        args, model = self.args, self.parts["model"]
        device = next(model.parameters()).device
        learning = [p.numel() for p in model.parameters() if p.requires_grad]
        return {
            "dataset": args.dataset,
            "data_dir": str(args.data_dir),
            "weights": args.weights,
            "test_share": args.test_share,
            "picture_size": args.picture_size,
            "unfrozen": args.unfreeze,
            "train_images": args.train_images,
            "trainable_parameters": sum(learning),
            "device": device_name(device),
            "device_type": device.type,
            "fill_seconds": self.fill_seconds,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        }


def write_history(folder: Path, history: list[dict]) -> None:
    write_csv(folder / "history.csv", history[0], [row.values() for row in history])


def read_checkpoint(path: str | Path) -> dict:
    """What train.py saved, on the CPU. Raises UserError naming the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except Exception as error:  # torch.load meets a foreign file with many kinds of errors
        if memory_is_full(error):
            raise
        raise UserError(f"{path} is damaged, or no checkpoint of train.py") from error
    if isinstance(checkpoint, dict) and "arguments" in checkpoint:
        old = "was written by an earlier version, which kept a folder per length"
        raise UserError(f"{path} {old}: train it again to use it here")
    keys = list(map(str, checkpoint)) if isinstance(checkpoint, dict) else []
    if any(key.endswith("conv1.weight") for key in keys):
        what = "holds weights alone, no checkpoint of train.py"
        raise UserError(f"{path} {what}: start a run from it, with train.py --weights {path}")
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= NEEDED:
        raise UserError(f"{path} is no checkpoint of train.py")
    return checkpoint


def summary_row(path: str | Path, checkpoint: dict, loss: float, accuracy: float) -> dict:
    """A checkpoint's row of summary.csv: the run and its settings, its length, what came out.
    seconds, device and the versions are those of its training."""
    settings = Settings(**checkpoint["settings"])
    last, facts = checkpoint["history"][-1], checkpoint["facts"]
    row = {"run": Path(path).resolve().parent.name, "epochs": last["epoch"]} | settings.row()
    row |= {"train_images": facts["train_images"], "test_images": len(checkpoint["test_correct"])}
    row |= {"train_loss": last["train_loss"], "test_loss": loss, "test_accuracy": accuracy}
    row["trainable_parameters"] = facts["trainable_parameters"]
    row |= {"seconds": checkpoint["seconds"], "device": facts["device"], "torch": facts["torch"]}
    return row
