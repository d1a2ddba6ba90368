# For a CPU:     docker build -t dapo_jax .
# On a TPU VM:   docker build -t dapo_jax --build-arg EXTRA='[tpu]' .     and --privileged --net=host below
# docker run -v "$PWD/runs:/runs" dapo_jax train --config configs/tiny_cpu.yaml --run-dir /runs/tiny
FROM python:3.11-slim
ARG EXTRA=
WORKDIR /dapo_jax
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY dapo_jax dapo_jax
COPY configs configs
RUN pip install --no-cache-dir --editable ".${EXTRA}"
ENTRYPOINT ["python", "-m", "dapo_jax"]
