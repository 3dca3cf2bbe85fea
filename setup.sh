# Sourced by run_all.sh and tests/run.sh: sets $python to a Python that can import what they need,
# the active one if it can, otherwise .venv beside this file, which is made and filled if need be.
#     . setup.sh torch torchvision
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python=
for candidate in python python3 "$here/.venv/bin/python"; do
    if "$candidate" -c "import $(IFS=,; echo "$*")" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    python="$here/.venv/bin/python"
    echo "No Python here can import $*: installing requirements.txt into $here/.venv (once, some minutes, 5 GB)"
    { python3 -m venv --clear "$here/.venv" && "$python" -m pip install --quiet -r "$here/requirements.txt"; } || {
        echo "setup failed: see above. What is needed is a Python, 3.10 or newer, that can import $*" >&2
        exit 1
    }
fi
