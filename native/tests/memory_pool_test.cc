// Pools: where memory is handed out, that it starts as zeros, and that it goes back to the kernel.
#include "cache/memory_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace datadist {
namespace {

using llm_datadist::LLM_OUT_OF_MEMORY;
using llm_datadist::LLM_PARAM_INVALID;
using ::testing::HasSubstr;

std::shared_ptr<MemoryPool> Pool(uint64_t memory_size, uint32_t page_shift) {
  return MemoryPool::Create({memory_size, page_shift}).value();
}

uint8_t *Bytes(uint64_t address) { return reinterpret_cast<uint8_t *>(static_cast<uintptr_t>(address)); }

uint64_t SystemPage() { return static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)); }

bool Resident(uint64_t address) {
  unsigned char state = 0;
  EXPECT_EQ(::mincore(Bytes(address / SystemPage() * SystemPage()), 1, &state), 0);
  return (state & 1) != 0;
}

TEST(MemoryPool, RoundsAndAlignsToItsPages) {
  for (const uint32_t shift : {10U, 12U, 16U, 21U}) {
    const uint64_t page = uint64_t{1} << shift;
    const auto pool = Pool(8 * page, shift);
    const uint64_t one = pool->Allocate(1).value();
    const uint64_t two = pool->Allocate(page + 1).value();
    EXPECT_EQ(one % page, 0U);
    EXPECT_EQ(two, one + page);
    EXPECT_EQ(pool->used(), 3 * page);
    EXPECT_EQ(pool->Allocate(5 * page).value(), one + 3 * page) << "all of it can be used";
    EXPECT_EQ(pool->used(), 8 * page);
  }
}

TEST(MemoryPool, ExhaustionNamesWhatIsWantedAndLeft) {
  const auto pool = Pool(4 * 65536 + 65535, 16);
  ASSERT_TRUE(pool->Allocate(3 * 65536).ok());
  const auto refused = pool->Allocate(65537);
  EXPECT_EQ(refused.status().code(), LLM_OUT_OF_MEMORY);
  EXPECT_THAT(refused.status().text(), HasSubstr("65537 bytes wanted"));
  EXPECT_THAT(refused.status().text(), HasSubstr("65536 of 262144 bytes are free"));
  EXPECT_TRUE(pool->Allocate(65536).ok()) << "a refusal takes nothing";
  EXPECT_EQ(pool->Allocate(1).status().code(), LLM_OUT_OF_MEMORY) << "a page begun is not handed out";
}

TEST(MemoryPool, SizesThatCannotBe) {
  const auto pool = Pool(65536, 16);
  EXPECT_EQ(pool->Allocate(0).status().code(), LLM_PARAM_INVALID);
  for (const uint64_t bytes : {uint64_t{65537}, UINT64_MAX, UINT64_MAX - 65535, uint64_t{1} << 63}) {
    EXPECT_EQ(pool->Allocate(bytes).status().code(), LLM_OUT_OF_MEMORY) << bytes;
  }
  EXPECT_EQ(Pool(1000, 10)->Allocate(1).status().code(), LLM_OUT_OF_MEMORY) << "less than a page";
  for (const uint64_t size : {uint64_t{1} << 61, UINT64_MAX}) {
    const auto pool_of = MemoryPool::Create({size, 30});
    EXPECT_EQ(pool_of.status().code(), LLM_OUT_OF_MEMORY);
    EXPECT_THAT(pool_of.status().text(), HasSubstr(std::to_string(size)));
  }
}

TEST(MemoryPool, FreeNeighboursBecomeOnePiece) {
  for (const std::vector<int> &order : {std::vector{0, 1, 2}, {2, 1, 0}, {0, 2, 1}, {1, 0, 2}}) {
    const auto pool = Pool(4 * 4096, 12);
    std::vector<uint64_t> pieces;
    for (int i = 0; i < 4; ++i) {
      pieces.push_back(pool->Allocate(4096).value());
    }
    for (const int piece : order) {
      EXPECT_EQ(pool->Allocate(3 * 4096).status().code(), LLM_OUT_OF_MEMORY);
      pool->Free(pieces[static_cast<size_t>(piece)]);
    }
    EXPECT_EQ(pool->Allocate(3 * 4096).value(), pieces[0]);
  }
}

TEST(MemoryPool, ForeignAddressesAreNotFreed) {
  const auto pool = Pool(4 * 4096, 12);
  const uint64_t address = pool->Allocate(2 * 4096).value();
  for (const uint64_t other : {uint64_t{0}, address - 1, address + 1, address + 4096, address + 4 * 4096, UINT64_MAX}) {
    pool->Free(other);
  }
  EXPECT_EQ(pool->used(), 2U * 4096);
}

// With a page of 1 KiB a system page is shared: freeing one part must leave the others alone.
TEST(MemoryPool, WhatIsFreedComesBackAsZerosAndNothingElseChanges) {
  for (const uint32_t shift : {10U, 11U, 12U, 16U}) {
    const uint64_t page = uint64_t{1} << shift;
    const auto pool = Pool(64 * page, shift);
    const uint64_t before = pool->Allocate(3 * page).value();
    const uint64_t freed = pool->Allocate(18 * page).value();
    const uint64_t after = pool->Allocate(page).value();
    std::memset(Bytes(before), 0x11, 3 * page);
    std::memset(Bytes(freed), 0x22, 18 * page);
    std::memset(Bytes(after), 0x33, page);
    pool->Free(freed);
    EXPECT_EQ(pool->Allocate(18 * page).value(), freed);
    const auto all = [](uint64_t address, uint64_t bytes, uint8_t value) {
      return std::all_of(Bytes(address), Bytes(address) + bytes, [value](uint8_t byte) { return byte == value; });
    };
    EXPECT_TRUE(all(freed, 18 * page, 0)) << shift;
    EXPECT_TRUE(all(before, 3 * page, 0x11)) << shift;
    EXPECT_TRUE(all(after, page, 0x33)) << shift;
  }
}

TEST(MemoryPool, FreedMemoryGoesBackToTheKernel) {
  const auto pool = Pool(8 * SystemPage(), 12);
  const uint64_t address = pool->Allocate(2 * SystemPage()).value();
  EXPECT_FALSE(Resident(address)) << "not before it is touched";
  std::memset(Bytes(address), 1, 2 * SystemPage());
  EXPECT_TRUE(Resident(address) && Resident(address + SystemPage()));
  pool->Free(address);
  EXPECT_FALSE(Resident(address) || Resident(address + SystemPage()));
}

TEST(MemoryPool, ASharedSystemPageGoesBackWithItsLastPart) {
  const auto pool = Pool(4 * SystemPage(), 10);
  std::vector<uint64_t> parts;
  for (uint64_t at = 0; at < 2 * SystemPage(); at += 1024) {
    parts.push_back(pool->Allocate(1024).value());
    std::memset(Bytes(parts.back()), 1, 1024);
  }
  std::shuffle(parts.begin(), parts.end(), std::mt19937(1));
  const uint64_t first = *std::min_element(parts.begin(), parts.end());
  while (parts.size() > 1) {
    pool->Free(parts.back());
    parts.pop_back();
  }
  EXPECT_TRUE(Resident(parts[0]));
  pool->Free(parts[0]);
  EXPECT_FALSE(Resident(first) || Resident(first + SystemPage()));
}

// First fit over a plain array of pages.
TEST(MemoryPool, MatchesASlowModel) {
  constexpr uint64_t kPage = 1024;
  constexpr size_t kPages = 48;
  const auto pool = Pool(kPages * kPage, 10);
  const uint64_t base = pool->Allocate(1).value();
  pool->Free(base);
  std::vector<bool> taken(kPages, false);
  std::vector<std::pair<size_t, size_t>> pieces;  // first page, number
  std::mt19937 random(20);
  for (int step = 0; step < 5000; ++step) {
    if (random() % 2 == 0) {
      const size_t wanted = 1 + random() % 9;
      size_t at = 0;
      while (at + wanted <= kPages && std::find(taken.begin() + static_cast<int64_t>(at),
                                                taken.begin() + static_cast<int64_t>(at + wanted), true) !=
                                          taken.begin() + static_cast<int64_t>(at + wanted)) {
        ++at;
      }
      const auto address = pool->Allocate(wanted * kPage - random() % kPage);
      ASSERT_EQ(address.ok(), at + wanted <= kPages);
      if (address.ok()) {
        ASSERT_EQ(address.value(), base + at * kPage);
        std::fill_n(taken.begin() + static_cast<int64_t>(at), wanted, true);
        pieces.emplace_back(at, wanted);
      }
    } else if (!pieces.empty()) {
      const auto piece = pieces.begin() + static_cast<int64_t>(random() % pieces.size());
      pool->Free(base + piece->first * kPage);
      std::fill_n(taken.begin() + static_cast<int64_t>(piece->first), piece->second, false);
      pieces.erase(piece);
    }
    ASSERT_EQ(pool->used(), kPage * static_cast<uint64_t>(std::count(taken.begin(), taken.end(), true)));
  }
}

TEST(MemoryPool, ThreadsNeverShareBytes) {
  const auto pool = Pool(64 * 1024, 10);
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&pool, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 500; ++i) {
        const uint64_t bytes = 1 + random() % 9000;
        const auto address = pool->Allocate(bytes);
        if (!address.ok()) {
          continue;
        }
        const auto only = [&](uint8_t value) {
          const uint8_t *start = Bytes(address.value());
          return std::all_of(start, start + bytes, [value](uint8_t byte) { return byte == value; });
        };
        EXPECT_TRUE(only(0));
        std::memset(Bytes(address.value()), static_cast<int>(seed), bytes);
        EXPECT_TRUE(only(static_cast<uint8_t>(seed)));
        pool->Free(address.value());
      }
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
  EXPECT_EQ(pool->used(), 0U);
}

}  // namespace
}  // namespace datadist
