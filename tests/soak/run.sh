#!/bin/sh
# Run what `make soak` runs: every part, whatever becomes of those before it. The fuzzers run beside the others, at
# a lower priority. Figures and the time that each part took go to runs/soak.txt, the fuzzers' output to runs/fuzz.txt.
#
#   sh tests/soak/run.sh BIN    BIN: the folder of python and pytest; FUZZ, JOBS, KILLS, ROWS and SOAK as in the Makefile

BIN=$1
FIGURES=$PWD/runs/soak.txt
status=0
mkdir -p runs

# part NAME COMMAND…: run a part, and note how long it took and how it ended
part() {
    name=$1
    shift
    began=$(date +%s)
    "$@"
    code=$?
    took=$(($(date +%s) - began))
    echo "$(date +%F) soak: $name: $((took / 60)) min $((took % 60)) s, exit code $code" >> "$FIGURES"
    return $code
}

fuzz() {
    SAFELIGHT_FUZZ=$FUZZ nice -n 10 "$BIN/pytest" -n0 -s tests/test_fuzz.py tests/server/test_fuzz_json.py \
        > runs/fuzz.txt 2>&1
}

promises() {
    files=$(for name in $SOAK; do echo "tests/server/test_$name.py"; done)
    # shellcheck disable=SC2086
    SAFELIGHT_SOAK=$FIGURES "$BIN/pytest" -n0 $files tests/prompt/test_reading.py tests/test_bounds.py
}

# What the suite takes a part of: every combination of samplers, schedules, families and sizes.
tables() {
    SAFELIGHT_SOAK=$FIGURES "$BIN/pytest" -m soak tests/parity tests/test_fast.py tests/test_kernels.py tests/test_int8.py \
        tests/test_train_folder.py tests/server/test_verified.py tests/server/test_same.py tests/server/test_spoilt.py &&
        SAFELIGHT_SOAK=$FIGURES "$BIN/pytest" tests/parity/test_sampler_tables.py
}

part fuzzers fuzz &
fuzzers=$!
part promises promises || status=1
part tables tables || status=1
part sanitizers "$BIN/python" tests/soak/sanitize.py || status=1
! command -v qemu-aarch64 > /dev/null || part ARM "$BIN/python" tests/soak/arm.py || status=1
part company "$BIN/python" tests/soak/company.py || status=1
part scaling "$BIN/python" tests/soak/scaling.py --jobs 20 --kills 6 || status=1
part eviction "$BIN/python" tests/soak/eviction.py || status=1
part fairness "$BIN/python" tests/soak/fairness.py --jobs "$JOBS" || status=1
part kills "$BIN/python" tests/soak/kills.py --jobs "$JOBS" --kills "$KILLS" || status=1
part fleet "$BIN/python" tests/soak/fleet.py --jobs "$JOBS" --kills "$KILLS" || status=1
part claims "$BIN/python" tests/soak/claims.py --jobs "$((1000 * JOBS))" || status=1
part batch "$BIN/python" tests/soak/batch.py --rows "$ROWS" || status=1
part training "$BIN/python" tests/soak/training.py --steps 200 || status=1
wait $fuzzers || status=1
grep ^fuzz runs/fuzz.txt | tee -a "$FIGURES"
exit $status
