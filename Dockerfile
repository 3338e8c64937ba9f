# dlb_fast for a machine with an NVIDIA GPU.
#
#   docker build -t dlb_fast .                       (no GPU needed to build)
#   docker run --rm --gpus all dlb_fast doctor --self-test
#   docker run --rm --gpus all --ipc host -v /data/imagenet:/data:ro -v $PWD/runs:/workspace/runs dlb_fast \
#       train --preset imagenet-resnet50-short-dlb --data imagefolder:/data
#
# The first stage has nvcc and compiles the wheel, the second runs it. Any pytorch/pytorch image of torch 2.10 or newer
# does; both stages take the same one, so that the CUDA kernels and torch agree on their CUDA.
ARG TORCH=2.13.0-cuda13.0-cudnn9

FROM pytorch/pytorch:${TORCH}-devel AS build
# Compute capabilities: no GPU is visible while an image is built, so they are named.
ARG DLB_FAST_CUDA_ARCHS=80,90,100+ptx
ENV DLB_FAST_BUILD=cuda DLB_FAST_CUDA_ARCHS=${DLB_FAST_CUDA_ARCHS} CUDA_HOME=/usr/local/cuda
# Some of these images bring a Python that its distribution guards (PEP 668); in an image of our own it is ours.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m pip install "setuptools>=77" wheel "pybind11>=2.13" numpy
WORKDIR /src
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md CMakeLists.txt ./
COPY csrc csrc
COPY dlb_fast dlb_fast
RUN python -m pip wheel --no-deps --no-build-isolation -w dist .

FROM pytorch/pytorch:${TORCH}-runtime
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
COPY --from=build /src/dist/*.whl /tmp/wheels/
# torch is there already, so nothing drags in a second one.
RUN python -m pip install "$(echo /tmp/wheels/*.whl)[train]" && rm -rf /tmp/wheels
# Runs are written as this user; give a mounted folder to it, or say --user "$(id -u):$(id -g)".
RUN useradd --create-home --uid 10001 dlb && mkdir -p /workspace/runs && chown -R dlb /workspace
USER dlb
WORKDIR /workspace
RUN dlb-fast --version
ENTRYPOINT ["dlb-fast"]
CMD ["doctor"]
