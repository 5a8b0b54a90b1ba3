#!/bin/sh
# Installs what `kvd bench load --peer NAME` needs, each peer in an environment of its own below .venv-peers:
#   bench/install.sh redis mooncake lmcache
# posix needs nothing. Versions: bench/versions.txt. Redis' server comes from the system's packages and needs root.
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=python3.11}"
: "${TORCH_INDEX:=https://download.pytorch.org/whl/cpu}"

for name in "$@"; do
    wanted=$(sed -n "s/^$name //p" bench/versions.txt)
    test -n "$wanted" || { echo "there is no peer $name in bench/versions.txt" >&2; exit 2; }
    test -x ".venv-peers/$name/bin/python" || "$PYTHON" -m venv ".venv-peers/$name"
    pip=".venv-peers/$name/bin/pip --disable-pip-version-check -q"
    # A CPU build of torch, where pip's own index has another one.
    # shellcheck disable=SC2086
    $pip install $wanted || $pip install --extra-index-url "$TORCH_INDEX" $wanted
    if [ "$name" = redis ] && ! command -v redis-server >/dev/null && ! command -v valkey-server >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server
    fi
done
