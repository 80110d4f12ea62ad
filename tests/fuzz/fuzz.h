// A fuzzer defines LLVMFuzzerTestOneInput, which libFuzzer calls, or where the compiler has none driver.cpp. An input
// may be refused with an exception. Anything else that is not success ends the program: a sanitizer's report, another
// exception, a time limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// How the last input ended: "ok" or an error's text. An input whose outcome is new is one that driver.cpp goes on from.
inline std::string outcome;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
