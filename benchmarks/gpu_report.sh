#!/usr/bin/env bash
# Everything that wants a GPU, in one call of at most ten minutes: tests, kernel benchmarks, whole steps, loaders (with DALI if
# it is installed).
#
#     bash benchmarks/gpu_report.sh [FOLDER]        default: $OUT, else benchmarks/results/gpu
#
# PARTS names what to run, and so what has no room in the ten minutes: PARTS="precision watch optimizers" bash benchmarks/gpu_report.sh
#
# Leaves at most ten files in FOLDER (texts, JSON, Markdown). PYTHON names the interpreter; WHEELS a folder of wheels to
# install without a network (tyro and pydantic are what a machine that has torch usually lacks). A part that fails does not
# stop the others; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
FOLDER=$(realpath -m "${1:-${OUT:-benchmarks/results/gpu}}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$FOLDER"

[ -z "${WHEELS:-}" ] || "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" tyro pydantic || exit 1
"$PYTHON" - <<'PY' || exit 1
import importlib.util, sys
missing = [name for name in ("torch", "triton", "tyro", "pydantic", "sklearn", "pytest", "hypothesis", "yaml", "tqdm")
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"Missing here: {', '.join(missing)}. Install them, or name a folder with their wheels: WHEELS=FOLDER bash benchmarks/gpu_report.sh.")
import torch
if not torch.cuda.is_available():
    sys.exit("There is no GPU here: pytest runs the kernels through Triton's interpreter instead.")
PY

PARTS=${PARTS:-tests kernels-bfloat16 kernels-float32 tune step loaders}
failed=0
part() { # part SECONDS NAME COMMAND...: run it, keep what it prints, go on whatever happens
    local seconds=$1 name=$2
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
    echo "== $name: $*"
    timeout "$seconds" "$@" >"$FOLDER/$name.txt" 2>&1 || { status=$?; failed=1; echo "   FAILED or out of time (status $status)"; }
    tail -n 3 "$FOLDER/$name.txt"
}

workers=()
"$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n "$(nproc)")
part 145 tests "$PYTHON" -m pytest "${workers[@]}" tests/test_gpu.py tests/kernels tests/metagrad/test_kernels.py --ignore tests/kernels/test_machine_code.py
part 130 kernels-bfloat16 "$PYTHON" -m benchmarks.kernels --dtypes bfloat16 --seconds 88 --json "$FOLDER/kernels-bfloat16.json"
part 70 kernels-float32 "$PYTHON" -m benchmarks.kernels --dtypes float32 --only mes_cross_entropy,tangent_loss --seconds 30 --json "$FOLDER/kernels-float32.json"
part 55 tune "$PYTHON" -m benchmarks.kernels --tune --seconds 15
part 60 step "$PYTHON" -m benchmarks.step --no-memory --json "$FOLDER/step.json"
part 110 loaders "$PYTHON" -m benchmarks.loaders --workers 8,16 --rounds 3 --images 2048 --train resnet50 --json "$FOLDER/loaders.json"
part 200 precision "$PYTHON" -m benchmarks.precision --json "$FOLDER/precision.json" -- --epochs 40 --no-progress
part 60 watch "$PYTHON" -m benchmarks.watch --model resnet32 --rounds 15 --json "$FOLDER/watch.json"
part 60 optimizers "$PYTHON" -m benchmarks.optimizers --model resnet50 --json "$FOLDER/optimizers.json"
echo "In $FOLDER: $(ls "$FOLDER" | tr '\n' ' ')"
exit $failed
