// Texts that others chose, made fit for people: error texts, names, reasons.
#ifndef DATADIST_BASE_TEXT_H_
#define DATADIST_BASE_TEXT_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace datadist {

constexpr size_t kMaxShownText = 2048;

// One line of valid UTF-8, at most kMaxShownText bytes: control characters and line ends become spaces, what is no
// UTF-8 becomes '?', and the end is cut. Python refuses a text that is no UTF-8 when it is too late to say so, and a
// line end in a log lets a peer write lines of its own.
std::string OneLine(std::string_view text);

}  // namespace datadist

#endif  // DATADIST_BASE_TEXT_H_
