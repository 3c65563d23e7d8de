# Two programs in containers, and a third image to work on finetune101 itself.
#
# Labels for photos, without PyTorch:
#   docker build --target predict -t finetune101-predict .
#   docker run --rm -v "$PWD/photos:/photos" finetune101-predict /photos
#
# Everything (target train), on the processor. --build-arg PIP_EXTRA_INDEX_URL=ADDRESS names the index of PyTorch's builds for the
# processor alone (pytorch.org, Get Started, says which); without it PyTorch comes with the libraries of NVIDIA's GPUs:
# some gigabytes more, and quick where docker run gets --gpus all --shm-size=2g.
#   docker build -t finetune101 .
#   docker run --rm -v "$PWD:/work" finetune101 train --exp mine --data photos
#
# A container writes as the user 1000; on a folder of another user give docker run --user "$(id -u):$(id -g)".

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
ENV FINETUNE101_CACHE=/tmp/finetune101
RUN useradd --create-home --uid 1000 user && install --directory --owner user --group user /work

FROM base AS wheel
COPY . /source
RUN pip wheel --no-deps --wheel-dir /wheels /source

FROM base AS dev
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev make git procps \
    && rm -rf /var/lib/apt/lists/*

FROM base AS predict
COPY requirements.lock /tmp/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --constraint /tmp/requirements.lock numpy pillow onnxruntime tyro msgspec filelock pyyaml tqdm \
    && pip install --no-deps /wheels/*.whl
USER user
WORKDIR /work
ENTRYPOINT ["finetune101", "predict"]
CMD ["--help"]

# the last target is the one that docker build makes where none is named
FROM base AS train
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
COPY requirements.lock /tmp/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --constraint /tmp/requirements.lock "$(echo /wheels/*.whl)[weights,serve,heif]"
USER user
WORKDIR /work
ENTRYPOINT ["finetune101"]
