// The life of allocated caches under many threads: peers pull by keys while the owner deallocates and allocates.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "support/caches.h"

namespace datadist::testing {
namespace {

using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_SUCCESS;

constexpr uint32_t kTensors = 4;
constexpr uint64_t kCaches = kPoolPages / kTensors;  // that fit at a time
constexpr uint64_t kWordsPerPage = kPage / sizeof(uint64_t);

// Pop gives nothing once the queue is closed and empty.
template <typename T>
class Queue {
 public:
  void Push(T item) {
    const std::lock_guard<std::mutex> lock(mutex_);
    items_.push_back(std::move(item));
    changed_.notify_all();
  }
  void Close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  std::optional<T> Pop() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || !items_.empty(); });
    if (items_.empty()) {
      return std::nullopt;
    }
    T item = std::move(items_.front());
    items_.pop_front();
    return item;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<T> items_;
  bool closed_ = false;
};

// One cache, shared by the owner and every puller. The last to be done with it lets the owner allocate another.
struct Offer {
  Offer(uint64_t request_id, bool is_removed, Queue<int> &all_places)
      : request(request_id), removed(is_removed), places(all_places) {}
  Offer(const Offer &) = delete;
  Offer &operator=(const Offer &) = delete;
  ~Offer() {
    EXPECT_TRUE(successes == 1 || (removed && successes == 0)) << successes << " pulls by key " << request;
    places.Push(0);
  }

  const uint64_t request;
  const bool removed;  // its owner removes the key, too
  Queue<int> &places;
  std::atomic<int> successes{0};
};

uint64_t *Words(uint64_t address) { return reinterpret_cast<uint64_t *>(static_cast<uintptr_t>(address)); }

class CacheRace : public CacheRegistryTest {
 protected:
  using Offers = Queue<std::shared_ptr<Offer>>;

  // Reads everything, as a transfer does, and only then takes the key.
  void Pull(const std::shared_ptr<Offer> &offer) {
    const CacheKey key = Request(offer->request);
    const auto named = caches_.Find(CacheRef::Key(key));
    if (!named.ok()) {
      EXPECT_EQ(named.status().code(), LLM_KV_CACHE_NOT_EXIST);
      return;
    }
    const RegisteredCache &cache = named.value().pin.cache();
    for (const uint64_t address : cache.addrs()) {
      EXPECT_TRUE(std::all_of(Words(address), Words(address) + kWordsPerPage,
                              [&offer](uint64_t word) { return word == offer->request; }))
          << "bytes of another cache";
      std::this_thread::yield();  // so that other threads come between
    }
    const auto status = caches_.Consume(key, cache.generation(), 0, kTensors).code();
    EXPECT_TRUE(status == LLM_SUCCESS || status == LLM_KV_CACHE_NOT_EXIST) << status;
    offer->successes += status == LLM_SUCCESS ? 1 : 0;
  }
  void PullAll(Offers &offers) {
    while (const auto offer = offers.Pop()) {
      Pull(*offer);
    }
  }
  // Allocates a cache full of its request's number; its id, 0 for none.
  int64_t Fill(uint64_t request) {
    const auto made = caches_.Allocate(Desc(kTensors, 4), CacheLayout::kContiguous, {Request(request)});
    EXPECT_TRUE(made.ok()) << made.status().text();
    if (!made.ok()) {
      return 0;
    }
    for (const uint64_t address : made.value().addrs) {
      EXPECT_TRUE(std::all_of(Words(address), Words(address) + kWordsPerPage, [](uint64_t word) { return word == 0; }));
      std::fill_n(Words(address), kWordsPerPage, request);
    }
    return made.value().cache_id;
  }
};

TEST_F(CacheRace, OnePullWinsAndNoMemoryIsReusedUnderAnother) {
  constexpr uint64_t kOffers = 600;
  Queue<int> places;
  for (uint64_t i = 0; i < kCaches; ++i) {
    places.Push(0);
  }
  std::array<Offers, 3> offers;
  std::vector<std::thread> pullers;
  for (Offers &own : offers) {
    pullers.emplace_back([this, &own] { PullAll(own); });
  }
  for (uint64_t request = 1; request <= kOffers; ++request) {
    places.Pop();
    const int64_t cache_id = Fill(request);
    const auto offer = std::make_shared<Offer>(request, request % 4 == 0, places);
    for (Offers &queue : offers) {
      queue.Push(offer);
    }
    EXPECT_TRUE(caches_.Deallocate(cache_id).ok());
    if (offer->removed) {
      EXPECT_TRUE(caches_.RemoveKey(Request(request)).ok());
    }
  }
  for (Offers &queue : offers) {
    queue.Close();
  }
  for (std::thread &puller : pullers) {
    puller.join();
  }
  EXPECT_EQ(Used(), 0U);
}

}  // namespace
}  // namespace datadist::testing
