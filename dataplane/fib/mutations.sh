#!/usr/bin/env bash
# Weakens each ordering of the publish protocol in turn and runs the models under loom and under Miri. The code as it
# is must pass both; every mutation must fail in at least one of them, or the tests would not notice its loss.
#
#   dataplane/fib/mutations.sh              all of them
#   dataplane/fib/mutations.sh unpin        only these
#
# Needs a nightly toolchain with Miri. SEEDS=0..64 sets the range of Miri's seeds.
set -euo pipefail
cd "$(dirname "$0")"

target=${CARGO_TARGET_DIR:-../../target}
seeds=${SEEDS:-0..16}
export CARGO_TERM_COLOR=never
# Linking with link-time optimization takes longer than the models run.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=4

# A mutation, and the model that is meant to notice it.
all="publish:pinned_image pass-on:a_worker follow:pinned_image pin-publisher:pinned_image pin-reader:pinned_image
unpin:pinned_image unpin-seen:pinned_image snapshot-begin:snapshot snapshot-end:snapshot"

log=$(mktemp)
trap 'rm -f "$log"' EXIT

under_loom() { # mutation
    RIPSTOP_MUTATE=$1 RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$target/loom \
        cargo test --quiet --package ripstop-fib --release --lib loom_model:: >"$log" 2>&1
}

under_miri() { # mutation, model
    # cargo-miri does not see that a variable which the code reads at compile time has changed: forget the last build.
    find "$target/miri" -path '*/.fingerprint/ripstop-fib-*' -delete 2>/dev/null || true
    RIPSTOP_MUTATE=$1 MIRIFLAGS="-Zmiri-many-seeds=$seeds -Zmiri-preemption-rate=0.1" CARGO_TARGET_DIR=$target/miri \
        cargo +nightly miri test --quiet --package ripstop-fib --no-default-features --lib "$2" >"$log" 2>&1
}

# A test that failed counts; a compiler error or a missing toolchain is no evidence.
failed() {
    grep -qE "test result: FAILED|Undefined Behavior|panicked at" "$log" && return
    echo "neither passed nor failed:" >&2
    cat "$log" >&2
    exit 1
}

verdict() { # command...: prints "passed" or "caught"
    if "$@"; then echo passed; else failed && echo caught; fi
}

wanted=${*:-}
bad=0
printf '%-16s %-8s %-8s\n' mutation loom Miri
if [ -z "$wanted" ]; then
    loom=$(verdict under_loom "")
    miri=$(verdict under_miri "" loom_model::)
    printf '%-16s %-8s %-8s\n' none "$loom" "$miri"
    [ "$loom$miri" = passedpassed ] || bad=1
fi
for pair in $all; do
    mutation=${pair%%:*}
    [ -z "$wanted" ] || [[ " $wanted " == *" $mutation "* ]] || continue
    loom=$(verdict under_loom "$mutation")
    miri=$(verdict under_miri "$mutation" "${pair##*:}")
    note=""
    if [ "$loom$miri" = passedpassed ]; then
        note="SURVIVED"
        bad=1
    fi
    printf '%-16s %-8s %-8s %s\n' "$mutation" "$loom" "$miri" "$note"
done
exit $bad
