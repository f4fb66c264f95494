# The README's installation in a container that has CUDA's compiler. It was not built by the tests.
#   docker build -t longlora .
#   docker run --gpus all -v "$PWD/finetuned:/longlora/finetuned" longlora
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PATH=/longlora/.venv/bin:$PATH
WORKDIR /longlora
COPY . .
RUN python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && pip install .
CMD ["deepspeed", "examples/finetune_llama.py"]
