// The engine's result type: a public status code and, for failures, the reason in words.
#ifndef DATADIST_BASE_STATUS_H_
#define DATADIST_BASE_STATUS_H_

#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "base/text.h"
#include "llm_datadist/llm_datadist.h"

namespace datadist {

class [[nodiscard]] Status {
 public:
  Status() = default;
  // The text may quote what a peer or a caller said: it is made one line here, because nobody can forget it here.
  Status(llm_datadist::Status code, std::string_view text) : code_(code), text_(OneLine(text)) {}
  static Status Ok() { return Status(); }

  bool ok() const { return code_ == llm_datadist::LLM_SUCCESS; }
  llm_datadist::Status code() const { return code_; }
  const std::string &text() const { return text_; }

 private:
  llm_datadist::Status code_ = llm_datadist::LLM_SUCCESS;
  std::string text_;
};

// The answer to an argument, or to something that a peer sent, that is not allowed.
inline Status Invalid(std::string_view text) { return Status(llm_datadist::LLM_PARAM_INVALID, text); }

// A value or the Status (never ok) that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::move(value)) {}
  Result(Status status) : held_(std::move(status)) {}

  bool ok() const { return std::holds_alternative<T>(held_); }
  const Status &status() const { return std::get<Status>(held_); }
  T &value() & { return std::get<T>(held_); }
  const T &value() const & { return std::get<T>(held_); }
  T &&value() && { return std::get<T>(std::move(held_)); }

 private:
  std::variant<T, Status> held_;
};

}  // namespace datadist

#endif  // DATADIST_BASE_STATUS_H_
