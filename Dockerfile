# The scripts and all that they need, on the CPU or, with EXTRA, on an accelerator:
#     docker build -t ragjax .
#     docker build -t ragjax:cuda12 --build-arg EXTRA=cuda12 .     # or another extra of setup.cfg
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v ragjax:/cache ragjax \
#         python /ragjax/experiments/adapt.py --data FOLDER --output runs/mine
# FOLDER and runs/mine are below the present folder, which the container sees as /work; the volume
# `ragjax` keeps models and compiled programs. GPUs need `--gpus all`.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRA=""
WORKDIR /ragjax
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY ragjax ragjax
COPY experiments experiments
# Whoever runs it may write to /cache and /work, so that the files of a run are theirs.
RUN pip install --no-cache-dir -e ".${EXTRA:+[${EXTRA}]}" && mkdir --mode=1777 /cache /work

ENV HOME=/cache RAGJAX_CACHE=/cache/ragjax HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
VOLUME /cache
USER 65534
WORKDIR /work
CMD ["python", "/ragjax/experiments/adapt.py", "--help"]
