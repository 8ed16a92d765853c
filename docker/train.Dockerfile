# Training on GPUs: docker build -f docker/train.Dockerfile -t controlllm-train .
# CUDA 13 comes with torch's wheel, the driver with the node. flash-attn has no wheel for this torch, and only nvcc can
# make one: a stage of its own, so that it is made again only when torch or flash-attn change.
FROM nvidia/cuda:13.0.1-devel-ubuntu22.04 AS nvcc

FROM python:3.12-bookworm AS flash
COPY --from=nvcc /usr/local/cuda /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda \
    FLASH_ATTENTION_FORCE_BUILD=TRUE \
    FLASH_ATTN_CUDA_ARCHS=80;90;100 \
    MAX_JOBS=8 \
    NVCC_THREADS=2
WORKDIR /build
COPY docker/constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch numpy einops ninja packaging psutil setuptools wheel==0.45.1 \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels flash-attn==2.8.3

FROM python:3.12-slim-bookworm AS build
ENV UV_LINK_MODE=copy UV_PYTHON=/opt/venv/bin/python
RUN pip install --no-cache-dir uv==0.13.9 && uv venv --python /usr/local/bin/python3.12 /opt/venv
WORKDIR /app
# The dependencies are a layer of their own: it is built again only when they change.
COPY pyproject.toml docker/constraints.txt ./
COPY docker/pycosat pycosat
RUN uv pip install --no-cache --requirements pyproject.toml ./pycosat --constraint constraints.txt \
      --extra language --extra benchmarks --extra hdfs --extra s3 --extra gs --extra deepspeed --extra quant --extra trackers --extra gpu
RUN --mount=type=bind,from=flash,source=/wheels,target=/wheels \
    uv pip install --no-cache --constraint constraints.txt /wheels/flash_attn-*.whl
COPY README.md ./
COPY controlllm controlllm
COPY tasks tasks
COPY workflows workflows
COPY k8s/profiles k8s/profiles
RUN uv pip install --no-cache --no-deps --editable .

# What is in the image: docker build --target sbom --output . ... writes sbom.cdx.json. The tool stands beside the image.
FROM build AS listed
RUN uv venv --python /usr/local/bin/python3.12 /opt/tool \
    && uv pip install --no-cache --python /opt/tool/bin/python cyclonedx-bom==7.5.0 \
    && /opt/tool/bin/cyclonedx-py environment --output-format JSON --output-file /sbom.cdx.json /opt/venv/bin/python

FROM scratch AS sbom
COPY --from=listed /sbom.cdx.json /

FROM python:3.12-slim-bookworm
# Triton and DeepSpeed compile kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home controlllm
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=1000 /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    TORCH_NCCL_ASYNC_ERROR_HANDLING=1 \
    TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
USER 1000
WORKDIR /app
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s CMD ["controlllm", "--version"]
