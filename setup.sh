# Sourced by run_all.sh and tests/run.sh: sets $python to a Python that has what they need, the
# active one if it does, otherwise .venv beside this file, which is made and filled if need be.
#     . setup.sh [more packages than torch and torchvision]
# What is installed is read from the packages' metadata: importing torch takes 3 to 10 seconds.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python=
wanted="torch torchvision $*"
has_all='
import re, sys
from importlib.metadata import version
least = {"torch": (2, 11), "torchvision": (0, 26)}
for name in sys.argv[1:]:
    found = tuple(map(int, re.findall("[0-9]+", version(name))[:2]))
    assert found >= least.get(name, (0,)), name
assert sys.version_info >= (3, 10)
'
for candidate in python python3 "$here/.venv/bin/python" "$here/.venv/Scripts/python"; do
    # shellcheck disable=SC2086  # the names are separate words
    if "$candidate" -c "$has_all" $wanted >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "No Python here has $wanted: installing requirements.txt into" >&2
    echo "$here/.venv (once, some minutes, 5 GB). Without a GPU a smaller torch is enough:" >&2
    echo "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" >&2
    { python3 -m venv --clear "$here/.venv" || python -m venv --clear "$here/.venv"; } || exit 1
    python="$here/.venv/bin/python"
    [ -x "$python" ] || python="$here/.venv/Scripts/python"
    "$python" -m pip install --quiet -r "$here/requirements.txt" || {
        echo "setup failed: see above. It needs Python 3.10 or newer, and $wanted" >&2
        exit 1
    }
fi
