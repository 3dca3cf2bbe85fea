"""run_all.sh, setup.sh and tests/run.sh, with a `python` that only takes notes."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

FAKE = """#!/bin/bash
# Answers -c (is all installed?), makes a virtual environment of itself, and notes anything else,
# a line a call, with quotes around what has a space in it.
[ "$1" != -c ] || exit ANSWER
line=
for word; do
    [[ $word != *" "* ]] || word="'$word'"
    line+=" $word"
done
if [ "$CUDA_VISIBLE_DEVICES" ]; then
    line=" gpu $CUDA_VISIBLE_DEVICES${RUNS_ON_GPU:+ of $RUNS_ON_GPU}:$line"
    echo "    1/50        0.5    80.00%"
fi
echo "${line# }" >> "$LOG"
if [ "$FAIL" ] && [[ $* = *"$FAIL"* ]]; then
    exit 3
fi
if [ "$2" = venv ]; then
    made="$4/${VENV_BIN:-bin}/python"
    install -D "$0" "$made"
    sed -i 's/exit 1$/exit 0/' "$made"
fi
if [ "$FOREVER" ]; then
    trap 'sleep 0.2; echo stopped >> "$LOG"; exit 143' TERM
    while :; do sleep 0.05; done
fi
"""


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def fake_python(file: Path, has_all: bool) -> None:
    write_program(file, FAKE.replace("ANSWER", str(int(not has_all))))


def variables_of(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "LOG": str(folder / "log")}


@pytest.fixture
def scripts(tmp_path):
    """A copy of the shell scripts, and `python` as above: runs a command, and gives what it did
    and what `python` was asked to run."""
    for name in ("run_all.sh", "setup.sh", "tests/run.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    fake_python(tmp_path / "bin/python", has_all=True)

    def run(*command: str, **variables: str):
        (tmp_path / "log").write_text("")
        environment = variables_of(tmp_path) | variables
        how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(["bash", *command], **how)
        return done, (tmp_path / "log").read_text().replace(f"{tmp_path}/", "").splitlines()

    return run


@pytest.fixture
def nothing_installed(scripts, tmp_path):
    for name in ("python", "python3"):
        fake_python(tmp_path / "bin" / name, has_all=False)
    return scripts


def test_run_all_makes_the_four_runs_in_two_and_compares_what_is_in_its_folder(scripts, tmp_path):
    for name in ("one/epoch10.pt", "two/epoch10.pt", "two/latest.pt"):
        (tmp_path / "my results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my results" / name).touch()
    done, log = scripts("run_all.sh", "--out=my results", "--data-dir", "/my data")
    flags = "--epochs 10 50 --seed 0 --out 'my results' --resume --data-dir '/my data'"
    files = "'my results/one/epoch10.pt' 'my results/two/epoch10.pt'"
    assert done.returncode == 0, done.stderr
    assert log == [
        f"train.py --unfreeze layer4 {flags}",
        f"train.py --unfreeze layer3 layer4 {flags}",
        f"compare.py {files} --csv 'my results/summary.csv'",
        "plot.py 'my results'",
    ]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("table: my results/summary.csv, learning curves: my results/*/history")


def test_run_all_with_seeds_and_the_baseline_stops_at_a_run_that_fails(scripts):
    _, (*runs, _, _) = scripts("run_all.sh", SEEDS="3 4", WITH_FC="1")
    assert runs[0] == "train.py --unfreeze --epochs 10 50 --seed 3 --out results --resume"
    assert [line.split()[-4] for line in runs] == ["3", "3", "3", "4", "4", "4"]
    done, log = scripts("run_all.sh", FAIL="--unfreeze layer3", SEEDS="3 4")
    assert done.returncode == 3 and len(log) == 2


def test_the_demo_pretrains_on_other_pictures_and_goes_on_from_that(scripts, tmp_path):
    trained = tmp_path / "results/demo/pretraining/a run/epoch5.pt"
    trained.parent.mkdir(parents=True)
    trained.write_text("weights")
    done, log = scripts("run_all.sh", "--demo", "--device", "cpu", "--tag", "smooth")
    assert done.returncode == 0, done.stderr
    pretraining, *runs, compared, drawn = log
    assert pretraining.startswith("train.py --device cpu --dataset synthetic-other --weights none")
    assert "--out results/demo/pretraining --resume" in pretraining and "--tag" not in pretraining
    assert (tmp_path / "results/demo/pretrained.pt").read_text() == "weights"
    preset = "--dataset synthetic --weights results/demo/pretrained.pt --image-size 32"
    preset += " --train-size 200 --batch-size 50"
    assert len(runs) == 3 and "--unfreeze --epochs" in runs[0]
    for line in runs:
        assert line.endswith(f"--out results/demo --resume --tag smooth {preset} --device cpu")
    assert compared == "compare.py results/demo/*/epoch*.pt --csv results/demo/summary.csv"
    assert drawn == "plot.py results/demo"
    assert "prove nothing" in done.stdout.splitlines()[-1]
    _, log = scripts("run_all.sh", "--demo", "--tag=other")  # what is pretrained stays
    assert len(log) == 5 and all(" --tag other " in line for line in log[:3])


@pytest.mark.parametrize("gpus", [{}, {"GPUS": "0 1"}])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_run_all_stops_the_runs(scripts, tmp_path, number, status, gpus):
    count, log = 1 + len(gpus), tmp_path / "log"
    log.touch()
    process = subprocess.Popen(
        ["bash", "run_all.sh"],
        cwd=tmp_path,
        env=variables_of(tmp_path) | {"FOREVER": "1"} | gpus,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while log.read_text().count("train.py") < count:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(20) == status
    lines = log.read_text().splitlines()
    assert lines[count:] == ["stopped"] * count and "train.py" in lines[count - 1]


def test_the_list_is_of_commands_that_can_be_run_anywhere(scripts):
    done, log = scripts("run_all.sh", "--list", "--data-dir", "/my data", SEEDS="0 1")
    *_, last = lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4 and not log
    _, log = scripts("-c", last)
    flags = "--epochs 10 50 --seed 1 --out results --resume --data-dir '/my data'"
    assert log == [f"train.py --unfreeze layer3 layer4 {flags}"]
    assert scripts("run_all.sh", "--list", "--demo")[0].returncode == 2


def test_runs_on_several_gpus_are_each_made_once_and_the_others_finish(scripts, tmp_path):
    done, log = scripts("run_all.sh", GPUS="0 5", SEEDS="0 1", FAIL="--unfreeze layer4 --epochs 10")
    runs = [line for line in log if "train.py" in line]
    assert done.returncode == 1
    assert len(runs) == len({line.partition(": ")[2] for line in runs}) == 4
    assert {line[:6] for line in runs} <= {"gpu 0 ", "gpu 5 "}
    assert done.stderr.count("failed: see results/run") == 2
    assert all(f"run {i}:     1/50        0.5    80.00%\n" in done.stdout for i in range(4))
    assert "1/50" in (tmp_path / "results/run3.log").read_text()
    assert not any("compare.py" in line for line in log)
    done, log = scripts("run_all.sh", GPUS="0 5")
    assert done.returncode == 0 and "compare.py" in log[-2]


@pytest.mark.parametrize(
    "free, variables, gpu, two",
    [
        (60_000, {}, "0", True),
        (60_000, {"CUDA_VISIBLE_DEVICES": "3,4"}, "3", True),
        (20_000, {}, "0", False),
        (60_000, {"GPUS": "0"}, None, False),
    ],
)
def test_one_gpu_with_room_makes_two_runs_at_a_time(scripts, tmp_path, free, variables, gpu, two):
    """Each with its share of the memory."""
    ask = f"#!/bin/sh\necho $2 >> {tmp_path}/smi\necho {free}\n"
    write_program(tmp_path / "bin/nvidia-smi", ask)
    done, (*runs, _, _) = scripts("run_all.sh", **variables)
    assert done.returncode == 0, done.stderr
    assert (f"two runs at a time, for which GPU {gpu} has room" in done.stdout) == two
    assert all(line.startswith(f"gpu {gpu} of 2: ") for line in runs) == two
    if gpu:
        assert (tmp_path / "smi").read_text().split() == [gpu]
    else:
        assert runs[0].startswith("gpu 0 of 1: ")


def test_run_all_explains_itself(scripts):
    done, log = scripts("run_all.sh", "--help")
    assert done.returncode == 0 and "bash run_all.sh --demo" in done.stdout and not log


@pytest.mark.parametrize("script", ["run_all.sh", "tests/run.sh"])
@pytest.mark.parametrize("folder", ["bin", "Scripts"])  # Scripts: on Windows
def test_what_is_missing_is_installed_once(nothing_installed, script, folder):
    """And the arguments arrive."""
    done, log = nothing_installed(script, "-k", "frozen and not cuda", VENV_BIN=folder)
    assert done.returncode == 0, done.stderr
    assert log[:2] == ["-m venv --clear .venv", "-m pip install --quiet -r requirements.txt"]
    assert log[2].endswith(" -k 'frozen and not cuda'")
    again, log = nothing_installed(script)
    assert again.returncode == 0 and not any("venv" in line for line in log)


@pytest.mark.parametrize("fails, told", [("-m venv", "python3-venv"), ("-m pip", "a network and")])
def test_a_set_up_that_fails_says_why_and_leaves_nothing(nothing_installed, tmp_path, fails, told):
    done, _ = nothing_installed("run_all.sh", FAIL=fails)
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    (error,) = done.stderr.split("\nerror: ")[1:]
    assert told in error.replace("\n", " ")


def test_slurm_runs_a_copy_of_the_script(scripts, tmp_path):
    """Out of its spool folder; the folder that it was submitted from is in a variable."""
    (tmp_path / "spool").mkdir()
    shutil.copy(ROOT / "run_all.sh", tmp_path / "spool")
    done, log = scripts("spool/run_all.sh", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 0 and "train.py --unfreeze layer4" in log[0]
    done, _ = scripts("spool/run_all.sh")
    assert done.returncode == 2 and "--wrap" in done.stderr and "--list" in done.stderr


@pytest.mark.parametrize("name", ["python", "python3", ".venv/bin/python", ".venv/Scripts/python"])
def test_a_python_that_has_all_is_taken_wherever_it_is(nothing_installed, tmp_path, name):
    where = tmp_path / name
    if "/" not in name:
        where = tmp_path / "bin" / name
    fake_python(where, has_all=True)
    done, log = nothing_installed("-c", CHOSEN)
    assert done.stdout.replace(f"{tmp_path}/", "") == f"chosen: {name}\n" and not log


CHOSEN = ". ./setup.sh; echo chosen: $python"
NOTES_PIP = 'case "$*" in "-m pip"*|"-m venv"*) echo "$@" >> "$LOG"; exit 1 ;; esac\n'


@pytest.fixture
def choose(scripts, tmp_path):
    """Sources setup.sh where this very interpreter is the one `python`, at `where`, and has a torch
    and a torchvision of these versions, which it must not import."""

    def choose(*packages: str, torch="2.6.0", torchvision="0.21.0", where="bin/python"):
        (tmp_path / "bin/python").unlink()
        fake_python(tmp_path / "bin/python3", has_all=False)
        real = f"#!/bin/sh\n{NOTES_PIP}exec '{sys.executable}' -S \"$@\"\n"
        write_program(tmp_path / where, real)
        for name, version in {"torch": torch, "torchvision": torchvision}.items():
            metadata = tmp_path / f"front/{name}-{version}.dist-info/METADATA"
            metadata.parent.mkdir(parents=True)
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / "front/torch.py").write_text(f"open('{tmp_path}/imported', 'w')")
        words = f". ./setup.sh {' '.join(packages)}; echo chosen: $python"
        done, log = scripts("-c", words, PYTHONPATH=str(tmp_path / "front"))
        assert not (tmp_path / "imported").exists()
        return done, log

    return choose


OLD = [("2.3.1", "0.19.0"), ("2.11.0+cpu", "0.18.1")]
NEW = [("2.4.0", "0.19.0"), ("2.11.0+cpu", "0.26.0+cpu"), ("3.0.0.dev20270101", "1.0")]


@pytest.mark.parametrize("torch, torchvision", OLD + NEW)
def test_a_torch_that_is_too_old_is_not_taken_and_is_named(choose, torch, torchvision):
    done, log = choose(torch=torch, torchvision=torchvision)
    if (torch, torchvision) in NEW:
        assert done.stdout == "chosen: python\n" and not log
    else:
        assert log and "torch 2.4 and torchvision 0.19, or newer" in done.stderr
        assert f", torch {torch}, torchvision {torchvision}" in done.stderr


def test_a_small_package_that_is_missing_is_named_and_nothing_big_is_installed(choose):
    done, log = choose("pytest", "matplotlib")
    assert done.returncode == 1 and not log
    assert "python has torch and lacks pytest matplotlib." in done.stderr
    assert done.stderr.endswith(" python -m pip install pytest matplotlib\n")


def test_our_own_environment_is_completed(choose):
    _, log = choose("pytest", where=".venv/bin/python")
    assert log == ["-m pip install --quiet pytest"]


def test_a_python_that_is_too_old_is_named(scripts, tmp_path):
    for name in ("python", "python3"):
        write_program(tmp_path / "bin" / name, "#!/bin/sh\necho Python 3.8.1\nexit 2\n")
    for tool in ("bash", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    done, log = scripts("-c", CHOSEN, PATH=str(tmp_path / "bin"))
    assert done.returncode == 1 and not log
    assert "needs Python 3.10 or newer" in done.stderr and "Python 3.8.1" in done.stderr
