// Values of the channel as Python has them: digests and tokens as 32 hex digits, times as seconds.
#ifndef DATADIST_BINDINGS_CHANNEL_VALUES_H_
#define DATADIST_BINDINGS_CHANNEL_VALUES_H_

#include <pybind11/pybind11.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "channel/lease_table.h"

namespace datadist::bindings {

// ValueError unless `text` is 32 hex digits, in lower case.
std::array<uint8_t, 16> FromHex(const std::string &text);
std::string ToHex(const std::array<uint8_t, 16> &bytes);
std::vector<LeaseToken> ToTokens(const std::vector<std::string> &texts);
pybind11::tuple FromTokens(const std::vector<LeaseToken> &tokens);

// Any str, also one that UTF-8 has no form for: ids come from clients, and must come back as they were.
std::string ToBytes(const pybind11::str &text);
pybind11::object FromBytes(const std::string &bytes);

// ValueError for what is no number; beyond what a clock can count it is as long as that.
std::chrono::nanoseconds FromSeconds(double seconds);

// Raises what Python expects: ValueError for an argument, OSError for what the system refused.
[[noreturn]] void Raise(const Status &status);

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_CHANNEL_VALUES_H_
