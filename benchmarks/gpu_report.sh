#!/usr/bin/env bash
# Everything that wants a GPU, in three calls of at most ten minutes, for a machine that is lent for half an hour:
#
#     bash benchmarks/gpu_report.sh A [FOLDER]      what runs at all: the GPU's tests, the kernels' tests
#     bash benchmarks/gpu_report.sh B [FOLDER]      whole steps: exact, approximate, plain; what the watch and the optimizers cost
#     bash benchmarks/gpu_report.sh C [FOLDER]      kernels' bandwidth, loaders, mixed precision, compute-sanitizer
#     bash benchmarks/gpu_report.sh A --list        the parts of a call, their seconds and the files they leave; runs nothing
#
# FOLDER is $OUT, else benchmarks/results/gpu; a call leaves at most eight files in it: a log and JSON. PARTS names some of a
# call's parts, as in PARTS="step watch". A part that fails or runs out of time does not stop the others; the exit status says
# whether one did. PYTHON names the interpreter.
#
# WHEELS names a folder of wheels for a machine without a network, which are installed as they are, without what they need, into
# an empty folder: torch's image brings typing_extensions and more in versions of its own, and pip would stop at them. Wanted are
# pydantic, pydantic_core (of that Python), annotated_types, typing_inspection and typing_extensions; to compare with others also
# higher, torchopt, optree and liger_kernel.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CALL=${1:-}
case $CALL in A | B | C) shift ;; *) sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2 ;; esac
LIST=
[ "${1:-}" != --list ] || { LIST=1; shift; }
FOLDER=$(realpath -m "${1:-${OUT:-benchmarks/results/gpu}}")
LOG=$FOLDER/$CALL.log
PYTHON=${PYTHON:-python3}
SITE=
trap '[ -z "$SITE" ] || rm -rf "$SITE"' EXIT

prepare() {
    if [ -n "${WHEELS:-}" ]; then
        SITE=$(mktemp -d)
        "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl || exit 1
        echo "Installed: $(cd "$SITE" && ls -d -- *.dist-info | sed 's/\.dist-info$//' | tr '\n' ' ')"
    fi
    export PYTHONPATH="${SITE:+$SITE:}$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    "$PYTHON" - <<'PY' || exit 1
import importlib.util, sys
missing = [name for name in ("torch", "triton", "pydantic", "sklearn", "pytest", "hypothesis", "yaml", "tqdm")
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"Missing here: {', '.join(missing)}. Install them, or name a folder with their wheels: WHEELS=FOLDER bash benchmarks/gpu_report.sh.")
import torch
if not torch.cuda.is_available():
    sys.exit("There is no GPU here: pytest runs the kernels through Triton's interpreter instead.")
PY
    mkdir -p "$FOLDER"
    : >"$LOG"
}

failed=0
part() { # part SECONDS NAME FILES COMMAND...: run it, keep what it prints, go on whatever happens. FILES: what it leaves, or -
    local seconds=$1 name=$2 files=$3
    shift 3
    [ -z "$LIST" ] || { echo "$name $seconds $files"; return 0; }
    [[ -z "${PARTS:-}" || " $PARTS " == *" $name "* ]] || return 0
    echo "== $name ($(date +%T)): $*" | tee -a "$LOG"
    timeout -k 5 "$seconds" "$@" >>"$LOG" 2>&1 || { status=$?; failed=1; echo "   FAILED or out of time (status $status)" | tee -a "$LOG"; }
    tail -n 3 "$LOG"
}

[ -n "$LIST" ] || prepare
workers=()
[ -n "$LIST" ] || ! "$PYTHON" -c "import xdist" 2>/dev/null || workers=(-n "$(nproc)")
case $CALL in
A)
    part 170 gpu-tests - "$PYTHON" -m pytest -q -rfE --durations=10 tests/test_gpu.py -k "not sanitizer"
    part 200 kernel-tests - "$PYTHON" -m pytest -q -rfE ${workers[@]+"${workers[@]}"} tests/kernels tests/metagrad/test_kernels.py --ignore tests/kernels/test_machine_code.py
    part 170 engine-tests - "$PYTHON" -m pytest -q -rfE ${workers[@]+"${workers[@]}"} tests/metagrad --ignore tests/metagrad/test_kernels.py
    ;;
B)
    part 240 step step.json "$PYTHON" -m benchmarks.step --no-memory --rounds 15 --json "$FOLDER/step.json"
    part 110 step-channels-last step-channels-last.json "$PYTHON" -m benchmarks.step --no-memory --rounds 15 --channels-last --only exact,approx --json "$FOLDER/step-channels-last.json"
    part 90 watch watch.json "$PYTHON" -m benchmarks.watch --model resnet32 --rounds 15 --json "$FOLDER/watch.json"
    part 90 optimizers optimizers.json "$PYTHON" -m benchmarks.optimizers --model resnet50 --json "$FOLDER/optimizers.json"
    ;;
C)
    part 200 kernels kernels.json "$PYTHON" -m benchmarks.kernels --dtypes bfloat16 --only mes_cross_entropy,tangent_loss --seconds 160 --json "$FOLDER/kernels.json"
    part 110 loaders loaders.json "$PYTHON" -m benchmarks.loaders --workers 8,16 --rounds 3 --images 2048 --train resnet50 --json "$FOLDER/loaders.json"
    part 120 precision precision.json "$PYTHON" -m benchmarks.precision --json "$FOLDER/precision.json" -- --epochs 20 --no-progress
    part 110 sanitizer - compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "$PYTHON" -m tests.kernels.exercise
    ;;
esac
[ -n "$LIST" ] || echo "In $FOLDER: $(ls "$FOLDER" | tr '\n' ' ')"
exit $failed
