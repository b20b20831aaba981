// Tells a process from the child that fork() made of it.
#ifndef DATADIST_BASE_PROCESS_EPOCH_H_
#define DATADIST_BASE_PROCESS_EPOCH_H_

#include <cstdint>

namespace datadist {

// Never 0, and different after fork() in the child. Unlike getpid() no system call: every API call asks.
uint64_t ProcessEpoch();

}  // namespace datadist

#endif  // DATADIST_BASE_PROCESS_EPOCH_H_
