// Waiting for states that can only be asked for.
#ifndef DATADIST_TESTS_SUPPORT_EVENTUALLY_H_
#define DATADIST_TESTS_SUPPORT_EVENTUALLY_H_

#include <chrono>
#include <functional>

namespace datadist::testing {

constexpr std::chrono::seconds kPatience{60};

// Waits, within kPatience, until `holds` says so.
bool Eventually(const std::function<bool()> &holds);

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_EVENTUALLY_H_
