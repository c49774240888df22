#!/usr/bin/env bash
# Makes an aarch64 Python with torch that runs on an x86-64 Debian machine, under user-mode emulation, and prints its
# folder. Kept between runs: ${XDG_CACHE_HOME:-~/.cache}/mnops-arm, or MNOPS_ARM_CACHE. Needs root only for apt, where a
# tool is missing; no container, no binfmt, no foreign architecture.
#   FOLDER/python     the emulated interpreter; ARM_CPU=cortex-a53 chooses the CPU (default: max, which has everything)
#   FOLDER/packages   its site-packages: the aarch64 wheels
# PIP_ARGS goes to pip.
set -euo pipefail
torch=2.10.0  # the oldest that the stable ABI asks for, and the last whose aarch64 wheel is a CPU build
suite=bookworm
version=3.11
cache=${MNOPS_ARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mnops-arm}
root=$cache/root packages=$cache/packages
fail() { echo "tools/arm/environment.sh: $*" >&2; exit 1; }
[ "$(uname -m)" = x86_64 ] || fail "this emulates ARM on x86-64; on $(uname -m) run make test"
mkdir -p "$cache"

missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
command -v cmake >/dev/null || missing+=(cmake)
command -v ninja >/dev/null || missing+=(ninja-build)
if ((${#missing[@]})); then
  command -v apt-get >/dev/null || fail "needs the Debian packages ${missing[*]}, and there is no apt-get here"
  [ "$(id -u)" = 0 ] || fail "as root, once: apt-get install --no-install-recommends ${missing[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >&2 ||
    fail "apt-get could not install ${missing[*]}: is Debian's package archive within reach?"
fi

# The system: downloaded and unpacked, nothing in it runs on the way. libpython-dev brings the headers for mnops._C.
if [ ! -e "$root/ready" ]; then
  rm -rf "$root"
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 2>/dev/null | sed -n "s/ $suite\$//p" | head -n 1 || true)
  mmdebstrap --quiet --variant=extract --architectures=arm64 \
    --include="python$version-minimal,libpython$version-stdlib,libpython$version-dev,libstdc++6,libgomp1" \
    "$suite" "$root" ${mirror:+"$mirror"} >&2 ||
    fail "mmdebstrap could not fetch Debian $suite for arm64 from ${mirror:-its default mirror}: is it within reach?"
  rm -rf "$root"/{tmp,dev,var,run,proc,sys}  # the emulator prefers what is here to the host's
  touch "$root/ready"
fi

# The wheels. pip's markers see the x86 host, so torch comes without its (CUDA) dependencies and the rest by name.
if [ ! -e "$packages/$torch" ]; then
  rm -rf "$packages" "$cache/wheels"
  pip=(python3 -m pip)
  if ! "${pip[@]}" --version >/dev/null 2>&1; then
    python3 -m venv "$cache/venv" || fail "needs pip or venv in python3: apt-get install python3-venv"
    pip=("$cache/venv/bin/python" -m pip)
  fi
  platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64)
  get() {
    # shellcheck disable=SC2086  # PIP_ARGS is several words
    "${pip[@]}" download -q --disable-pip-version-check ${PIP_ARGS:-} --only-binary=:all: -d "$cache/wheels" \
      --python-version $version --implementation cp --abi cp311 --abi abi3 --abi none "${platforms[@]}" "$@" >&2 ||
      fail "pip could not download the aarch64 wheels of $*: is the package index within reach?"
  }
  get --no-deps torch==$torch
  get numpy pytest hypothesis pybind11 setuptools wheel filelock typing-extensions sympy networkx jinja2 fsspec
  for wheel in "$cache"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$packages"; done
  rm -rf "$cache/wheels"
  touch "$packages/$torch"
fi

# -0 and PYTHONHOME make sys.executable this script, so a subprocess of the emulated Python is emulated too.
cat > "$cache/python" <<SH2
#!/bin/sh
exec qemu-aarch64 \${QEMU_ARGS:-} -cpu \${ARM_CPU:-max} -0 "$cache/python" -L "$root" -E OMP_WAIT_POLICY=passive \\
  -E PYTHONHOME="$root/usr" -E PYTHONPATH="\${PYTHONPATH:+\$PYTHONPATH:}$packages" "$root/usr/bin/python$version" "\$@"
SH2
chmod +x "$cache/python"
echo "$cache"
