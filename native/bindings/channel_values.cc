#include "channel_values.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace py = pybind11;

namespace datadist::bindings {
namespace {

constexpr char kDigits[] = "0123456789abcdef";

uint8_t DigitOf(char digit) {
  if (digit >= '0' && digit <= '9') {
    return static_cast<uint8_t>(digit - '0');
  }
  if (digit < 'a' || digit > 'f') {
    throw py::value_error("not 32 hex digits in lower case");
  }
  return static_cast<uint8_t>(digit - 'a' + 10);
}

}  // namespace

std::array<uint8_t, 16> FromHex(const std::string &text) {
  std::array<uint8_t, 16> bytes{};
  if (text.size() != 2 * bytes.size()) {
    throw py::value_error("not 32 hex digits in lower case");
  }
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<uint8_t>(DigitOf(text[2 * i]) << 4U | DigitOf(text[2 * i + 1]));
  }
  return bytes;
}

std::string ToHex(const std::array<uint8_t, 16> &bytes) {
  std::string text;
  text.reserve(2 * bytes.size());
  for (const uint8_t byte : bytes) {
    text.push_back(kDigits[byte >> 4U]);
    text.push_back(kDigits[byte & 15U]);
  }
  return text;
}

std::vector<LeaseToken> ToTokens(const std::vector<std::string> &texts) {
  std::vector<LeaseToken> tokens;
  tokens.reserve(texts.size());
  for (const std::string &text : texts) {
    tokens.push_back(FromHex(text));
  }
  return tokens;
}

py::tuple FromTokens(const std::vector<LeaseToken> &tokens) {
  py::tuple texts(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    texts[i] = ToHex(tokens[i]);
  }
  return texts;
}

std::string ToBytes(const py::str &text) {
  if (PyUnicode_IS_ASCII(text.ptr())) {
    return {static_cast<const char *>(PyUnicode_DATA(text.ptr())), static_cast<size_t>(PyUnicode_GET_LENGTH(text.ptr()))};
  }
  const auto bytes =
      py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
  if (!bytes) {
    throw py::error_already_set();
  }
  return bytes;
}

py::object FromBytes(const std::string &bytes) {
  const auto size = static_cast<Py_ssize_t>(bytes.size());
  auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(bytes.data(), size, "surrogatepass"));
  if (!text) {
    throw py::error_already_set();
  }
  return text;
}

std::chrono::nanoseconds FromSeconds(double seconds) {
  if (std::isnan(seconds)) {
    throw py::value_error("nan is no number of seconds");
  }
  constexpr double kLongest = 1e9;
  return std::chrono::nanoseconds(std::llround(std::clamp(seconds, 0.0, kLongest) * 1e9));
}

void Raise(const Status &status) {
  if (status.code() == llm_datadist::LLM_PARAM_INVALID) {
    throw py::value_error(status.text());
  }
  PyErr_SetString(PyExc_OSError, status.text().c_str());
  throw py::error_already_set();
}

}  // namespace datadist::bindings
