# Cross-compiles for aarch64 Linux with Debian's g++-aarch64-linux-gnu. Everything else (Python, torch) is found
# through the emulated interpreter that setup.py runs in.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
