# posttrain on NVIDIA's PyTorch image: from it come nvcc, CUDA's libraries and NCCL's tools; the Python packages are
# those of uv.lock, in an environment of their own. Not run: no container runtime was at hand where it was written.
#
#   docker build -t posttrain .                              some minutes: Transformer Engine is compiled
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" -v posttrain:/cache posttrain doctor
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" -v posttrain:/cache posttrain \
#       train model=llama3_8b data=alpaca data.path=my.json hydra.run.dir=outputs/mine
#
# It runs as user 1000 (`ubuntu` of the image), who has to be allowed to write to what is mounted at /workspace; as yourself:
# `--user "$(id -u):$(id -g)" -v "$HOME/.cache/posttrain:/cache"`. A gated model: `-e HF_TOKEN`.
#
# CUDA 13.0, which the lock's torch 2.11 is built with; a newer tag may bring a newer nvcc.
FROM nvcr.io/nvidia/pytorch:25.11-py3

# The image's own packages stay out: PIP_CONSTRAINT holds them fixed, and the environment below sees none of them.
ENV PIP_CONSTRAINT= \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    HF_HOME=/cache/huggingface \
    POSTTRAIN_CACHE=/cache/posttrain

RUN install --directory --owner=ubuntu --group=ubuntu /opt/posttrain /workspace /cache
USER ubuntu
WORKDIR /opt/posttrain

# The environment is a layer of its own, which a change of the code leaves as it is.
COPY --chown=ubuntu:ubuntu pyproject.toml uv.lock README.md ./
RUN python3 -m venv .tools \
    && .tools/bin/pip install --no-cache-dir uv==0.13.9 \
    && .tools/bin/uv sync --frozen --no-install-project --python /usr/bin/python3.12 \
        --extra demo --extra gpu --extra sweep --extra eval

COPY --chown=ubuntu:ubuntu . .
RUN .tools/bin/uv sync --frozen --python /usr/bin/python3.12 --extra demo --extra gpu --extra sweep --extra eval

ENV PATH=/opt/posttrain/.venv/bin:$PATH
WORKDIR /workspace
ENTRYPOINT ["posttrain"]
CMD ["--help"]
