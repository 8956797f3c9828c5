# The commands of the README. `make install` is all that a fresh Debian 12 machine needs first.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN = $(PLACE)/bin
# One line each: what it is for.
#   python3-venv python3-dev gcc libffi-dev    the venv and the compiled door to libtpms
#   libtpms-dev                                the TPM itself
#   libtss2-dev pkg-config                     tpm2-pytss, which talks to the platform TPM
#   libtss2-tcti-*                             ways to reach a platform TPM: device, swtpm
APT_RUN := python3-venv python3-dev gcc libffi-dev libtpms-dev libtss2-dev pkg-config \
  libtss2-tcti-device0 libtss2-tcti-swtpm0
#   qemu-system-x86 ovmf seabios               guests of demo and tests, under emulation
#   tpm2-tools busybox-static kmod             what the guests run
#   swtpm swtpm-tools                          stand-in for a hardware TPM in tests; peer in benchmarks
#   strace                                     tests of durability look at system calls
#   systemd-boot-efi                           EFI stub of guests' unified kernel images; objcopy comes with gcc
#   osslsigncode                               peer for Authenticode digests
#   procps util-linux dpkg cpio lz4            ps, setpriv and unshare, and unpacking kernels and images
# Fetched by tests with `apt-get download`, not installed: the kernels of linux-image-cloud-amd64 and linux-image-amd64, Xen
# (xen-hypervisor-4.17-amd64, xen-utils-4.17, and what tests/support/xen/images.py names for them).
APT_TEST := qemu-system-x86 ovmf seabios tpm2-tools busybox-static kmod swtpm swtpm-tools strace \
  systemd-boot-efi osslsigncode procps util-linux cpio lz4 linux-libc-dev

.PHONY: install demo test test-xen soak bench lint clean always

# Services give up root's rights and must be able to read the program. Where they could not (a checkout in root's home),
# the program is installed beside the checkout's folder tree, and .venv is a link to it.
HIDDEN := $(shell [ "$$(id -u)" = 0 ] && ! setpriv --reuid=65534 --regid=65534 --clear-groups test -r '$(CURDIR)/pyproject.toml' 2>/dev/null && echo yes)
PLACE := $(if $(HIDDEN),/opt/vtpm/$(shell pwd | sha256sum | cut -c1-12),$(CURDIR)/$(VENV))

install: .install-stamp

.install-stamp: requirements.lock pyproject.toml setup.py src/vtpm/engine/_build.py src/vtpm/engine/door.c Makefile $(if $(HIDDEN),always)
	@missing=$$(dpkg-query -W -f='$${Package} $${Status}\n' $(APT_RUN) $(APT_TEST) 2>/dev/null \
	  | awk '/ok installed/ {have[$$1]=1} END {n=split("$(APT_RUN) $(APT_TEST)", want); for (i=1; i<=n; i++) if (!have[want[i]]) print want[i]}'); \
	if [ -n "$$missing" ]; then \
	  echo "installing Debian packages:" $$missing; \
	  if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	  $$sudo apt-get update -q && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi
	$(if $(HIDDEN),@echo "other users cannot read this folder: the program goes to $(PLACE)"; mkdir -p $(PLACE) && ln -sfn $(PLACE) $(VENV))
	$(PYTHON) -m venv $(PLACE)
	$(PLACE)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(PLACE)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps $(if $(HIDDEN),--force-reinstall .,-e .)
	@touch $@

always:

demo: install
	$(BIN)/python -m tests.support.demo

test: install
	$(BIN)/python -m pytest -m "not soak"

# Of those, what runs on real Xen under emulation.
test-xen: install
	$(BIN)/python -m pytest -m "not soak" tests/integration/xen

# Long runs; their last result stands in docs/reliability.md.
soak: install
	$(BIN)/python -m pytest -m soak --timeout 7200 -s
	VTPM_FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest tests/fuzz --timeout 3600

bench: install
	$(BIN)/python -m bench

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(PLACE) .install-stamp build src/vtpm/engine/_libtpms*.so src/vtpm/engine/_libtpms.c
