# A server on NVIDIA GPUs:  docker build -f docker/gpu.Dockerfile -t mmqwen .
#                           docker run --gpus all --ipc host -p 8000:8000 -v "$PWD/CKPT:/model" mmqwen
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# Triton and vLLM compile: a C compiler and Python's headers at run time, too.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY requirements/gpu.txt requirements/gpu.txt
RUN pip install --no-cache-dir -r requirements/gpu.txt
COPY setup.py pyproject.toml README.md LICENSE ./
COPY mmqwen mmqwen
COPY kernels kernels
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
WORKDIR /
EXPOSE 8000
ENTRYPOINT ["mmqwen", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
