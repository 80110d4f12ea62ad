# Cross-compiles for 64-bit Arm Linux, and runs what is compiled under QEMU. On Debian and Ubuntu:
#
#   apt-get install g++-aarch64-linux-gnu qemu-user
#   cmake -S . -B build/arm -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake -DQLN_BUILD_TESTS=ON \
#         -DQLN_CUDA=OFF -DQLN_CUDA_EMULATED=OFF
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;/usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
# The processors on which the tests run, by QEMU's names: all it knows, and one without BF16.
set(QLN_TEST_PROCESSORS max cortex-a72 CACHE STRING "Processors that QEMU is to be for the tests")
