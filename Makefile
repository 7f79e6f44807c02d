# Two commands for everybody: `make demo` and `make test`, both as root. `make help` lists the rest.

CARGO ?= cargo
# The tools that `deep` needs beside the nightly toolchain are kept with the build.
TOOLS := $(CURDIR)/target/tools
FUZZ_SECONDS ?= 60

# What building (first line) and running the lab (second line) takes on Debian 12 and 13.
PACKAGES := gcc libc6-dev clang make pkg-config libelf-dev zlib1g-dev protobuf-compiler \
            iproute2 ethtool nftables iptables iputils-ping openssl procps util-linux containernetworking-plugins etcd-server \
            python3-pip systemd dpdk-dev git
# What building alone takes.
BUILD_PACKAGES := $(wordlist 1,8,$(PACKAGES))

.PHONY: help demo test test-vm test-vm-short bench perf perf-check lint deep setup root build image-files tools fuzz loom miri mutations

help:
	@echo 'make demo    a cluster of four nodes in network namespaces, traffic, and a kill of each process'
	@echo 'make test    everything that CI runs on every change: format, lints, documents, all tests'
	@echo 'make test-vm the data plane on other kernels and real drivers, in guests under QEMU (perf/vm/README.md)'
	@echo 'make test-vm-short  the part of it that says most in a few minutes'
	@echo 'make bench   what a packet costs, and what a table of 15,000 leases costs'
	@echo 'make perf    Ripstop beside the kernel, in ten minutes: tables, and target/perf/report.html (perf/README.md)'
	@echo 'make perf-check BASE=commit  is what is checked out (or HEAD=commit) slower than that? fails above 5 %'
	@echo 'make lint    format, lints and documents alone'
	@echo 'make deep    Miri, loom, weakened orderings that must be caught, fuzzing (nightly toolchain)'
	@echo 'make image-files  everything that goes into a container image, below target/image (configs/container)'
	@echo 'make setup   installs the Debian packages that the others need; they call it themselves'

root:
	@test "$$(id -u)" = 0 || { echo 'Run it as root: network namespaces, BPF and AF_XDP need that.' >&2; exit 1; }

setup:
	@missing=$$(dpkg-query -W -f='$${Package} $${db:Status-Status}\n' $(PACKAGES) 2>/dev/null | \
	    awk '$$2 == "installed" { print $$1 }' | sort | comm -13 - <(printf '%s\n' $(PACKAGES) | sort)); \
	if [ -n "$$missing" ]; then \
	    echo "installing Debian packages:" $$missing; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi

setup: SHELL := bash

build: setup
	$(CARGO) build --workspace --bins

demo: root setup
	$(CARGO) build --release --workspace --bins
	target/release/ripstop-perf demo

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --package ripstop-perf --test 'vm_*' -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --quiet

# What a container image holds, as it lies there. The CNI plugin and install-conf are static: they run on the host, whose C
# library may be another one.
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
BUILT := $(or $(CARGO_TARGET_DIR),target)
IMAGE := target/image
image-files: PACKAGES := $(BUILD_PACKAGES)
image-files: setup
	$(CARGO) build --release --package ripstop-dataplane --package ripstop-controlplane --bins
	RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' \
	    $(CARGO) build --release --package ripstop-cni --bins --target $(HOST)
	rm -rf $(IMAGE)
	install -D --strip --target-directory=$(IMAGE)/opt/bin \
	    $(addprefix $(BUILT)/release/,ripstop ripstop-controlplane ripstop-dataplane)
	install -D --target-directory=$(IMAGE)/opt/bin $(BUILT)/$(HOST)/release/install-conf
	install -D --target-directory=$(IMAGE) $(BUILT)/$(HOST)/release/flannel
	ln -s ripstop-controlplane $(IMAGE)/opt/bin/flanneld

# helm and hadolint, which check the chart and the Dockerfile. Where they cannot be had, the tests that need them print
# NOT RUN and their name.
tools: setup
	configs/tools $(TOOLS)/bin || echo 'helm or hadolint cannot be had here' >&2

# The lab starts the programs as processes, so they are built first.
test: root lint build tools
	$(CARGO) test --workspace

# What else they need, QEMU and kernels, perf/vm/setup gets.
test-vm: root setup
	perf/vm/test

test-vm-short: root setup
	perf/vm/test --short

bench: setup
	$(CARGO) bench --workspace --benches

# Each scenario is a run of its own; what is measured before a Ctrl-C stays.
PERF := target/perf
# With these all of it takes less than ten minutes where nothing else runs.
PERF_SECONDS ?= 0.5
PERF_ROUNDS ?=
PERF_SCENARIOS ?= small-udp-gateway small-udp-gateway-decap small-udp-encap small-udp-decap tcp-one tcp-eight round-trips
# And for these the highest rate without loss is searched for, beside what arrives of a flood.
PERF_NDR ?= small-udp-gateway small-udp-gateway-decap small-udp-encap small-udp-decap
perf: root setup
	$(CARGO) build --release --workspace --bins
	@set -e; mkdir -p $(PERF); for scenario in $(PERF_SCENARIOS); do \
	    $(BUILT)/release/ripstop-perf run $$scenario --seconds $(PERF_SECONDS) $(PERF_ROUNDS:%=--rounds %) --out $(PERF)/$$scenario.json; \
	done
	@set -e; for scenario in $(PERF_NDR); do \
	    $(BUILT)/release/ripstop-perf ndr $$scenario --only kernel --only inject --seconds 0.2 --resolution 3 \
	        --repeats 3 --mrr-trials 3 --out $(PERF)/$$scenario-ndr.json; \
	done
	@$(BUILT)/release/ripstop-perf report $(PERF_SCENARIOS:%=$(PERF)/%.json) $(PERF_NDR:%=$(PERF)/%-ndr.json) \
	    --html $(PERF)/report.html --markdown $(PERF)/report.md
	@echo 'The report: $(PERF)/report.html, as Markdown: $(PERF)/report.md, the results beside it'

perf-check: root setup
	@test -n '$(BASE)' || { echo 'make perf-check BASE=commit [HEAD=commit] [PERF_ROUNDS=12]' >&2; exit 2; }
	$(CARGO) build --release --package ripstop-perf --bins
	$(BUILT)/release/ripstop-perf perf-check $(BASE) $(or $(HEAD),HEAD) $(PERF_ROUNDS:%=--rounds %)

deep: setup miri loom mutations fuzz

nightly:
	@rustup run nightly rustc --version >/dev/null 2>&1 || \
	    { echo 'make deep needs the nightly toolchain: rustup toolchain install nightly' >&2; exit 1; }
	@rustup run nightly cargo miri --version >/dev/null 2>&1 || rustup component add --toolchain nightly miri rust-src
.PHONY: nightly

miri: nightly
	MIRIFLAGS='-Zmiri-disable-isolation' $(CARGO) +nightly miri test -p af-xdp --lib ring
	MIRIFLAGS='-Zmiri-disable-isolation' $(CARGO) +nightly miri test -p ripstop-fib --no-default-features
	MIRIFLAGS='-Zmiri-tree-borrows' $(CARGO) +nightly miri test -p ripstop-fib --no-default-features \
	    --test suite read_only -- --ignored

# Flags of their own, so a folder of their own: the ordinary build stays as it is.
loom: setup
	CARGO_TARGET_DIR=target/loom RUSTFLAGS='--cfg loom' $(CARGO) test -p af-xdp --lib loom
	CARGO_TARGET_DIR=target/loom RUSTFLAGS='--cfg loom' $(CARGO) test -p ripstop-fib --release --lib loom

# Weakens each memory ordering in turn and demands that loom or Miri notices.
mutations: nightly
	CARGO_TARGET_DIR=$(CURDIR)/target/loom dataplane/af-xdp/mutations.sh
	dataplane/fib/mutations.sh

$(TOOLS)/bin/cargo-fuzz:
	$(CARGO) install --quiet --locked --root $(TOOLS) cargo-fuzz

# New inputs go to a folder of their own; the kept corpus changes only when somebody commits to it.
fuzz: nightly $(TOOLS)/bin/cargo-fuzz
	set -e; for target in dataplane/fib_image dataplane/forward controlplane/lease_file; do \
	    new=$(CURDIR)/target/fuzz-corpus/$$(basename $$target); mkdir -p $$new; \
	    (cd $$(dirname $$target) && PATH=$(TOOLS)/bin:$$PATH $(CARGO) +nightly fuzz run $$(basename $$target) \
	        $$new fuzz/corpus/$$(basename $$target) -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1); \
	done
