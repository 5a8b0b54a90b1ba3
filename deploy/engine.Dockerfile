# A vLLM image with the kvd connector in it. From the root of the repository:
#
#   docker build -f deploy/engine.Dockerfile -t vllm-kvd:0.1.0 .
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
# hadolint ignore=DL3006
FROM ${VLLM_IMAGE}
WORKDIR /opt/kvd
COPY pyproject.toml LICENSE README.md ./
COPY kvd kvd
COPY kvd_client kvd_client
# The page copies on the GPU use CuPy, which must be made for the CUDA that torch brings.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[vllm,cuda$(python3 -c 'import torch; print(torch.version.cuda.split(".")[0])')]"
