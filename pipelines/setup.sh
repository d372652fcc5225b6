#!/usr/bin/env bash
# What `make setup` does: install the versions of requirements*.lock and the project into a virtual environment.
# Every step skips what is already there, so an interrupted setup continues when it is run again.
# usage: pipelines/setup.sh FOLDER    environment: PYTHON, TORCH_INDEX, UV (empty: only pip), CMAKE_ARGS, XDG_CACHE_HOME
set -euo pipefail
venv=$1
python=$venv/bin/python
trap 'echo "interrupted: run it again to continue"; exit 130' INT
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
install() { # with uv if available, because pip is several times slower; from pip's index and with its certificates if set
  local index
  index=$("$python" -m pip config list | sed -n "s/^[^=]*\.index-url='\(.*\)'$/\1/p" | head -n 1)
  if [ -n "$UV" ] && [ -x "$venv/bin/uv" ]; then
    env ${index:+UV_DEFAULT_INDEX="$index"} "$venv/bin/uv" pip install --quiet --compile-bytecode --system-certs --python "$python" "$@" && return
    printf 'uv failed, using pip ... '
  fi
  pip install "$@"
}

"${PYTHON:-python3}" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"expected Python 3.11 to 3.13, got {sys.version.split()[0]}; set PYTHON=python3.11")'
# pip and uv write these two files last: a package without them was interrupted and is installed again.
for package in "$venv"/lib/python*/site-packages/*.dist-info; do
  [ -s "$package/RECORD" ] && [ -e "$package/INSTALLER" ] || rm -rf "$package"
done
compgen -G "$venv/lib/python*/site-packages/pip-*.dist-info" >/dev/null ||
  step "environment $venv" "${PYTHON:-python3}" -m venv "$venv"
step "pip and setuptools" pip install "pip>=25" "setuptools>=77"
UV=${UV-uv==0.13.9}
if [ -n "$UV" ]; then
  pip install "$UV" 2>/dev/null || { rm -f "$venv/bin/uv"; echo "$UV is not available here: using pip, which is slower"; }
fi

gpu() { [ -e /dev/nvidia0 ] || [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }
# torch first, so that nothing else replaces it. Without a GPU the CPU build, if an index offers it.
torch=$(pinned torch)
offered() { "$python" -m pip index versions torch "$@" 2>/dev/null | grep '^Available' | grep -qF "$torch+cpu"; }
if [ "$(installed torch)" = "$torch" ]; then
  echo "torch $torch ... already installed"
elif [ -n "${TORCH_INDEX:-}" ]; then
  step "torch $torch from $TORCH_INDEX" pip install --index-url "$TORCH_INDEX" "torch==$torch"
elif gpu; then
  echo "GPU found: default build of torch"
elif [ "$(uname -s)" != Linux ]; then
  echo "not Linux: default build of torch, which needs no CUDA here"
elif offered; then
  step "no GPU: torch $torch, CPU build" pip install --no-deps "torch==$torch+cpu"
elif offered --index-url "$cpu_builds" --timeout 5 --retries 0; then
  step "no GPU: torch $torch, CPU build" pip install --no-deps --index-url "$cpu_builds" "torch==$torch+cpu"
else
  echo "no GPU, and no CPU build of torch available ($cpu_builds does not answer): default build, several GB"
fi

# llama.cpp is compiled for this machine, with CUDA if there are a GPU and nvcc. The wheel is kept for the next environment
# under a hash of the compiler's predefined macros for this CPU and of the options, so that another machine with the same
# home folder does not use it.
llama=$(pinned llama_cpp_python)
if gpu && nvcc --version >/dev/null 2>&1; then
  echo "GPU and nvcc found: llama.cpp with CUDA (CMAKE_ARGS=-DGGML_CUDA=off: without)"
  CMAKE_ARGS="-DGGML_CUDA=on ${CMAKE_ARGS:-}"
elif gpu; then
  echo "GPU but no nvcc: llama.cpp runs on the CPU (after installing the CUDA toolkit, delete $venv and run this again)"
fi
target=$({ cc -march=native -dM -E -x c /dev/null || cc -dM -E -x c /dev/null; } 2>/dev/null || true)
key=$(echo "$target ${CMAKE_ARGS:-} ${CFLAGS:-} ${CXXFLAGS:-}" | cksum | cut -d ' ' -f 1)
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/grit-pipeline/wheels/$key
build() {
  mkdir -p "$wheels"
  partial=$(mktemp -d "$wheels/partial.XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  # Without what Python never calls (the tools' common library, pictures): saves a third of the work.
  echo 'set(LLAMA_BUILD_COMMON OFF)' >"$partial/lean.cmake"
  CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$partial/lean.cmake ${CMAKE_ARGS:-}" \
    pip wheel --no-cache-dir --no-deps --wheel-dir "$partial" "llama_cpp_python==$llama" \
    2>"$partial/log" || { echo failed; cut -c 1-300 "$partial/log" | tail -n 40 >&2; exit 1; }
  mv "$partial"/*.whl "$wheels/"
}
if [ "$(installed llama_cpp_python)" = "$llama" ]; then
  echo "llama.cpp $llama ... already installed"
else
  compgen -G "$wheels/llama_cpp_python-$llama-*.whl" >/dev/null || step "llama.cpp, compiled once for this machine in some minutes" build
  step "llama.cpp $llama from $wheels" pip install --no-deps --no-index --find-links "$wheels" "llama_cpp_python==$llama"
fi

converters() { "$python" -m export.converters >/dev/null; }

step "$(grep -c == requirements.lock) packages" install -r requirements.lock
# uv leaves byte-compiling to the first import; if Python may not write then, it is done here for all packages.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1
step "Unsloth" install --no-deps -r requirements-unsloth.lock
step "this project" pip install --no-deps --no-build-isolation --editable .
step "llama.cpp's converters" converters
echo "installed in $SECONDS s"
