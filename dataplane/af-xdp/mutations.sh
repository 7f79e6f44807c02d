#!/bin/sh
# Proves that the concurrency tests of the rings would notice a weakened ordering: runs them as they
# are, where they must pass, and then once per ordering with that one made Relaxed, where they must
# fail. Exits with 1 if a test fails unmutated or passes mutated.
#
# loom and Miri run by default; name one of them to run it alone. Miri needs a nightly toolchain
# with the component. MIRI_SEEDS is the range of its schedules.
set -u
cd "$(dirname "$0")" || exit 1

orderings="publish_entries observe_entries publish_room observe_room"
seeds=${MIRI_SEEDS:-0..8}

run_loom() {
    RUSTFLAGS="--cfg loom" cargo test --quiet -p af-xdp --lib ring::model_loom
}

run_miri() {
    MIRIFLAGS="-Zmiri-many-seeds=$seeds -Zmiri-env-forward=RIPSTOP_MUTATE" \
        cargo +nightly miri test --quiet -p af-xdp --lib ring::tests::two_threads
}

# The build must not be what fails below.
build_loom() {
    RUSTFLAGS="--cfg loom" cargo test --quiet -p af-xdp --lib --no-run
}

build_miri() {
    cargo +nightly miri test --quiet -p af-xdp --lib --no-run
}

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
failed=0
for tool in ${1:-loom miri}; do
    if ! "build_$tool" >"$log" 2>&1; then
        cat "$log"
        echo "$tool: the tests do not build"
        exit 1
    fi
    if RIPSTOP_MUTATE='' "run_$tool" >"$log" 2>&1; then
        echo "$tool: passes unmutated"
    else
        cat "$log"
        echo "$tool: FAILS UNMUTATED"
        failed=1
    fi
    for ordering in $orderings; do
        if RIPSTOP_MUTATE=$ordering "run_$tool" >"$log" 2>&1; then
            echo "$tool: $ordering made Relaxed SURVIVES"
            failed=1
        else
            echo "$tool: $ordering made Relaxed is caught"
        fi
    done
done
exit "$failed"
