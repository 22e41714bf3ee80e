# The service of an exported folder, on CPU:
#   docker build -f launch/serve.Dockerfile -t uni-moe-serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/exported:/model:ro" uni-moe-serve
FROM python:3.11.11-slim-bookworm

# The packages of the service alone: not TensorFlow, Flax and Orbax, which train and export.
WORKDIR /app
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt absl-py 'etils[epath]' ml-collections numpy pillow \
    jax flatbuffers sentencepiece av fastapi prometheus-client uvicorn \
 && useradd --create-home --uid 10001 serve

COPY launch/serve.py launch/
COPY uni_moe_jax uni_moe_jax/

USER 10001
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu
EXPOSE 8000
# The first start compiles; give /home/serve/.cache a volume to keep the programs.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["python", "launch/serve.py", "--model=/model", "--host=0.0.0.0"]
