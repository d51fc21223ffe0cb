# The container of the challenge's test phase, which mounts images, their JSON and a folder for what comes out:
#   docker build -t reg_model .
#   docker run --rm --network none --memory 16g -v INPUT:/input:ro -v JSON:/LUMIR_dataset.json:ro -v OUTPUT:/output reg_model
# Other weights than the packaged ones: -v best.pt:/best.pt:ro, and after the image's name --weights /best.pt
FROM python:3.11-slim
WORKDIR /lumirlib
COPY pyproject.toml README.md LICENSE requirements.txt ./
COPY lumirlib lumirlib
RUN grep -v '^-e' requirements.txt > pins.txt && pip install --no-cache-dir --constraint pins.txt .
WORKDIR /
ENV HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba LUMIRLIB_CACHE=/tmp/lumirlib MPLCONFIGDIR=/tmp/matplotlib
ENTRYPOINT ["lumirlib", "submission", "predict", "--input", "/input", "--output", "/output", "--quiet"]
CMD ["--pretrained", "ours-1mm"]
