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
        return "none"

def has(name, *least):
    return tuple(map(int, re.findall("[0-9]+", found(name))[:2])) >= least

line, status = "Python " + platform.python_version(), 2
if sys.version_info >= (3, 10):
    line += ", torch " + found("torch") + ", torchvision " + found("torchvision")
    status = 1
if status == 1 and has("torch", 2, 4) and has("torchvision", 0, 19):
    line = " ".join(name for name in sys.argv[1:] if found(name) == "none")
    status = 3 if line else 0
print(line)
sys.exit(status)
'
fail() {
    echo "error: $1" >&2
    exit 1
}

python='' has_torch='' lacks='' base='' seen=''
for candidate in python python3 "$here"/.venv/{bin,Scripts}/python; do
    status=0
    line=$("$candidate" -c "$check" "$@" 2>/dev/null) || status=$?
    case $status in
        0) python=$candidate; break ;;
        3) has_torch=$candidate lacks=$line ;;
        1 | 2) seen+=${line:+"${seen:+; }$candidate is $line"} ;;
    esac
    if [ $status = 1 ] && [[ $candidate != "$here"/* ]]; then base=${base:-$candidate}; fi
done

# A Python with torch that lacks a small package: ours is completed, another one is the user's.
if [ ! "$python" ] && [ "$has_torch" ]; then
    python=$has_torch
    [[ $python == "$here"/* ]] || fail "$python has torch and lacks $lacks. Run this again after
    $python -m pip install $lacks"
    # shellcheck disable=SC2086  # the packages are separate words
    "$python" -m pip install --quiet $lacks || exit 1
fi

# No torch that is new enough: an environment of its own.
if [ ! "$python" ]; then
    [ "$base" ] || base=$(type -P python3.1{4,3,2,1,0} | head -n 1) || true
    [ "$base" ] || fail "this needs Python 3.10 or newer, and there is ${seen:-none}"
    echo "No Python here has torch 2.4 and torchvision 0.19, or newer (${seen:-$base is bare}).
Installing requirements.txt into $here/.venv: once, some minutes, 6 GB.
Without a GPU a smaller torch is enough: stop this, and run it again after
    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" >&2
    undo() {
        rm -rf "$here/.venv"
        fail "$1 Then run this again."
    }
    "$base" -m venv --clear "$here/.venv" >/dev/null 2>&1 ||
        undo "$base cannot make a virtual environment. On Debian or Ubuntu: apt install
python3-venv. On Colab: !pip install -U torch torchvision."
    python="$here/.venv/bin/python"
    [ -x "$python" ] || python="$here/.venv/Scripts/python"
    "$python" -m pip install --quiet -r "$here/requirements.txt" ||
        undo "pip could not install requirements.txt (see above), which takes a network and 6 GB."
    echo "For the README's python commands: . '${python%/*}/activate'" >&2
fi
