#!/usr/bin/env bash
# What the GPU queue wants first, in one go and within 10 minutes. Results: results/benchmarks/*_cuda.json
set -u
cd "$(dirname "$0")/.."
timeout 150 python -m pytest -q -m gpu tests/training/test_step.py tests/models/test_backbone.py tests/models/test_schemes.py
timeout 260 python benchmarks/train_step.py --device cuda --rounds 1 --repeats 5
timeout 170 python benchmarks/inference.py --device cuda --sizes 160x224x192:32 --rounds 1 --repeats 5
