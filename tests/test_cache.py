"""Where the features are kept, and what is found there later."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import history

import freeze
from data import UserError
from features import Features
from plumbing import cache, drawn, files, machine
from plumbing.cache import ROOM, choose, fill_all

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = Path("features")
GB = 10**9
LITTLE = ("--unfreeze", "layer4", "--image-size", "33", "--train-size", "24", "--epochs", "1")
LITTLE += ("--batch-size", "12")


@pytest.fixture
def images():
    return drawn.synthetic("test").pixels[:20]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.features"))


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


# ---------------------------------------------------------------- on disk


@functools.cache
def network(seed: int) -> torch.nn.Module:
    return freeze.build("resnet18", 10, seed=seed)


def features_of(images, seed=0, size=48, dtype=torch.float32, mirrored=True) -> Features:
    prefix, _ = freeze.split(network(seed), "layer4")
    return Features(prefix, images, size, CPU, dtype, mirrored)


def on_disk(images, folder: Path, **other) -> tuple[Features, int]:
    """Features kept in `folder`, and how many were computed."""
    inputs = features_of(images, **other)
    (kept,), _, computed = fill_all([inputs], {"disk": [len(inputs)]}, CPU, folder)
    return kept, computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_disk_is_found_again_and_is_what_was_computed(images, tmp_path, dtype):
    first, computed = on_disk(images, tmp_path / "features", dtype=dtype)
    (file,) = stored(tmp_path / "features")
    assert computed == 40 and file.stat().st_size == first.bytes
    again, computed = on_disk(images, tmp_path / "features", dtype=dtype)
    assert computed == 0 and torch.equal(again.store, first.store)
    again.fill(CPU)
    assert torch.equal(again.store, first.store)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"size": 64}, {"dtype": torch.bfloat16}, {"mirrored": False}]
)
def test_what_is_on_disk_is_not_found_by_who_needs_something_else(images, tmp_path, other):
    on_disk(images, tmp_path)
    assert on_disk(images, tmp_path, **other)[1] > 0 and len(stored(tmp_path)) == 2
    assert on_disk(255 - images, tmp_path)[1] > 0 and len(stored(tmp_path)) == 3


DAMAGE = {
    "cut": lambda content: content[:-4],
    "zeros": lambda content: bytes(len(content)),
    "not numbers": lambda content: b"\xff" * len(content),
    "backwards": lambda content: content[::-1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again(images, tmp_path, damage):
    first, _ = on_disk(images, tmp_path)
    expected = first.store.clone()
    (file,) = stored(tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    again, computed = on_disk(images, tmp_path)
    assert computed == 40 and torch.equal(again.store, expected)
    assert stored(tmp_path) == [file] and not parts(tmp_path)


def test_what_killed_fills_left_is_removed_and_what_is_being_written_is_not(images, tmp_path):
    """Before the room is measured, which it takes."""
    left = tmp_path / ".1234.features.99.part"
    left.write_bytes(bytes(10**6))
    with (
        files.locked(tmp_path, "5678.features"),
        files.whole_file(tmp_path / "5678.features") as part,
    ):
        part.write_bytes(bytes(10))
        choose("disk", [features_of(images)], CPU, tmp_path)
        assert not left.exists() and part.exists()


def test_a_fill_that_is_interrupted_leaves_no_file(images, tmp_path, monkeypatch):
    def blocks(*_):
        yield torch.zeros(16, 3, 3, 256)
        raise ZeroDivisionError

    monkeypatch.setattr(Features, "blocks", blocks)
    with pytest.raises(ZeroDivisionError):
        on_disk(images, tmp_path)
    assert not stored(tmp_path) and not parts(tmp_path)


def test_a_disk_that_cannot_be_written_to_is_named(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        on_disk(images, tmp_path / "file")


def test_a_run_with_the_cache_on_disk_is_the_run_without_and_says_what_it_reuses(run, capsys):
    plain, first = run(*LITTLE), run(*LITTLE, "--cache", "disk")
    whose = f"kept for later runs; to delete: rm -r {first.parent}/features"
    assert whose in capsys.readouterr().out
    second = run(*LITTLE, "--cache", "disk", "--lr", "fc=0.1", "--out", str(first.parent))
    out = capsys.readouterr().out
    assert "computed by an earlier run" in out and "filled in" not in out
    losses = "train_loss", "test_loss"
    assert history(plain, *losses) == history(first, *losses) != history(second, *losses)


# ---------------------------------------------------------------- where it goes


class Need(list):
    """Features of so many images, of which each takes so many bytes."""

    def __init__(self, images: int, each: int, stages: int = 4):
        super().__init__([None] * images)
        self.bytes, self.prefix, self.image_size = images * each, [None] * stages, 224


MB = 10**6
NEEDED = [Need(8_000, MB), Need(2_000, MB)]  # 10 GB, a fifth of it of the test


def free(monkeypatch, **amounts) -> None:
    """So much is free, in bytes by place."""
    monkeypatch.setattr(cache, "free_memory", lambda place, *_: amounts[place])


@pytest.mark.parametrize(
    "device, host, wanted, shares",
    [
        (80 * GB, 100 * GB, "auto", {"device": [8000, 2000]}),
        (10 * GB + ROOM, 0, "auto", {"device": [8000, 2000]}),
        (10 * GB + ROOM - 1, 100 * GB, "auto", {"device": [7999, 2000], "host": [1, 0]}),
        (ROOM, 100 * GB, "auto", {"host": [8000, 2000]}),
        (
            3 * GB + ROOM,
            4 * GB + ROOM,
            "auto",
            {"device": [1000, 2000], "host": [4000, 0], "off": [3000, 0]},
        ),
        (
            GB + ROOM,
            2 * GB + ROOM,
            "auto",
            {"device": [0, 1000], "host": [1000, 1000], "off": [7000, 0]},
        ),
        (4 * GB + ROOM, 0, "auto", {"device": [2000, 2000], "off": [6000, 0]}),
        (0, ROOM, "auto", {"off": [8000, 2000]}),
        (80 * GB, 100 * GB, "host", {"host": [8000, 2000]}),
        (80 * GB, 100 * GB, "off", {"off": [8000, 2000]}),
    ],
)
def test_where_the_cache_goes(monkeypatch, device, host, wanted, shares):
    free(monkeypatch, device=device, host=host)
    chosen, why = choose(wanted, NEEDED, CUDA, HERE)
    assert chosen == shares and "10.00 GB of features" in why
    assert ("of 10,000 images" in why) == (len(shares) > 1)
    for place, counts in shares.items():
        words = "off" if place == "off" and len(shares) == 1 else cache.WORDS[place]
        assert words in why
        if len(shares) > 1:
            assert f"{sum(counts):,} {words}" in why


def test_how_a_split_is_said(monkeypatch):
    free(monkeypatch, device=3 * GB + ROOM, host=4 * GB + ROOM)
    assert choose("auto", NEEDED, CUDA, HERE)[1] == (
        "10.00 GB of features, of 10,000 images 3,000 in device memory, 4,000 in host memory, "
        "3,000 computed in every epoch (--cache disk takes a file)"
    )


@pytest.mark.parametrize("wanted", ["device", "host"])
def test_a_place_that_was_asked_for_and_is_too_small(monkeypatch, wanted):
    free(monkeypatch, device=3 * GB, host=3 * GB)
    says = f"--cache {wanted}: 10.00 GB of features .*3.0 GB free in {wanted} memory.*--train-size"
    with pytest.raises(UserError, match=says):
        choose(wanted, NEEDED, CUDA, HERE)


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_what_has_no_memory_of_its_own_uses_the_host_s(monkeypatch, device):
    free(monkeypatch, host=80 * GB)
    assert choose("auto", NEEDED, device, HERE)[0] == {"host": [8000, 2000]}


def test_without_a_prefix_there_is_nothing_to_keep(monkeypatch):
    free(monkeypatch, host=80 * GB)
    assert choose("auto", [Need(9, GB, stages=0)], CPU, HERE)[0] == {"off": [9]}


def test_where_nobody_knows_what_is_free_it_is_tried_and_said(monkeypatch):
    free(monkeypatch, host=None)
    shares, why = choose("auto", NEEDED, CPU, HERE)
    assert shares == {"host": [8000, 2000]} and "not known" in why


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(
    images, monkeypatch, tmp_path
):
    inputs, _ = on_disk(images, tmp_path / "there")
    new = tmp_path / "not/yet"
    usage = SimpleNamespace(free=ROOM // 8)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    says = f"--cache disk: .* and 0.3 GB to spare do not fit .*0.3 GB free in {new}"
    with pytest.raises(UserError, match=says):
        choose("disk", [inputs], CPU, new)
    assert not (tmp_path / "not").exists()
    usage.free = 0
    assert choose("disk", [inputs], CPU, tmp_path / "there")[0] == {
        "disk": [20]
    }  # it is there already


# ---------------------------------------------------------------- a split


SPLITS = {
    "device and host": {"device": [7, 5], "host": [13, 15]},
    "device and nothing": {"device": [7, 20], "off": [13, 0]},
    "host and nothing": {"host": [19, 0], "off": [1, 20]},
    "all three": {"device": [6, 20], "host": [6, 0], "off": [8, 0]},
}


@pytest.mark.parametrize("shares", SPLITS.values(), ids=SPLITS)
def test_a_split_gives_what_one_piece_gives(images, shares):
    plain = [features_of(images), features_of(images, mirrored=False)]
    split = [features_of(images), features_of(images, mirrored=False)]
    (inputs, test_inputs), _, computed = fill_all(split, shares, CPU, HERE)
    kept = sum(2 * train + test for place, (train, test) in shares.items() if place != "off")
    assert computed == kept and len(inputs) == len(test_inputs) == 20
    order, flips = torch.randperm(20), torch.rand(20) < 0.5
    for found, expected in zip(inputs.batches(6, order, flips), plain[0].batches(6, order, flips)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(test_inputs.batches(6), plain[1].batches(6)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(inputs.batches(6, order), plain[0].batches(6, order)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_split_computes_nothing_that_is_kept(images, monkeypatch):
    shares = {"host": [8, 20], "off": [12, 0]}
    (inputs, test_inputs), *_ = fill_all(
        [features_of(images), features_of(images)], shares, CPU, HERE
    )
    asked, compute = [], Features.compute

    def noted(self, rows):
        asked.extend(((rows % len(self)) + 20 - len(self)).tolist())
        return compute(self, rows)

    monkeypatch.setattr(Features, "compute", noted)
    list(inputs.batches(6, torch.randperm(20), torch.rand(20) < 0.5))
    list(test_inputs.batches(6))
    assert sorted(asked) == list(range(8, 20))


def test_a_run_with_a_split_cache_is_the_run_without(run, monkeypatch, capsys):
    losses = "train_loss", "test_loss"
    expected = history(run(*LITTLE), *losses)
    monkeypatch.setattr(cache, "free_memory", lambda *_: ROOM + 2**19)
    found = history(run(*LITTLE), *losses)
    assert "computed in every epoch" in capsys.readouterr().out
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.02)


# ---------------------------------------------------------------- what does not fit after all


class Full:
    """Features that no memory holds: the device says so, and then the host."""

    bytes, prefix, image_size = 10, [None], 224

    def __len__(self) -> int:
        return 1

    def __init__(self):
        self.tried, self.store = [], None

    def fill(self, device: torch.device, report=None) -> None:
        self.tried.append(device.type)
        self.store = torch.empty(1)
        if device.type == "cuda":
            raise torch.OutOfMemoryError
        torch.empty(2**60)  # what the CPU's allocator raises is a plain RuntimeError


def test_from_the_device_to_the_host_to_nowhere(monkeypatch, capsys):
    free(monkeypatch, device=2**40, host=2**40)
    features = Full()
    assert fill_all([features], {"device": [1]}, CUDA, HERE) == ([features], {"off": [1]}, 0)
    assert features.tried == ["cuda", "cpu"] and features.store is None
    first, second = capsys.readouterr().out.splitlines()
    assert "in device memory after all" in first and "features in host memory" in first
    assert "in host memory after all: off" in second


def test_a_full_memory_while_a_file_is_filled_goes_elsewhere_and_is_said(
    images, monkeypatch, capsys
):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(cache, "fill_file", full)
    inputs, seconds = cache.keep([features_of(images)], "disk", CPU, HERE)
    out = capsys.readouterr().out
    assert "does not fit in features after all" in out and "kept for later runs" not in out
    assert len(inputs.store) == 40


def test_larger_pictures_and_batches_leave_more_room_for_training(monkeypatch):
    free(monkeypatch, host=10 * GB + ROOM)
    large = Need(10_000, MB)
    large.image_size = 448
    (kept,), (rest,) = choose("auto", [large], CPU, HERE)[0].values()
    assert rest == -(-3 * ROOM // MB) and kept + rest == 10_000
    small = Need(10_000, MB)
    small.image_size = 224
    (kept,), (rest,) = choose("auto", [small], CPU, HERE, batch_size=512)[0].values()
    assert rest == -(-3 * ROOM // MB) and kept + rest == 10_000


def test_another_error_is_not_taken_for_a_full_memory():
    class Broken(Full):
        def fill(self, *_):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fill_all([Broken()], {"host": [1]}, CPU, HERE)


def test_a_run_whose_cache_does_not_fit_after_all_is_the_same_run(run, monkeypatch, capsys):
    losses = "train_loss", "train_accuracy", "test_loss", "test_accuracy"
    expected = history(run(*LITTLE), *losses)
    for error in (torch.OutOfMemoryError, MemoryError):

        def full(self, *_, error=error):
            self.store = torch.empty(1)
            raise error

        monkeypatch.setattr(Features, "fill", full)
        found = history(run(*LITTLE), *losses)
        assert "does not fit in host memory after all: off" in capsys.readouterr().out
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.02)
