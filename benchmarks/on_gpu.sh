#!/usr/bin/env bash
# Half an hour of a GPU, what is worth most first. Each part has its own limit of time and writes as it goes; the same
# command goes on where it stopped.
#
#   bash benchmarks/on_gpu.sh                  # into results/; LUMIR_BRAINS names the folder of real brains
#   bash benchmarks/on_gpu.sh --device cpu     # the same parts on tiny inputs, into runs/on_gpu_cpu/: do they run?
#
# What a GPU would compute is tested without one where PyTorch is built for CUDA, as PyPI's is on Linux:
#
#   pytest tests/test_fake_cuda.py
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=cuda
if [ "${1:-}" = --device ]; then device=${2:?cuda or cpu}; fi
state=runs/on_gpu_$device
mkdir -p "$state"
if [ "$device" = cuda ]; then
    export LUMIRLIB_RESULTS=results
    steps=160x224x192:32 pairs=160x224x192:32 repeats=5 loading=40 scans=8 fine=real-2mm finest=full
    cohort=$([ -n "${LUMIR_BRAINS:-}" ] && echo brains || echo embedded)
    [ "$(command -v nvcc)" ] && pip install --quiet --no-build-isolation fused-lncc==0.1.0
else
    export LUMIRLIB_RESULTS=$state
    steps=32x32x32:2 pairs=32x32x32:2 repeats=1 loading=2 scans=2 fine=smoke finest=smoke cohort=embedded
fi

# part NAME SECONDS COMMAND...: runs it unless it has been done; a part that breaks or runs out of time holds none up.
part() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    if [ -e "$state/$name.done" ]; then
        echo "$name: done before"
        return
    fi
    timeout --kill-after=30 "$limit" "$@" >>"$state/$name.log" 2>&1
    status=$?
    case $status in
    0) touch "$state/$name.done" && echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: not done in its $limit s; the next call goes on with it" ;;
    *) broken=1 && echo "$name: broken, with status $status; see $state/$name.log" ;;
    esac
}

broken=0
part tests 180 python -m pytest -q -n 0 -m gpu tests
part step 420 python benchmarks/train_step.py --device "$device" --sizes "$steps" --rounds 1 --repeats "$repeats" \
    --only ours --resume
part registration 240 python benchmarks/inference.py --device "$device" --sizes "$pairs" --rounds 1 \
    --repeats "$repeats" --resume
part loading 120 python benchmarks/loading.py --device "$device" --pairs "$loading" --scans "$scans"
part table2_2mm 600 lumirlib sweep --rows table2 --seeds 0 --preset "$fine" --cohort "$cohort" --device "$device" \
    --no-notebook
part backbone_1mm 240 lumirlib sweep --rows backbone LC-2 --seeds 0 --preset "$finest" --cohort "$cohort" \
    --device "$device" --no-notebook --set epochs=2
exit "$broken"
