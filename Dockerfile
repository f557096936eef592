# One image recipe for both services of compose.yaml, which names the arguments of each.
# Stages: `wheel` builds the package, `runtime` installs it. There is none for the browser page, because its build is
# committed in chatserve/static: no Node is needed. Bases are exact releases; raise them together with constraints.txt.

# What the server runs on: Python for a CPU; for a GPU a CUDA toolkit, because FlashInfer compiles its kernels at the
# first start with nvcc. (Its precompiled ones are in an index apart, by CUDA release, and lack some of those used here.)
ARG BASE=python:3.11.14-slim-bookworm

FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS runtime
# g++ compiles the CPU's attention kernel at the first start, for the processor found. tini is process 1: the engine
# takes having that for its parent as a sign that the server has died.
ARG PACKAGES="g++"
RUN apt-get update && apt-get install --yes --no-install-recommends tini ${PACKAGES} && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/chatserve
ENV PATH=/opt/chatserve/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch has a layer of its own: it is large and changes rarely. Its CPU build has no CUDA libraries with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /opt/chatserve/
RUN pip install --constraint /opt/chatserve/constraints.txt --index-url "${TORCH_INDEX}" --no-deps torch

ARG EXTRAS=""
COPY --from=wheel /wheels /wheels
RUN pip install --constraint /opt/chatserve/constraints.txt "$(echo /wheels/*.whl)${EXTRAS}"

# All that is written lies in two volumes: /data (histories on disk) and /cache (models, compiled kernels).
RUN useradd --uid 10001 --user-group --home-dir /cache --no-create-home chatserve \
    && install --directory --owner=chatserve --group=chatserve --mode=0700 /data /cache
USER chatserve
WORKDIR /data
ENV HOME=/cache CHATSERVE_HOST=0.0.0.0 CHATSERVE_DATA_DIR=/data
VOLUME ["/data", "/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --retries=3 --start-period=15m CMD ["chatserve", "healthcheck"]
ENTRYPOINT ["tini", "--", "chatserve"]
CMD ["serve"]
