# One GPU, one image. Needs the NVIDIA container toolkit on the host; without a GPU it runs too, slowly.
#   docker build -t qlora-neft .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD":/work -v qlora-neft-cache:/cache qlora-neft train demo --output-dir out
# What of it was tried, and on what: docs/install.md.
#
# Only the CUDA driver's interface is needed from the base: torch's wheels bring the CUDA libraries they were built with.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

LABEL org.opencontainers.image.title="qlora_neft" \
      org.opencontainers.image.description="QLoRA fine-tuning with NEFTune noise as published" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/qlora-neft/qlora_neft"

# gcc and Python's headers: Triton compiles a launcher for its kernels when a run begins. Ubuntu's newest of each.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev git ca-certificates \
 && rm -rf /var/lib/apt/lists/*

# 1000, as the first person on most machines, so that what is written into /work is theirs; Ubuntu's image has a user of
# that number already.
RUN userdel --remove ubuntu 2>/dev/null; useradd --create-home --uid 1000 tuner \
 && mkdir -p /work /cache /opt/venv /opt/qlora_neft \
 && chown tuner:tuner /work /cache /opt/venv /opt/qlora_neft
USER 1000
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1

# What it depends on changes seldom: a layer of its own, which a change of the code leaves alone.
WORKDIR /opt/qlora_neft
COPY --chown=tuner:tuner pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/venv \
 && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(p['dependencies'] + p['optional-dependencies']['plots'] + p['optional-dependencies']['fast'] + p['optional-dependencies']['gguf']))" > /tmp/requirements.txt \
 && pip install --no-cache-dir -r /tmp/requirements.txt

COPY --chown=tuner:tuner . .
RUN pip install --no-cache-dir --no-deps . && qlora-neft ls > /dev/null

WORKDIR /work
VOLUME /cache
# A stop signal reaches the trainer itself, which writes a checkpoint within machine.grace_seconds: docker stop -t 60.
STOPSIGNAL SIGTERM
ENTRYPOINT ["qlora-neft"]
CMD ["doctor"]
