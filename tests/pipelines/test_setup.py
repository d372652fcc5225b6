"""`make setup` with a Python that only logs its arguments: which torch, and llama.cpp compiled once."""

import os
import re
import subprocess

import pytest

PYTHON = """#!/bin/sh
case "$*" in
  "-m venv"*) mkdir -p "$3/bin" "$3/lib/python3/site-packages/pip-1.dist-info"; cp "$0" "$3/bin/python"
    for name in RECORD INSTALLER; do echo pip >"$3/lib/python3/site-packages/pip-1.dist-info/$name"; done ;;
  "-m pip index versions torch"*)
    if [ "${OFFERED-nowhere}" = "${7-}" ]; then echo "Available versions: 9.0, 2.13.0+cpu"; fi ;;
  *"metadata.version"*) exit 1 ;;
  *"pip -qq install uv"*) exit 1 ;;
  *"pip -qq wheel"*) [ -z "${BROKEN-}" ] || exit 1; echo "$* CMAKE_ARGS=$CMAKE_ARGS" >>"$LOG"
    while [ "$1" != --wheel-dir ]; do shift; done; touch "$2/llama_cpp_python-0.3.36-py3-none-any.whl" ;;
  *"pip -qq install"*) echo "$*" >>"$LOG" ;;
esac
"""
OFFICIAL = "https://download.pytorch.org/whl/cpu"


@pytest.fixture
def setup(tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, text in {"python": PYTHON, "nvidia-smi": '#!/bin/sh\necho "${GPU-no devices}"\n'}.items():
        (fake / name).write_text(text, encoding="utf-8")
        (fake / name).chmod(0o755)
    settings = {"PATH": f"{fake}:{os.environ['PATH']}", "PYTHON": str(fake / "python"), "XDG_CACHE_HOME": str(tmp_path)}

    def run(folder, **more):
        log = tmp_path / "log"
        log.write_text("", encoding="utf-8")
        command = ["pipelines/setup.sh", str(tmp_path / folder)]
        env = {**settings, "LOG": str(log), **more}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return done, log.read_text(encoding="utf-8")

    return run


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
@pytest.mark.parametrize(
    ("machine", "output", "prompts"),
    [
        ({"OFFERED": ""}, "no GPU: torch 2.13.0, CPU build", "--no-deps torch==2.13.0+cpu"),
        ({"OFFERED": OFFICIAL}, "no GPU: torch 2.13.0, CPU build", f"--index-url {OFFICIAL} torch==2.13.0+cpu"),
        ({}, "no CPU build of torch available", None),
        ({"GPU": "GPU 0: H100", "OFFERED": ""}, "GPU found: default build", None),
        ({"GPU": "GPU 0: H100", "TORCH_INDEX": "file:///mine"}, "from file:///mine", "file:///mine torch==2.13.0\n"),
    ],
)
def test_torch_matches_the_machine(setup, machine, output, prompts):
    done, log = setup("venv", **machine)
    assert done.returncode == 0 and output in done.stdout and "not available here: using pip" in done.stdout
    assert prompts in log if prompts else "torch==" not in log
    assert "install -r requirements.lock" in log


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
@pytest.mark.parametrize(
    ("gpu", "nvcc", "options", "output", "cuda"),
    [
        ("GPU 0: H100", True, "", "GPU and nvcc found: llama.cpp with CUDA", ["on"]),
        ("GPU 0: H100", True, "-DGGML_CUDA=off", "llama.cpp with CUDA", ["on", "off"]),  # the last one counts
        ("GPU 0: H100", False, "", "GPU but no nvcc: llama.cpp runs on the CPU", []),
        ("no devices", True, "", "", []),
    ],
)
def test_llama_cpp_uses_cuda_if_possible(setup, tmp_path, gpu, nvcc, options, output, cuda):
    setup("cpu")
    (tmp_path / "bin/nvcc").symlink_to("/bin/true" if nvcc else "/bin/false")
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{gpu}'\n", encoding="utf-8")
    done, log = setup("venv", CMAKE_ARGS=options)
    assert done.returncode == 0 and re.findall(r"-DGGML_CUDA=(\w+)", log) == cuda
    assert output in done.stdout
    assert ("pip -qq wheel" in log) is bool(cuda), "a wheel of its own for CUDA"


def test_llama_cpp_is_compiled_once_per_kind_of_machine_and_never_stored_half(setup, tmp_path):
    done, _ = setup("broken", BROKEN="1")
    assert done.returncode and not any(path.is_file() for path in (tmp_path / "grit-pipeline").rglob("*"))
    assert "pip -qq wheel" in setup("first")[1]
    assert "pip -qq wheel" not in setup("second")[1]
    assert "pip -qq wheel" in setup("other", CFLAGS="-march=x86-64")[1]
