# ditmoe with everything it needs; docs/installation.md says how to build and use it.
# PyTorch's packages bring CUDA's libraries with them, so a plain Python image is enough; the driver comes from the host.
FROM python:3.11-slim
# On GPUs Triton compiles kernels when they are first used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# Another index of PyTorch's builds, such as that for CPUs.
ARG PIP_EXTRA_INDEX_URL
COPY . /opt/ditmoe
RUN pip install --no-cache-dir -c /opt/ditmoe/constraints.txt /opt/ditmoe
ENTRYPOINT ["ditmoe"]
