# Sourced by run_all.sh and tests/run.sh, with the small packages that they need:
#     . setup.sh numpy matplotlib
# Sets $here, this folder, and $python, a Python that has torch, torchvision and those packages: the
# active one if it does, otherwise .venv in this folder, which is made and filled if need be.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Prints what a Python has. Status 0: everything; 3: all but the small packages, which it prints;
# 1: no torch that is new enough; 2: the Python itself is too old. It reads the packages' metadata,
# because importing torch takes 3 to 10 seconds.
check='
import platform, re, sys
from importlib.metadata import PackageNotFoundError, version

def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "0"

def has(name, *least):
    return tuple(map(int, re.findall("[0-9]+", found(name))[:2])) >= least

if sys.version_info < (3, 10):
    status, line = 2, "Python " + platform.python_version()
elif not has("torch", 2, 4) or not has("torchvision", 0, 19):
    line = "Python " + platform.python_version()
    for name in ("torch", "torchvision"):
        line += ", no " + name if found(name) == "0" else ", " + name + " " + found(name)
    status = 1
else:
    line = " ".join(name for name in sys.argv[1:] if found(name) == "0")
    status = 3 if line else 0
print(line)
sys.exit(status)
'

python='' has_torch='' lacks='' seen=''
for candidate in python python3 "$here/.venv/bin/python" "$here/.venv/Scripts/python"; do
    status=0
    line=$("$candidate" -c "$check" "$@" 2>/dev/null) || status=$?
    case $status in
        0) python=$candidate; break ;;
        3) has_torch=$candidate lacks=$line ;;
        1 | 2) seen+=${line:+"${seen:+; }$candidate is $line"} ;;
    esac
done

# A Python with torch that lacks a small package: ours is completed, another one is the user's.
if [ ! "$python" ] && [ "$has_torch" ]; then
    if [[ $has_torch != "$here"/* ]]; then
        echo "error: $has_torch has torch and lacks $lacks. Install that, and run this again:" >&2
        echo "    $has_torch -m pip install $lacks" >&2
        exit 1
    fi
    python=$has_torch
    # shellcheck disable=SC2086  # the packages are separate words
    "$python" -m pip install --quiet $lacks || exit 1
fi

# No torch that is new enough: an environment of its own.
if [ ! "$python" ]; then
    base=''
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        status=0
        "$candidate" -c "$check" "$@" >/dev/null 2>&1 || status=$?
        if [ $status = 1 ]; then base=$candidate; break; fi
    done
    if [ ! "$base" ]; then
        echo "error: this needs Python 3.10 or newer, and there is ${seen:-none}" >&2
        exit 1
    fi
    echo "No Python here has torch 2.4 and torchvision 0.19, or newer (${seen:-$base is bare})." >&2
    echo "Installing requirements.txt into $here/.venv: once, some minutes, 6 GB." >&2
    echo "Without a GPU a smaller torch is enough: stop this, and run it again after" >&2
    echo "    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" >&2
    "$base" -m venv --clear "$here/.venv" >/dev/null 2>&1 || {
        rm -rf "$here/.venv"
        echo "error: $base cannot make a virtual environment. On Debian or Ubuntu: apt install" >&2
        echo "python3-venv. On Colab: !pip install -U torch torchvision. Then run this again." >&2
        exit 1
    }
    python="$here/.venv/bin/python"
    [ -x "$python" ] || python="$here/.venv/Scripts/python"
    "$python" -m pip install --quiet -r "$here/requirements.txt" || {
        rm -rf "$here/.venv"
        echo "error: pip could not install requirements.txt (see above): it needs a network and" >&2
        echo "6 GB of disk. Then run this again." >&2
        exit 1
    }
fi
