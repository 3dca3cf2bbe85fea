"""A run's folder: its history, its checkpoints, and how to go on from one.

A run is its settings. With constant rates its length is not one of them: ten epochs are the
beginning of fifty. So one folder holds history.csv, a row per epoch, an epochN.pt for each length
N that was asked for, and latest.pt, the newest state to go on from, while it is newer than those.
"""

import math
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version

import torch
from torch import nn

from data import UserError
from plumbing import distributed, report
from plumbing.distributed import Splits
from plumbing.files import locked, writable, write_rows, write_tensors
from plumbing.machine import device_name
from plumbing.settings import Settings, changed_names, in_words
from plumbing.weights import load_optimizer, read_checkpoint

# Before the next checkpoint that was not asked for: seconds, and times its own writing.
CHECKPOINT_SECONDS, CHECKPOINT_INTERVAL = 60, 20
# How settings that are hashes are called.
OTHERS = {"train_data": "other train pictures", "test_data": "other test pictures"}
OTHERS |= {"val_data": "other val pictures, or none", "initial_network": "other initial weights"}


class Run:
    """A run's folder while one process trains in it. lengths: the epochs asked for, in order;
    start: when the command was started, monotonic. Entering raises UserError when another process
    is in the folder, and when it holds another run or a damaged checkpoint."""

    def __init__(
        self, args: Namespace, settings: Settings, lengths: list[int], images: Splits, start: float
    ):
        self.args, self.settings, self.images, self.started = args, settings, images, start
        self.folder = args.out / settings.name
        self.lengths = self.missing = lengths  # missing: those that are still to be trained
        self.checkpoint, self.outdated = None, []  # to go on from; files that are to be replaced
        self.newest, self.best = 0, -math.inf  # epochs of the newest checkpoint; val_accuracy
        self.written, self.write_seconds = -math.inf, 0.0  # when the last checkpoint was, how long
        self.parts, self.history, self.fill_seconds, self.ended_early = {}, [], 0.0, False
        self.row, self.scores, self.correct = {}, {}, {}  # of the last epoch

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            if distributed.rank() == 0:
                stack.enter_context(locked(self.args.out, self.settings.name))
                for part in self.folder.glob(".*.part"):  # what killed processes were writing
                    part.unlink(missing_ok=True)
                writable(self.folder / "history.csv")
                self.look()
            self.missing, self.checkpoint = distributed.broadcast((self.missing, self.checkpoint))
            self.last_epoch = max(self.missing, default=0)
            self.held = stack.pop_all()
        return self

    def __exit__(self, error: type | None, *_) -> None:
        with self.held:
            if error is None and distributed.rank() == 0:
                self.keep_early_end()
            if error is None and self.lengths[-1] == max(self.args.epochs):
                distributed.destroy()  # this was the last run

    def keep_early_end(self) -> None:
        """If the loop was left before the last epoch, what it came to is a length like others."""
        epochs = len(self.history)
        if self.row:
            print("warning: the last epoch is lost: leave the loop after run.keep, not before")
        elif self.correct and epochs not in self.missing:
            self.ended_early, self.missing = True, [epochs]
            self.save(epochs)
            print(f"saved    {self.folder}/epoch{epochs}.pt, where the loop ended")

    def look(self) -> None:
        """Find out what is in the folder, and what of it to go on from. Raises UserError."""
        # The folder's name does not tell pictures and initial weights apart, so a checkpoint here
        # may be of another run. That one is neither continued nor replaced.
        saved = {file.name: read_checkpoint(file) for file in sorted(self.folder.glob("*.pt"))}
        changed = set()
        for name, checkpoint in saved.items():
            for setting, value in asdict(self.settings).items():
                before = checkpoint["settings"].get(setting)
                if setting == "code":
                    changed |= changed_names(before, value)
                elif before != value:
                    other = OTHERS.get(setting, f"{setting} {before}, not {value}")
                    wrong = f"{self.folder / name} was trained with {other}"
                    choice = f"go on as it began, use another --out, or delete {self.folder}"
                    raise UserError(f"{wrong}: {choice}")
        # A run of an edited recipe is another run, too. To go on would mix the two. To begin anew
        # replaces the old one, but only when an epoch is kept: a mistyped idea costs nothing.
        if changed:
            other = f"trained with another {in_words(changed)}"
            if self.args.resume:
                choice = "give this variation a name, --tag NAME, use another --out, or leave out"
                raise UserError(f"{self.folder} was {other}: {choice} --resume to replace it")
            print(f"replaces {self.folder}, {other}")
            for pattern in ("epoch*", "latest.pt", "best*", "history.csv"):
                self.outdated += self.folder.glob(pattern)
        elif saved.keys() - {"best.pt"}:
            self.choose_checkpoint(saved)
        elif self.args.resume:
            print(f"begins   {self.folder}: there is nothing to go on from")

    def choose_checkpoint(self, saved: dict[str, dict]) -> None:
        """Of this run's own checkpoints, by file name, the one to go on from."""
        # A run may have been killed between two files: before it wrote history.csv, or before it
        # removed the latest.pt whose place an epochN.pt has taken.
        epochs = {name: len(saved[name]["history"]) for name in saved if name != "best.pt"}
        last = max(epochs, key=epochs.get)  # epochN.pt before latest.pt, if both are as long
        self.newest = epochs[last]
        write_rows(self.folder / "history.csv", saved[last]["history"])
        if last != "latest.pt":
            (self.folder / "latest.pt").unlink(missing_ok=True)
        # A run that begins again from the start keeps what a longer one has left.
        if "best.pt" in saved:
            self.best = saved["best.pt"]["history"][-1]["val_accuracy"]
        if not self.args.resume:
            print(f"again    from the start (--resume would go on after epoch {self.newest})")
            return
        # Train the lengths that have no file, but none after the end of a loop that was left early.
        # Go on from the longest state that is shorter than the first of them.
        ends = [epochs[name] for name in epochs if saved[name]["ended_early"]]
        end = max(ends, default=math.inf)
        self.missing = [n for n in self.lengths if f"epoch{n}.pt" not in saved and n < end]
        if usable := [name for name in epochs if epochs[name] < min(self.missing, default=0)]:
            self.checkpoint = saved[max(usable, key=epochs.get)]

    def restore(self, parts: dict) -> None:
        """Put back what a stopped run had reached, and remember what to keep of this one. parts:
        model, optimizer, scaler and schedule, by these names."""
        self.parts, saved = parts, self.checkpoint
        if saved:
            load_optimizer(parts["optimizer"], saved["optimizer"])
            for name in parts.keys() - {"optimizer"}:
                parts[name].load_state_dict(saved[name])
            self.history = saved["history"]
            self.started -= saved["seconds"]
            self.checkpoint = None  # its memory is needed
            print(f"resumed  after epoch {len(self.history)}")

    def epochs(self) -> Iterator[int]:
        """The epochs to train, counted from 1."""
        self.first = len(self.history) + 1
        for epoch in range(self.first, self.last_epoch + 1):
            self.epoch_started = time.monotonic()
            yield epoch

    def trained(self, tail: nn.Module, numbers: dict[str, float], images: int) -> None:
        """An epoch's training is over, on so many images of this process. Raises UserError for
        parameters that should learn, and that the optimizer does not have."""
        groups = self.parts["optimizer"].param_groups
        moved = {id(parameter) for group in groups for parameter in group["params"]}
        for name, parameter in (*self.parts["model"].named_parameters(), *tail.named_parameters()):
            if parameter.requires_grad and id(parameter) not in moved:
                instead = "name its stage in --unfreeze, or add it to the optimizer's groups"
                raise UserError(f"{name} has requires_grad and is not in the optimizer: {instead}")
        self.row = distributed.all_reduce_mean(numbers, images)
        self.train_seconds = time.monotonic() - self.epoch_started

    def keep(self, epoch: int, scores: dict[str, float], correct: dict[str, torch.Tensor]) -> None:
        """Keep an epoch, on the disk when it is time. scores: test_loss, test_accuracy, ..., and
        val_ ones; correct: by split, which images were right, bool [images]. Raises
        FloatingPointError for a loss that is not finite, which is not kept."""
        losses = [value for name, value in (self.row | scores).items() if "loss" in name]
        if not math.isfinite(sum(losses)):
            kept = f"; {self.folder} keeps epoch {self.newest}" if self.newest else ""
            rates = f"with --lr {self.settings.learning_rates}: try lower rates"
            raise FloatingPointError(f"the loss is not finite in epoch {epoch} {rates}{kept}")
        shown = scores
        if "val" in correct:  # the test is for later, when all is chosen
            shown = {name: scores[name] for name in scores if name.startswith("val_")}
        row = {"epoch": epoch} | self.row | shown
        row["seconds"] = time.monotonic() - self.epoch_started
        row["train_seconds"] = self.train_seconds
        self.history.append(row | self.parts["schedule"].after_epoch())
        self.scores, self.correct = scores, {name: value.cpu() for name, value in correct.items()}
        self.row = {}
        if distributed.rank() == 0:
            self.save(epoch)
        report.print_epoch(row, self.last_epoch, header=epoch == self.first)
        if epoch == self.first:
            report.print_time_left(row["seconds"] * (self.last_epoch - epoch))
        if epoch in self.missing:
            seconds = time.monotonic() - self.started
            print(f"saved    {self.folder}/epoch{epoch}.pt, {seconds:.1f} s in all", flush=True)

    def save(self, epoch: int) -> None:
        """epochN.pt for a length that was asked for; else latest.pt, once a minute at most, and so
        that writing takes under a twentieth of the time; best.pt for the best epoch on val; and
        history.csv. What a longer run left stays."""
        interval = max(CHECKPOINT_SECONDS, CHECKPOINT_INTERVAL * self.write_seconds)
        due = time.monotonic() - self.written >= interval
        while self.outdated:
            file = self.outdated.pop()
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        if self.scores.get("val_accuracy", -math.inf) > self.best:
            self.best = self.scores["val_accuracy"]
            self.write("best.pt")
        if epoch in self.missing:
            self.write(f"epoch{epoch}.pt")
            if epoch >= self.newest:
                (self.folder / "latest.pt").unlink(missing_ok=True)
        elif due and epoch > self.newest:
            self.write("latest.pt")
        if epoch >= self.newest:
            write_rows(self.folder / "history.csv", self.history)

    def write(self, file_name: str) -> None:
        """One checkpoint."""
        start = time.monotonic()
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"settings": asdict(self.settings), "metadata": self.metadata()}
        content |= {"history": self.history, "scores": self.scores}
        content |= {f"{split}_correct": correct for split, correct in self.correct.items()}
        content |= {"seconds": start - self.started, "ended_early": self.ended_early}
        write_tensors(self.folder / file_name, content)
        if file_name != "best.pt":
            self.newest = max(self.newest, len(self.history))
            self.written = time.monotonic()
            self.write_seconds = self.written - start

    def metadata(self) -> dict:
        """Recorded beside the settings: two runs that differ here alone are the same run."""
        asked, parameters = vars(self.args), list(self.parts["model"].parameters())
        device = parameters[0].device
        return {
            **{name: asked[name] for name in ("dataset", "weights", "test_share")},
            "data_dir": str(asked["data_dir"]),
            "picture_size": self.images.picture_size,
            "train_images": self.images.train_images,
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "device": device_name(device),
            "device_type": device.type,
            "fill_seconds": self.fill_seconds,
            "torch": str(torch.__version__),
            "torchvision": version("torchvision"),
        }
