"""run_all.sh, setup.sh and tests/run.sh, with a `python` that only takes notes."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

FAKE = """#!/bin/sh
# Answers -c (is all installed?), makes a virtual environment of itself, and notes anything else,
# a line a call, with quotes around what has a space in it.
note() {
    line=
    for word; do
        case "$word" in *" "*) word="'$word'" ;; esac
        line="$line $word"
    done
    if [ -n "$CUDA_VISIBLE_DEVICES" ]; then
        line=" gpu $CUDA_VISIBLE_DEVICES:$line"
        echo "warning: not the run"
        echo results/a-run
        echo "    1/50        0.5    80.00%"
    fi
    echo "${line# }" >> "$LOG"
}
case "$1" in
    -c) exit ANSWER ;;
    -m) note "$@"
        if [ "$2" = venv ]; then
            made="$4/${VENV_BIN:-bin}/python"
            mkdir -p "$(dirname "$made")"
            sed 's/exit 1 ;;/exit 0 ;;/' "$0" > "$made"
            chmod +x "$made"
        fi ;;
    *) note "$@"
       if [ -n "$FOREVER" ]; then
           trap 'sleep 0.2; echo stopped >> "$LOG"; exit 143' TERM
           while :; do sleep 0.05; done
       fi
       case "$*" in *"$FAIL"*) [ -z "$FAIL" ] || exit 3 ;; esac ;;
esac
"""


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def fake_python(file: Path, has_all: bool) -> None:
    write_program(file, FAKE.replace("ANSWER", str(int(not has_all))))


@pytest.fixture
def scripts(tmp_path):
    """A copy of the shell scripts, and `python` as above: runs a command, and gives what it did
    and what `python` was asked to run."""
    for name in ("run_all.sh", "setup.sh", "tests/run.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    fake_python(tmp_path / "bin/python", has_all=True)

    def run(*command: str, **variables: str):
        environment = variables_of(tmp_path) | variables
        how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(["bash", *command], **how)
        log = []
        if (tmp_path / "log").exists():
            log = (tmp_path / "log").read_text().splitlines()
        return done, [line.replace(f"{tmp_path}/", "") for line in log]

    return run


def variables_of(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "LOG": str(folder / "log")}


# ---------------------------------------------------------------- run_all.sh


def test_run_all_makes_the_four_runs_in_two_and_compares_them(scripts):
    done, log = scripts("run_all.sh", "--data-dir", "/my data", "--batch-size", "256")
    flags = "--epochs 10 50 --seed 0 --out results --resume --data-dir '/my data' --batch-size 256"
    assert done.returncode == 0, done.stderr
    asked = "--epochs 50 --out results --data-dir '/my data' --batch-size 256"
    assert log == [
        f"-m study.estimate --strategies fc+layer4 fc+layer3+layer4 --times 1 {asked}",
        f"train.py --unfreeze layer4 {flags}",
        f"train.py --unfreeze layer3 layer4 {flags}",
        "compare.py results/*/epoch*.pt --csv results/summary.csv",
    ]
    last = done.stdout.splitlines()[-1]
    assert last == "table: results/summary.csv, learning curves: results/*/history.csv"


def test_run_all_compares_what_is_in_its_folder(scripts, tmp_path):
    for name in ("one/epoch10.pt", "one/epoch50.pt", "two/epoch10.pt", "two/latest.pt"):
        file = tmp_path / "my results" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "my results/summary.csv").touch()
    _, log = scripts("run_all.sh", "--out=my results")
    files = ["one/epoch10.pt", "one/epoch50.pt", "two/epoch10.pt"]
    asked = " ".join(f"'my results/{file}'" for file in files)
    assert log[-1] == f"compare.py {asked} --csv 'my results/summary.csv'"
    assert len(log) == 2 + 1  # nothing is estimated: there are runs already
    assert all("--out 'my results' --resume" in line for line in log[:-1])


def test_run_all_with_seeds_and_the_baseline(scripts):
    _, log = scripts("run_all.sh", "--out", "here", SEEDS="3 4", WITH_FC="1")
    estimate, *runs, last = log
    assert "--strategies fc fc+layer4 fc+layer3+layer4 --times 2" in estimate
    assert len(runs) == 2 * 3
    assert all("--out here" in line for line in runs)
    assert runs[0] == "train.py --unfreeze --epochs 10 50 --seed 3 --out here --resume"
    assert {line.split("--seed ")[1][0] for line in runs} == {"3", "4"}
    assert "--csv here/summary.csv" in last


def test_run_all_without_the_baseline(scripts):
    _, log = scripts("run_all.sh", WITH_FC="0")
    assert len(log) == 1 + 2 + 1


def test_the_demo_pretrains_on_other_pictures_and_goes_on_from_that(scripts, tmp_path):
    trained = tmp_path / "results/demo/pretraining/a run/epoch5.pt"
    trained.parent.mkdir(parents=True)
    trained.write_text("weights")
    done, log = scripts("run_all.sh", "--demo", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    pretraining, *runs, compared, drawn = log
    assert pretraining.startswith("train.py --device cpu --dataset synthetic-other --weights none")
    assert "--out results/demo/pretraining --resume" in pretraining
    assert (tmp_path / "results/demo/pretrained.pt").read_text() == "weights"
    preset = "--dataset synthetic --weights results/demo/pretrained.pt --image-size 32"
    preset += " --train-size 200 --batch-size 50"
    assert len(runs) == 3 and "--unfreeze --epochs" in runs[0]
    for line in runs:
        assert line.endswith(f"--out results/demo --resume {preset} --device cpu")
    assert compared == "compare.py results/demo/*/epoch*.pt --csv results/demo/summary.csv"
    assert drawn == "plot.py results/demo"
    assert "prove nothing" in done.stdout.splitlines()[-1]


def test_run_all_stops_at_a_run_that_fails(scripts):
    done, log = scripts("run_all.sh", FAIL="--unfreeze layer3")
    assert done.returncode == 3
    assert len(log) == 3


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_run_all_stops_the_run_and_hears_it_out(scripts, tmp_path, number, status):
    process = subprocess.Popen(
        ["bash", "run_all.sh"],
        cwd=tmp_path,
        env=variables_of(tmp_path) | {"FOREVER": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "log").exists() or "train.py" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(10) == status
    *_, run, last = (tmp_path / "log").read_text().splitlines()
    assert "train.py" in run
    assert last == "stopped"


def test_the_list_is_of_commands_that_can_be_run_anywhere(scripts, tmp_path):
    done, log = scripts("run_all.sh", "--list", "--data-dir", "/my data", SEEDS="0 1")
    assert done.returncode == 0 and not log
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    subprocess.run(["bash", "-c", lines[3]], cwd=tmp_path, env=variables_of(tmp_path), check=True)
    flags = "--epochs 10 50 --seed 1 --out results --resume --data-dir '/my data'"
    logged = (tmp_path / "log").read_text().replace(f"{tmp_path}/", "")
    assert logged.strip() == f"train.py --unfreeze layer3 layer4 {flags}"
    assert scripts("run_all.sh", "--list", "--demo")[0].returncode == 2


def test_runs_on_several_gpus_are_each_made_once_and_the_others_finish(scripts, tmp_path):
    done, log = scripts("run_all.sh", GPUS="0 5", SEEDS="0 1", FAIL="--unfreeze layer4 --epochs 10")
    runs = [line for line in log if "train.py" in line]
    assert done.returncode == 1
    assert len(runs) == len({line.partition(": ")[2] for line in runs}) == 4
    assert {line[:6] for line in runs} <= {"gpu 0:", "gpu 5:"}
    assert done.stderr.count("failed: see results/run") == 2
    assert done.stdout.count("results/a-run     1/50        0.5    80.00%") == 4
    assert "a-run" in (tmp_path / "results/run3.log").read_text()
    assert not any("compare.py" in line for line in log)
    done, log = scripts("run_all.sh", GPUS="0 5")
    assert done.returncode == 0 and "compare.py" in log[-1]


def test_who_stops_run_all_stops_the_runs_on_all_gpus(scripts, tmp_path):
    environment = variables_of(tmp_path) | {"FOREVER": "1", "GPUS": "0 1"}
    process = subprocess.Popen(["bash", "run_all.sh"], cwd=tmp_path, env=environment)
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text().count("train.py") < 2:
        time.sleep(0.05)
    time.sleep(0.2)
    assert subprocess.run(["pgrep", "-f", f"{tmp_path}/train.py"], capture_output=True).stdout
    process.terminate()
    assert process.wait(10) == 143
    assert not subprocess.run(["pgrep", "-f", f"{tmp_path}/train.py"], capture_output=True).stdout


def test_run_all_explains_itself(scripts):
    done, log = scripts("run_all.sh", "--help")
    assert done.returncode == 0
    assert "bash run_all.sh --demo" in done.stdout
    assert not log


# ---------------------------------------------------------------- setup.sh and tests/run.sh


def test_the_tests_get_the_arguments(scripts):
    done, log = scripts("tests/run.sh", "-k", "frozen and not cuda")
    assert done.returncode == 0, done.stderr
    assert log == ["-m pytest -k 'frozen and not cuda'"]


@pytest.mark.parametrize("script", ["run_all.sh", "tests/run.sh"])
@pytest.mark.parametrize("folder", ["bin", "Scripts"])  # Scripts: on Windows
def test_what_is_missing_is_installed_once(scripts, tmp_path, script, folder):
    for name in ("python", "python3"):
        fake_python(tmp_path / "bin" / name, has_all=False)
    done, log = scripts(script, VENV_BIN=folder)
    assert done.returncode == 0, done.stderr
    assert log[:2] == ["-m venv --clear .venv", "-m pip install --quiet -r requirements.txt"]
    assert len(log) > 2
    again, log = scripts(script)
    assert again.returncode == 0
    assert sum("venv" in line for line in log) == 1


CHOSEN = ". ./setup.sh; echo chosen: $python"


@pytest.mark.parametrize(
    "candidate", ["bin/python", "bin/python3", ".venv/bin/python", ".venv/Scripts/python"]
)
def test_a_python_that_has_all_is_taken_wherever_it_is(scripts, tmp_path, candidate):
    for name in ("python", "python3"):
        fake_python(tmp_path / "bin" / name, has_all=False)
    fake_python(tmp_path / candidate, has_all=True)
    done, log = scripts("-c", CHOSEN)
    (line,) = done.stdout.splitlines()
    name = candidate.removeprefix("bin/")
    assert line.replace(f"{tmp_path}/", "") == f"chosen: {name}"
    assert not log


@pytest.fixture
def real_python(scripts, tmp_path):
    """`python` is this very interpreter, with an importable `torch` in front that takes notes;
    what is not fit is refused in favour of a made-up .venv."""
    (tmp_path / "front").mkdir()
    imported = tmp_path / "imported"
    (tmp_path / "front/torch.py").write_text(f"open({str(imported)!r}, 'w')")
    write_program(tmp_path / "bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    fake_python(tmp_path / "bin/python3", has_all=False)
    fake_python(tmp_path / ".venv/bin/python", has_all=True)

    def chosen(*packages: str) -> str:
        words = f". ./setup.sh {' '.join(packages)}; echo chosen: $python"
        done, log = scripts("-c", words, PYTHONPATH=str(tmp_path / "front"))
        assert not log
        assert not imported.exists()
        (line,) = done.stdout.splitlines()
        return line.removeprefix("chosen: ").replace(f"{tmp_path}/", "")

    return chosen


def distribution(folder: Path, name: str, version: str) -> None:
    """What pip would leave of a package that is installed in `folder`."""
    metadata = folder / f"{name}-{version}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_is_installed_is_found_without_importing_torch(real_python):
    assert real_python("numpy", "pytest") == "python"


def test_a_package_that_is_missing_is_noticed(real_python):
    assert real_python("no-such-package-anywhere") == ".venv/bin/python"


@pytest.mark.parametrize(
    "name, version, fit",
    [
        ("torch", "2.10.1", False),
        ("torch", "1.13.1+cu117", False),
        ("torch", "2.11.0+cpu", True),
        ("torch", "3.0.0.dev20270101", True),
        ("torchvision", "0.25.0", False),
        ("torchvision", "0.26.0+cpu", True),
    ],
)
def test_versions_that_are_too_old_are_not_taken(real_python, tmp_path, name, version, fit):
    distribution(tmp_path / "front", name, version)
    expected = ".venv/bin/python"
    if fit:
        expected = "python"
    assert real_python() == expected
