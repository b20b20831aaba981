// The libraries that stand in for CANN's (standin/README.md), and processes to load them in: what a process has once
// loaded stays loaded.
#ifndef DATADIST_TESTS_SUPPORT_STANDIN_H_
#define DATADIST_TESTS_SUPPORT_STANDIN_H_

#include <functional>
#include <string>

namespace datadist::testing {

// Path of a file beside this test's program: "standin/libllm_datadist.so".
std::string BuiltFile(const std::string &name);

// What `act` returns in a child of this process; how the child ended, if it did not end by itself.
std::string InChild(const std::function<std::string()> &act);

// The provider "cann" over the stand-in, from now on in this process.
void UseStandIn();

}  // namespace datadist::testing

#endif  // DATADIST_TESTS_SUPPORT_STANDIN_H_
