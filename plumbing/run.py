"""A run's folder: its history, its checkpoints, and how to go on from one.

    with Run(args, settings, lengths, images, started) as run:
        run.restore({"model": model, "optimizer": optimizer, ...})
        for epoch in run.epochs():
            ...
            run.trained({"train_loss": 0.5, "train_accuracy": 0.8}, images)
            run.keep(epoch, scores, correct)

A run is its settings, and its length is not one of them: with constant rates ten epochs are the
beginning of fifty. So one folder holds history.csv, a row per epoch, an epochN.pt for each length
N that was asked for, and latest.pt, the newest state to go on from, while it is newer than those.
"""

import contextlib
import glob
import io
import math
import pickle
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import UserError
from plumbing import distributed, report
from plumbing.checkpoint import read_checkpoint
from plumbing.datasets import Splits
from plumbing.files import check_writable, locked, remove_leftovers, write_file, write_rows
from plumbing.machine import device_name
from plumbing.schedule import load_optimizer
from plumbing.settings import HASHES, Settings, changed_names, in_words

# Before the next checkpoint that was not asked for: seconds, and times its own writing.
CHECKPOINT_SECONDS, CHECKPOINT_INTERVAL = 60, 20


class Run:
    """A run's folder while one process trains in it.

    lengths: how many epochs were asked for; missing: those that are still to be trained; started:
    when the command was, monotonic. Entering raises UserError when another process is in the
    folder, and when it holds another run or a damaged checkpoint.
    """

    def __init__(
        self,
        args: Namespace,
        settings: Settings,
        lengths: list[int],
        images: Splits,
        started: float,
    ):
        self.args, self.settings, self.images = args, settings, images
        self.folder = args.out / settings.name
        self.lengths = self.missing = sorted(set(lengths))
        self.started, self.fill_seconds = started, 0.0
        self.checkpoint, self.history, self.parts, self.row = None, [], {}, {}
        self.newest = self.rows = 0  # epochs in the newest checkpoint; rows of history.csv
        self.named = 0  # epochs in the newest epochN.pt
        self.best = -math.inf  # accuracy on the validation pictures
        self.epoch_started = time.monotonic()
        self.written, self.write_seconds = -math.inf, 0.0  # when the last checkpoint was, how long
        self.correct, self.scores = None, {}  # of the last epoch
        self.ended_early, self.readable, self.outdated = False, False, []

    @property
    def last_epoch(self) -> int:
        return self.missing[-1]

    # ------------------------------------------------------------ what is there already

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            if distributed.rank() == 0:
                stack.enter_context(locked(self.args.out, self.settings.name))
                remove_leftovers(self.folder)
                check_writable(self.folder / "history.csv")
                self.look()
            self.missing, self.checkpoint = distributed.broadcast((self.missing, self.checkpoint))
            self.held = stack.pop_all()
        return self

    def __exit__(self, error: type | None, *_) -> None:
        with self.held:
            if error is None and distributed.rank() == 0:
                self.end_early()
            if error is None and self.lengths[-1] == max(self.args.epochs):
                distributed.destroy()  # this was the last run

    def end_early(self) -> None:
        """If the loop was left before the last epoch, what it came to is a length like others."""
        if self.row:
            print("warning: the last epoch is lost: leave the loop after run.keep, not before")
        elif len(self.history) > self.named:
            self.ended_early = True
            self.write(f"epoch{len(self.history)}.pt")
            if len(self.history) >= self.newest:
                (self.folder / "latest.pt").unlink(missing_ok=True)
            print(f"saved    {self.folder}/epoch{len(self.history)}.pt, where the loop ended")

    def look(self) -> None:
        """Find out what is there already, and what of it to go on from. Raises UserError."""
        # Every checkpoint in the folder must be of this very run: of its settings, its pictures and
        # its weights. What other code has trained is another run too.
        saved = {file.name: read_checkpoint(file) for file in sorted(self.folder.glob("*.pt"))}
        changed = set()
        for name, checkpoint in saved.items():
            self.check_settings(self.folder / name, checkpoint["settings"])
            changed |= set(changed_names(checkpoint["settings"]["code"], self.settings.code))
        if changed and self.args.resume:
            raise UserError(
                f"{self.folder} was trained with another {in_words(changed)}: give this variation "
                f"a name, --tag NAME, use another --out, or leave out --resume to begin anew"
            )
        if changed:  # a run of other code that is begun anew takes the old one's place, all of it
            print(f"replaces {self.folder}, trained with another {in_words(changed)}")
            for pattern in ("epoch*", "latest.pt", "best*", "history.csv"):
                self.outdated += self.folder.glob(pattern)  # which go when the first epoch is kept
        elif saved:
            self.choose_checkpoint(saved)
        elif self.args.resume:
            self.print_nearest()

    def choose_checkpoint(self, saved: dict[str, dict]) -> None:
        """Of this run's own checkpoints, by file name, the one to go on from."""
        # history.csv is written after a checkpoint, and a checkpoint of a length that was asked for
        # takes the place of latest.pt. A run may have been killed before it did either.
        epochs = {name: len(saved[name]["history"]) for name in saved if name != "best.pt"}
        if not epochs:  # killed in its first epoch
            return
        last = max(epochs, key=epochs.get)  # epochN.pt before latest.pt, if both are as long
        self.newest = self.rows = epochs[last]
        write_history(self.folder, saved[last]["history"])
        if last != "latest.pt":
            (self.folder / "latest.pt").unlink(missing_ok=True)
        if "best.pt" in saved:
            self.best = saved["best.pt"]["history"][-1]["val_accuracy"]
        if not self.args.resume:
            print(f"again    from the start (--resume would go on after epoch {self.newest})")
            return
        # Go on from the longest one that is shorter than the first length that is missing.
        self.missing = [length for length in self.lengths if f"epoch{length}.pt" not in saved]
        if early := [epochs[name] for name in epochs if saved[name]["ended_early"]]:
            self.missing = [length for length in self.missing if length < max(early)]
        usable = [name for name in epochs if self.missing and epochs[name] < self.missing[0]]
        if usable:
            self.checkpoint = saved[max(usable, key=epochs.get)]

    def check_settings(self, file: Path, before: dict) -> None:
        """Raises UserError if the checkpoint in `file` is of a run with other settings."""
        for name, value in asdict(self.settings).items():
            if name != "code" and before.get(name) != value:
                differs = f"was trained with {name} {before.get(name)}, not {value}"
                if name in HASHES:
                    differs = f"was trained with other {HASHES[name]}"
                raise UserError(
                    f"{file} {differs}: go on as it began, use another --out, or delete "
                    f"{self.folder}"
                )

    def print_nearest(self) -> None:
        """With --resume and nothing to go on from, a run that is nearly this one may be meant."""
        ours, nearest = asdict(self.settings), None
        beginning = "-".join(filter(None, (ours["dataset"], ours["strategy"], ours["tag"])))
        for folder in self.args.out.glob(f"{glob.escape(beginning)}-*"):
            files = sorted(folder.glob("epoch*.pt"))
            theirs = {}
            with contextlib.suppress(UserError):  # another run's trouble is not this one's
                theirs = read_checkpoint(files[-1])["settings"] if files else {}
            differing = [name for name in ours if name != "code" and theirs.get(name) != ours[name]]
            alike = all(theirs.get(name) == ours[name] for name in ("strategy", "tag", "seed"))
            if alike and (not nearest or len(differing) < len(nearest[1])):
                nearest = folder, differing
        if nearest:
            folder, differing = nearest
            what = f"{folder} differs in {', '.join(differing)}"
            print(f"begins   there is nothing to go on from; the nearest run, {what}")

    # ------------------------------------------------------------ epochs

    def restore(self, parts: dict) -> None:
        """Put back what a stopped run had reached, and remember what to keep of this one. parts:
        model, optimizer, scaler and schedule, by these names."""
        self.parts = parts
        if self.checkpoint:
            saved = self.checkpoint
            load_optimizer(parts["optimizer"], saved["optimizer"])
            for name in parts.keys() - {"optimizer"}:
                parts[name].load_state_dict(saved[name])
            self.history = list(saved["history"])
            self.named = len(self.history)
            self.started -= saved["seconds"]
            self.checkpoint = None  # its memory is needed
            print(f"resumed  after epoch {len(self.history)}")
        self.first = len(self.history) + 1
        report.print_header("val" if self.settings.val_data else "test")

    def epochs(self) -> Iterator[int]:
        """The epochs to train, counted from 1."""
        for epoch in range(self.first, self.last_epoch + 1):
            self.epoch_started = time.monotonic()
            yield epoch

    def trained(self, tail: nn.Module, numbers: dict[str, float], images: int) -> None:
        """An epoch's training is over, on so many images of this process. Raises UserError where
        something was meant to learn and could not."""
        check_all_learn(tail, self.parts["model"], self.parts["optimizer"])
        self.row = distributed.all_reduce_mean(numbers, images)
        self.train_seconds = time.monotonic() - self.epoch_started

    def keep(self, epoch: int, scores: dict[str, float], correct: dict[str, torch.Tensor]) -> None:
        """Keep an epoch, on the disk when it is time. scores: test_loss, test_accuracy, ..., and
        val_ ones; correct: by split, which images were right, bool [images]. Raises
        FloatingPointError for a loss that is not finite, which is not kept."""
        losses = {name: value for name, value in (self.row | scores).items() if "loss" in name}
        self.check_finite(epoch, losses)
        if "val" in correct:  # the test is for later, when all is chosen
            shown = {name: scores[name] for name in scores if name.startswith("val_")}
        else:
            shown = scores
        row = {"epoch": epoch} | self.row | shown
        row["seconds"] = time.monotonic() - self.epoch_started
        row["train_seconds"], self.row = self.train_seconds, {}
        self.history.append(row | self.parts["schedule"].after_epoch())
        self.scores, self.correct = scores, {name: value.cpu() for name, value in correct.items()}
        if distributed.rank() == 0:
            self.save(epoch)
        report.print_epoch(row, self.last_epoch)
        if epoch == self.first:
            report.print_time_left(row["seconds"] * (self.last_epoch - epoch))
        if epoch in self.missing:
            seconds = time.monotonic() - self.started
            print(f"saved    {self.folder}/epoch{epoch}.pt, {seconds:.1f} s in all", flush=True)

    def check_finite(self, epoch: int, numbers: dict[str, float]) -> None:
        if not math.isfinite(sum(numbers.values())):
            kept = f"; {self.folder} keeps epoch {self.newest}" if self.newest else ""
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch} with --lr "
                f"{self.settings.learning_rates}: try lower rates{kept}"
            )

    def save(self, epoch: int) -> None:
        """epochN.pt for a length that was asked for; else latest.pt, once a minute at most, and
        seldom enough that writing takes under a twentieth of the time; best.pt for the best epoch
        on val; and history.csv. What has come further is not taken back."""
        interval = max(CHECKPOINT_SECONDS, CHECKPOINT_INTERVAL * self.write_seconds)
        due = time.monotonic() - self.written >= interval
        for file in self.outdated:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        self.outdated = []
        if self.scores.get("val_accuracy", -math.inf) > self.best:
            self.best = self.scores["val_accuracy"]
            self.write("best.pt")
        if epoch in self.missing:
            self.write(f"epoch{epoch}.pt")
            self.named = epoch
            if epoch >= self.newest:
                (self.folder / "latest.pt").unlink(missing_ok=True)
        elif due and epoch > self.newest:
            self.write("latest.pt")
        if epoch >= self.rows:
            write_history(self.folder, self.history)

    def write(self, file_name: str) -> None:
        """One checkpoint: plain values and tensors, so that weights_only=True can read it."""
        start, file = time.monotonic(), io.BytesIO()
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"settings": asdict(self.settings), "metadata": self.metadata()}
        content |= {"history": self.history, "scores": self.scores}
        content |= {f"{split}_correct": correct for split, correct in self.correct.items()}
        content |= {"seconds": start - self.started, "ended_early": self.ended_early}
        torch.save(plain(content), file)  # into memory: torch's error of a full disk names no cause
        if not self.readable:
            check_readable(file)
            self.readable = True
        write_file(self.folder / file_name, file.getbuffer())
        if file_name != "best.pt":
            self.newest = max(self.newest, len(self.history))
            self.written = time.monotonic()
            self.write_seconds = self.written - start

    def metadata(self) -> dict:
        """What does not tell runs apart: where things were, and what trained it."""
        args, parameters = self.args, list(self.parts["model"].parameters())
        device = parameters[0].device
        return {
            "dataset": args.dataset,
            "data_dir": str(args.data_dir),
            "weights": args.weights,
            "test_share": args.test_share,
            "picture_size": self.images.picture_size,
            "train_images": self.images.train_images,
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "device": device_name(device),
            "device_type": device.type,
            "fill_seconds": self.fill_seconds,
            "torch": str(torch.__version__),
            "torchvision": version("torchvision"),
        }


def write_history(folder: Path, history: list[dict]) -> None:
    write_rows(folder / "history.csv", history)


def check_all_learn(tail: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError for parameters that should learn, and that no optimizer moves."""
    moved = set()
    for group in optimizer.param_groups:
        moved |= set(map(id, group["params"]))
    for name, parameter in (*model.named_parameters(), *tail.named_parameters()):
        if parameter.requires_grad and id(parameter) not in moved:
            raise UserError(
                f"{name} has requires_grad and is not in the optimizer: name its stage in "
                "--unfreeze, or add it to the optimizer's groups"
            )


def plain(value: object) -> object:
    """Without NumPy's numbers, which torch.load does not read with weights_only=True."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(inside) for name, inside in value.items()}
    return value


def check_readable(file: io.BytesIO) -> None:
    """Raises UserError for a checkpoint that nobody could read, before hours of training."""
    try:
        torch.load(io.BytesIO(file.getbuffer()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"a checkpoint takes tensors and plain values alone: {reason}") from error
