// Why the last call on this thread failed.
#ifndef DATADIST_ENGINE_LAST_ERROR_H_
#define DATADIST_ENGINE_LAST_ERROR_H_

#include "base/status.h"

namespace datadist {

// Remembers the text (none for a success), logs it at ERROR within a budget, and returns the code.
llm_datadist::Status Remember(const char *call, const Status &status);

// As GetLastErrorText() without the code, for those who tell the code themselves.
const char *LastReason();

}  // namespace datadist

#endif  // DATADIST_ENGINE_LAST_ERROR_H_
