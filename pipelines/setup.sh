#!/usr/bin/env bash
# What `make setup` does: the versions of requirements*.lock and the project itself into a virtual environment.
# Every step leaves alone what is there already, so an interrupted setup is run again and goes on.
# usage: pipelines/setup.sh FOLDER    PYTHON, TORCH_INDEX, UV (empty: only pip), CMAKE_ARGS and XDG_CACHE_HOME are heeded
set -euo pipefail
venv=$1
python=$venv/bin/python
trap 'echo "interrupted: run it again, it goes on from here"; exit 130' INT
cpu_builds=https://download.pytorch.org/whl/cpu

step() { # step WHAT COMMAND...
  local started=$SECONDS
  printf '%s ... ' "$1"
  "${@:2}"
  echo "$((SECONDS - started)) s"
}
pip() { "$python" -m pip -qq "$@"; }
pinned() { sed -n "s/^$1==//p" requirements.lock; }
installed() { "$python" -c "from importlib import metadata; print(metadata.version('$1').split('+')[0])" 2>/dev/null || true; }
install() { # with uv where it can be had: pip takes several times as long; from pip's index if one is set, with its certificates
  local index
  index=$("$python" -m pip config list | sed -n "s/^[^=]*\.index-url='\(.*\)'$/\1/p" | head -n 1)
  if [ -n "$UV" ] && [ -x "$venv/bin/uv" ]; then
    env ${index:+UV_DEFAULT_INDEX="$index"} "$venv/bin/uv" pip install --quiet --system-certs --python "$python" "$@" && return
    printf 'uv could not, so pip does it ... '
  fi
  pip install "$@"
}

"${PYTHON:-python3}" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"expected Python 3.11 to 3.13, got {sys.version.split()[0]}; set PYTHON=python3.11")'
# pip and uv write these two last: a package without them was interrupted, and is installed again.
for package in "$venv"/lib/python*/site-packages/*.dist-info; do
  [ -s "$package/RECORD" ] && [ -e "$package/INSTALLER" ] || rm -rf "$package"
done
compgen -G "$venv/lib/python*/site-packages/pip-*.dist-info" >/dev/null ||
  step "environment $venv" "${PYTHON:-python3}" -m venv "$venv"
step "pip and setuptools" pip install "pip>=25" "setuptools>=77"
UV=${UV-uv==0.13.9}
if [ -n "$UV" ]; then
  pip install "$UV" 2>/dev/null || { rm -f "$venv/bin/uv"; echo "$UV cannot be had here: pip instead, which takes longer"; }
fi

gpu() { [ -e /dev/nvidia0 ] || [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }
# torch first: everything else then leaves it as it is. Without a GPU the CPU build, if anyone offers it.
torch=$(pinned torch)
offered() { "$python" -m pip index versions torch "$@" 2>/dev/null | grep '^Available' | grep -qF "$torch+cpu"; }
if [ "$(installed torch)" = "$torch" ]; then
  echo "torch $torch ... there"
elif [ -n "${TORCH_INDEX:-}" ]; then
  step "torch $torch from $TORCH_INDEX" pip install --index-url "$TORCH_INDEX" "torch==$torch"
elif gpu; then
  echo "a GPU: the registry's build of torch"
elif [ "$(uname -s)" != Linux ]; then
  echo "not Linux: the registry's build of torch, which needs no CUDA here"
elif offered; then
  step "no GPU: torch $torch, CPU build" pip install --no-deps "torch==$torch+cpu"
elif offered --index-url "$cpu_builds" --timeout 5 --retries 0; then
  step "no GPU: torch $torch, CPU build" pip install --no-deps --index-url "$cpu_builds" "torch==$torch+cpu"
else
  echo "no GPU, but no CPU build of torch either ($cpu_builds does not answer): the registry's build, several GB"
fi

# llama.cpp is compiled for this very machine, for CUDA where a GPU and nvcc are. The wheel is kept for the next environment,
# under what the compiler makes of the CPU (its predefined macros) and the options: another machine with the same home finds
# none of its own there.
llama=$(pinned llama_cpp_python)
if gpu && nvcc --version >/dev/null 2>&1; then
  echo "a GPU and nvcc: llama.cpp for CUDA (CMAKE_ARGS=-DGGML_CUDA=off: for the CPU)"
  CMAKE_ARGS="-DGGML_CUDA=on ${CMAKE_ARGS:-}"
elif gpu; then
  echo "a GPU, but no nvcc: llama.cpp runs on the CPU (with the CUDA toolkit: delete $venv and run it again)"
fi
target=$({ cc -march=native -dM -E -x c /dev/null || cc -dM -E -x c /dev/null; } 2>/dev/null || true)
key=$(echo "$target ${CMAKE_ARGS:-} ${CFLAGS:-} ${CXXFLAGS:-}" | cksum | cut -d ' ' -f 1)
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/grit-pipeline/wheels/$key
build() {
  mkdir -p "$wheels"
  partial=$(mktemp -d "$wheels/partial.XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  # Leaves out what Python never calls (the tools' common library, pictures): a third of the work.
  echo 'set(LLAMA_BUILD_COMMON OFF)' >"$partial/lean.cmake"
  CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$partial/lean.cmake ${CMAKE_ARGS:-}" \
    pip wheel --no-cache-dir --no-deps --wheel-dir "$partial" "llama_cpp_python==$llama" \
    2>"$partial/log" || { echo failed; cut -c 1-300 "$partial/log" | tail -n 40 >&2; exit 1; }
  mv "$partial"/*.whl "$wheels/"
}
if [ "$(installed llama_cpp_python)" = "$llama" ]; then
  echo "llama.cpp $llama ... there"
else
  compgen -G "$wheels/llama_cpp_python-$llama-*.whl" >/dev/null || step "llama.cpp compiled for this machine, some minutes, once" build
  step "llama.cpp $llama from $wheels" pip install --no-deps --no-index --find-links "$wheels" "llama_cpp_python==$llama"
fi

converters() { "$python" -m export.converters >/dev/null; }

step "$(grep -c == requirements.lock) packages" install -r requirements.lock
# uv leaves compiling to the first import; where Python may not write that down, it is done here, for all packages.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1
step "Unsloth" install --no-deps -r requirements-unsloth.lock
step "this project" pip install --no-deps --no-build-isolation --editable .
step "llama.cpp's converters" converters
echo "installed in $SECONDS s"
