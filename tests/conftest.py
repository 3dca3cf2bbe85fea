"""Small runs of train.py inside the test's own process, and an HTTP server to download from."""

import plumbing  # noqa: F401  # before torch, for whose threads it sets something

# isort: split
import contextlib
import csv
import functools
import http.server
import itertools
import math
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import data
import features
import freeze
import train
from plumbing import cli, datasets, machine, pictures, settings
from plumbing import run as runs
from plumbing.cli import command

ROOT = Path(__file__).parent.parent
SMALL = ("--dataset", "synthetic", "--weights", "none", "--image-size", "48", "--train-size", "60")
SMALL += ("--batch-size", "25", "--epochs", "2", "--device", "cpu", "--precision", "fp32")
# Processes of their own start in this context, with train.py's imports made.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="how often a run is killed (default: 2)")
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def slow(*values):
    """A row of a parametrized test that runs with --slow alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def what_is_the_same_in_all_runs():
    """Is made once: the drawn pictures, 60 of 500 to test on, and the hashes of the recipe."""
    load = functools.cache(datasets.synthetic)

    def fewer(split: str) -> data.Images:
        if split == "train":
            return load(split)
        return data.stratified_subset(load(split), 60, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "synthetic", fewer)
        patch.setattr(settings, "recipe_code", functools.cache(settings.recipe_code))
        yield


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """What is said once is said anew, and no test is so slow that it prints how far it is."""
    pictures.say_once.cache_clear()
    monkeypatch.setattr(cli, "last_shown", math.inf)


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch, not now and then."""
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 0)
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)


@contextlib.contextmanager
def stopped_in_epoch(number: int) -> Iterator[None]:
    """The run inside is stopped by Ctrl-C when it has trained so many epochs, the last one of which
    is not kept."""
    calls, score = itertools.count(1), train.score_epoch

    def stopping(*arguments):
        if next(calls) == number:
            raise KeyboardInterrupt
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "score_epoch", stopping)
        yield


@pytest.fixture
def float64(monkeypatch):
    """Makes --precision fp32 compute in float64. Adam's first steps are little more than the sign
    of the gradient, so float32's rounding grows to 1e-4 of the loss in a few steps; float64's
    does not."""
    build = freeze.build

    def transform(pixels, size, dtype=None, flips=None):
        return data.transform(pixels, size, torch.float32, flips).double()

    monkeypatch.setattr(freeze, "build", lambda *args, **more: build(*args, **more).double())
    monkeypatch.setitem(machine.PRECISIONS, "fp32", torch.float64)
    monkeypatch.setattr(features, "transform", transform)


@pytest.fixture
def run(tmp_path):
    """run("--unfreeze", "layer4") trains a small run, later flags winning; gives its folder."""

    def run(*flags: str) -> Path:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        flags = [*SMALL, "--out", str(out), *flags]
        train.main(flags)
        out = Path(flags[len(flags) - flags[::-1].index("--out")])
        folders = [path for path in out.iterdir() if (path / "history.csv").exists()]
        return max(folders, key=lambda path: path.stat().st_mtime_ns)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of two lengths, never written to by the tests."""
    out = tmp_path_factory.mktemp("finished")
    asked = ["--unfreeze", "layer4", "--lr", "layer4=1e-3", "--epochs", "1", "2"]
    train.main([*SMALL, *asked, "--out", str(out)])
    (file,) = out.glob("*/history.csv")
    return file.parent


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def history(folder: Path, *columns: str) -> list[list[float]]:
    """The columns of a run's history.csv, an epoch per row."""
    return [[float(row[column]) for column in columns] for row in rows(folder / "history.csv")]


def complaint(main, flags, capsys, status: int = 2) -> str:
    """What a command prints on stderr when it refuses: one line."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        command(lambda: main(list(map(str, flags))), "stopped", "full")
    signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    assert stopped.value.code == status and "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    return line


def checkpoint(folder: Path, epochs: int = 2) -> dict:
    return torch.load(folder / f"epoch{epochs}.pt", weights_only=True)


@pytest.fixture
def server():
    """A local HTTP server: server.files["/name"] = bytes; those in server.cut stop half-way,
    those in server.silent do not answer; server.asked lists the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            body = self.server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            if self.path in self.server.silent:
                self.server.closing.wait(10)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path in self.server.cut:
                body = body[: len(body) // 2]
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cut, server.silent, server.asked = {}, set(), set(), []
        server.closing = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()
