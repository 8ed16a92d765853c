# Training on GPUs: docker build -f docker/train.Dockerfile -t controlllm-train .
# CUDA comes with torch's wheel, the driver with the node.
FROM python:3.12-slim-bookworm AS build
ENV UV_LINK_MODE=copy UV_PYTHON=/opt/venv/bin/python
RUN pip install --no-cache-dir uv==0.13.9 && uv venv --python /usr/local/bin/python3.12 /opt/venv
WORKDIR /app
# The dependencies are a layer of their own: it is built again only when they change.
COPY pyproject.toml docker/constraints.txt ./
COPY docker/pycosat pycosat
RUN uv pip install --no-cache --requirements pyproject.toml ./pycosat --constraint constraints.txt \
      --extra language --extra benchmarks --extra hdfs --extra s3 --extra gs --extra deepspeed --extra quant --extra trackers --extra gpu
COPY README.md ./
COPY controlllm controlllm
COPY tasks tasks
COPY workflows workflows
COPY k8s/profiles k8s/profiles
RUN uv pip install --no-cache --no-deps --editable .

FROM python:3.12-slim-bookworm
# Triton and DeepSpeed compile kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home controlllm
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=controlllm /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    TORCH_NCCL_ASYNC_ERROR_HANDLING=1 \
    TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
USER 1000
WORKDIR /app
