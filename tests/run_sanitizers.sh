#!/usr/bin/env bash
# Builds the host code with AddressSanitizer and UndefinedBehaviorSanitizer and runs the kernels' tests on it.
#
# usage: tests/run_sanitizers.sh [ISA...]      default: the best one of this machine; "all" for every one
#   PYTHON=python3  the interpreter, with torch and the test dependencies
#
# The build is apart (build/asan) and takes a package folder of its own, whose Python files are links, so that the
# normal _C stays as it is. First a planted read out of bounds must be found: a run that cannot fail proves nothing.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
build=$root/build/asan
package=$build/python/slkernels
cd "$root"

cmake -S . -B "$build" -G Ninja -DSLKERNELS_SANITIZE=ON -DSLKERNELS_CUDA=OFF -DSLKERNELS_WERROR=OFF \
  -DSLKERNELS_INPLACE=OFF -DPython_EXECUTABLE="$(command -v "$python")" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --parallel 2

rm -rf "$package"
mkdir -p "$package"
for entry in "$root"/python/slkernels/*; do
  case $(basename "$entry") in
    _C.*.so | __pycache__) ;;
    *) ln -s "$(realpath "$entry")" "$package/" ;;
  esac
done
cp "$build"/_C.*.so "$package/"

# Python starts without the site module (-S): an editable install's import hook would find the normal _C first.
packages=$("$python" -c 'import site; print(":".join(site.getsitepackages()))')
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
# libstdc++ is preloaded too: ASan looks up __cxa_throw when it starts, before Python loads a C++ library.
sanitized() {
  env PYTHONPATH="$build/python:$packages" PYTHONDONTWRITEBYTECODE=1 PYTHONMALLOC=malloc \
    LD_PRELOAD="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=97:allocator_may_return_null=1:detect_stack_use_after_return=0 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:exitcode=97 \
    "$@"
}

echo "== planted faults must be found"
for fault in read write; do
  set +e
  report=$(sanitized "$python" -S tests/planted_fault.py "$fault" 2>&1)
  code=$?
  set -e
  if [ $code -ne 97 ] || ! grep -q "ERROR: AddressSanitizer" <<<"$report"; then
    printf '%s\n' "$report"
    echo "run_sanitizers: the planted $fault out of bounds was not found (exit code $code)"
    exit 1
  fi
  grep -m2 -E "ERROR: AddressSanitizer|^(READ|WRITE) of size" <<<"$report"
done

case ${1:-} in
  "") isas=("") ;;
  all) read -ra isas <<<"$(PYTHONPATH=$root/python sanitized "$python" -S tests/planted_fault.py isas)" ;;
  *) isas=("$@") ;;
esac
# Left out: tests of torch's machinery around the ops, and tests that repeat the same accesses to look at their results.
not_here="not compile and not export and not opcheck and not gradcheck and not poisoned and not written and not uniform
  and not seeds and not permutes and not exact and not full_size"
not_here=${not_here//$'\n'/ }
for isa in "${isas[@]}"; do
  echo "== tests under ASan and UBSan, ISA: ${isa:-default}"
  SLKERNELS_CPU_ISA=$isa sanitized "$python" -S -m pytest -q -x -p no:cacheprovider \
    -k "$not_here" \
    tests/test_attention.py tests/test_attention_layout.py tests/test_attention_states.py \
    tests/test_sparse*.py tests/test_lowrank.py tests/test_sl.py tests/test_optim*.py tests/test_project*.py
done
echo "run_sanitizers: no findings"
