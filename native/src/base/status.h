// The engine's result type: a public status code and, for failures, the reason in words.
#ifndef DATADIST_BASE_STATUS_H_
#define DATADIST_BASE_STATUS_H_

#include <string>
#include <utility>
#include <variant>

#include "llm_datadist/llm_datadist.h"

namespace datadist {

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(llm_datadist::Status code, std::string text) : code_(code), text_(std::move(text)) {}
  static Status Ok() { return Status(); }

  bool ok() const { return code_ == llm_datadist::LLM_SUCCESS; }
  llm_datadist::Status code() const { return code_; }
  const std::string &text() const { return text_; }

 private:
  llm_datadist::Status code_ = llm_datadist::LLM_SUCCESS;
  std::string text_;
};

// The answer to an argument, or to something that a peer sent, that is not allowed.
inline Status Invalid(std::string text) { return Status(llm_datadist::LLM_PARAM_INVALID, std::move(text)); }

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
