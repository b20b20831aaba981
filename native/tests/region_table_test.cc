// Registration, pins, limits and stamps.
#include "memory/region_table.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>

namespace datadist {
namespace {

using llm_datadist::CacheDesc;
using llm_datadist::CachePlacement;
using llm_datadist::LLM_KV_CACHE_NOT_EXIST;
using llm_datadist::LLM_PARAM_INVALID;

CacheDesc Desc(uint32_t num_tensors, std::vector<int64_t> shape, int type = ge::DT_INT32,
               CachePlacement placement = CachePlacement::kDevice) {
  return {placement, num_tensors, static_cast<llm_datadist::DataType>(type), std::move(shape), {}};
}

void ExpectInvalid(const Status &status, const std::string &text) {
  EXPECT_EQ(status.code(), LLM_PARAM_INVALID);
  EXPECT_NE(status.text().find(text), std::string::npos) << status.text();
}

// ---- geometry ----

TEST(Geometry, SizesOfEveryType) {
  const std::pair<int, uint64_t> bits[] = {
      {ge::DT_FLOAT, 32},      {ge::DT_FLOAT16, 16},    {ge::DT_INT8, 8},         {ge::DT_INT32, 32},
      {ge::DT_UINT8, 8},       {ge::DT_INT16, 16},      {ge::DT_UINT16, 16},      {ge::DT_UINT32, 32},
      {ge::DT_INT64, 64},      {ge::DT_UINT64, 64},     {ge::DT_DOUBLE, 64},      {ge::DT_BOOL, 8},
      {ge::DT_STRING, 128},    {ge::DT_COMPLEX64, 64},  {ge::DT_COMPLEX128, 128}, {ge::DT_QINT8, 8},
      {ge::DT_QINT16, 16},     {ge::DT_QINT32, 32},     {ge::DT_QUINT8, 8},       {ge::DT_QUINT16, 16},
      {ge::DT_STRING_REF, 128}, {ge::DT_BF16, 16},      {ge::DT_INT4, 4},         {ge::DT_UINT1, 1},
      {ge::DT_INT2, 2},        {ge::DT_UINT2, 2},       {ge::DT_COMPLEX32, 32},   {ge::DT_HIFLOAT8, 8},
      {ge::DT_FLOAT8_E5M2, 8}, {ge::DT_FLOAT8_E4M3FN, 8}, {ge::DT_FLOAT8_E8M0, 8}, {ge::DT_FLOAT6_E3M2, 6},
      {ge::DT_FLOAT6_E2M3, 6}, {ge::DT_FLOAT4_E2M1, 4}, {ge::DT_FLOAT4_E1M2, 4}};
  for (const auto &[type, expected] : bits) {
    const auto geometry = ComputeGeometry(Desc(1, {3, 11}, type));
    ASSERT_TRUE(geometry.ok()) << type;
    EXPECT_EQ(geometry.value().tensor_bytes, (33 * expected + 7) / 8) << type;
    EXPECT_EQ(geometry.value().stride, geometry.value().tensor_bytes / 3) << type;
    EXPECT_EQ(geometry.value().num_blocks, 3U);
  }
}

TEST(Geometry, Refusals) {
  for (const int type : {int{ge::DT_UNDEFINED}, int{ge::DT_RESOURCE}, int{ge::DT_VARIANT}, 5, 42, 63}) {
    ExpectInvalid(ComputeGeometry(Desc(1, {4}, type)).status(), "data_type " + std::to_string(type));
  }
  ExpectInvalid(ComputeGeometry(Desc(1, {})).status(), "0 dimensions");
  ExpectInvalid(ComputeGeometry(Desc(1, std::vector<int64_t>(32, 1))).status(), "32 dimensions");
  EXPECT_TRUE(ComputeGeometry(Desc(1, std::vector<int64_t>(31, 1))).ok());
  ExpectInvalid(ComputeGeometry(Desc(1, {4, 0})).status(), "shape[1] = 0");
  ExpectInvalid(ComputeGeometry(Desc(1, {-1})).status(), "shape[0] = -1");
  ExpectInvalid(ComputeGeometry(Desc(1, {INT64_MAX, INT64_MAX})).status(), "exceeds 64 bits");
  ExpectInvalid(ComputeGeometry(Desc(1, {INT64_MAX})).status(), "exceeds 2^64 bits");
}

// ---- registration ----

TEST(RegionTable, ChecksInOrder) {
  const auto table = RegionTable::Create({});
  ExpectInvalid(table->Register(Desc(0, {}), {}).status(), "addrs is empty");
  ExpectInvalid(table->Register(Desc(2, {}), {0}).status(), "1 entries, cache_desc.num_tensors is 2");
  ExpectInvalid(table->Register(Desc(2, {}), {4096, 0}).status(), "addrs[1] is 0");
  ExpectInvalid(table->Register(Desc(1, {}), {4096}).status(), "dimensions");
  ExpectInvalid(table->Register(Desc(1, {4}), {~uint64_t{0} - 3}).status(), "address space");
  EXPECT_EQ(table->Register(Desc(1, {4}), {4096}).value(), 1) << "ids count from 1";
  EXPECT_EQ(table->Register(Desc(1, {4}), {4096}).value(), 2) << "the same memory again stands alone";
}

TEST(RegionTable, Limits) {
  RegionLimits limits;
  limits.max_addrs_per_cache = 2;
  limits.max_device_bytes = 100;
  limits.max_host_bytes = 50;
  const auto table = RegionTable::Create(limits);
  ExpectInvalid(table->Register(Desc(3, {1}), {8, 8, 8}).status(), "at most 2");
  ExpectInvalid(table->Register(Desc(1, {101}, ge::DT_INT8), {8}).status(), "100 allowed device");
  ExpectInvalid(table->Register(Desc(1, {51}, ge::DT_INT8, CachePlacement::kHost), {8}).status(), "50 allowed host");
  const auto device = table->Register(Desc(2, {50}, ge::DT_INT8), {8, 8});
  ASSERT_TRUE(device.ok());
  ExpectInvalid(table->Register(Desc(1, {1}, ge::DT_INT8), {8}).status(), "100 of 100");
  EXPECT_TRUE(table->Register(Desc(1, {50}, ge::DT_INT8, CachePlacement::kHost), {8}).ok());
  table->Unregister(device.value());
  EXPECT_TRUE(table->Register(Desc(1, {100}, ge::DT_INT8), {8}).ok()) << "unregistering gives the bytes back";
}

TEST(RegionTable, LimitTextsNameTheOptionThatRaisesThem) {
  RegionLimits limits;
  limits.max_addrs_per_cache = 2;
  limits.max_registered_addrs = 1;
  limits.max_device_bytes = 1;
  limits.max_host_bytes = 1;
  const auto table = RegionTable::Create(limits);
  ExpectInvalid(table->Register(Desc(3, {1}), {8, 8, 8}).status(), "datadist.MaxAddrsPerCache");
  ExpectInvalid(table->Register(Desc(2, {1}), {8, 8}).status(), "datadist.MaxRegisteredAddrs");
  ExpectInvalid(table->Register(Desc(1, {2}, ge::DT_INT8), {8}).status(), "datadist.MaxDeviceBytes");
  ExpectInvalid(table->Register(Desc(1, {2}, ge::DT_INT8, CachePlacement::kHost), {8}).status(),
                "datadist.MaxHostBytes");
}

TEST(RegionTable, LimitOfAddressesOverTheCallersCaches) {
  RegionLimits limits;
  limits.max_registered_addrs = 4;
  const auto table = RegionTable::Create(limits);
  Registration owned;
  owned.owned = true;
  ASSERT_TRUE(table->Register(Desc(3, {1}), {8, 8, 8}, owned).ok());
  const auto first = table->Register(Desc(3, {1}), {8, 8, 8});
  ASSERT_TRUE(first.ok()) << "memory of a pool of ours does not count";
  ExpectInvalid(table->Register(Desc(2, {1}), {8, 8}).status(), "3 of 4 allowed addresses");
  ASSERT_TRUE(table->Register(Desc(1, {1}), {8}).ok()) << "exactly the limit";
  ExpectInvalid(table->Register(Desc(1, {1}), {8}).status(), "4 of 4 allowed addresses");
  EXPECT_TRUE(table->Register(Desc(2, {1}), {8, 8}, owned).ok());
  table->Unregister(first.value());
  EXPECT_TRUE(table->Register(Desc(3, {1}), {8, 8, 8}).ok()) << "unregistering gives the addresses back";
}

TEST(RegionTable, LayoutSaysWhatDimensionZeroCounts) {
  const auto table = RegionTable::Create({});
  struct Expected {
    CacheLayout layout;
    uint64_t batch_size;
    uint64_t num_blocks;
  };
  for (const Expected &expected : {Expected{CacheLayout::kMix, 4, 4}, Expected{CacheLayout::kContiguous, 4, 0},
                                   Expected{CacheLayout::kBlocks, 1, 4}}) {
    const Registration registration{expected.layout, false, true};
    const auto pin = table->Pin(table->Register(Desc(1, {4, 8}), {8}, registration).value());
    const RegisteredCache &cache = pin.value().cache();
    EXPECT_EQ(cache.geometry().layout, expected.layout);
    EXPECT_EQ(cache.geometry().batch_size, expected.batch_size);
    EXPECT_EQ(cache.geometry().num_blocks, expected.num_blocks);
    EXPECT_EQ(cache.geometry().stride, 32U);
    EXPECT_FALSE(cache.remote_accessible());
    EXPECT_TRUE(cache.owned());
  }
}

TEST(RegionTable, DefaultLimits) {
  const auto table = RegionTable::Create({});
  EXPECT_TRUE(table->Register(Desc(240, {1}), std::vector<uint64_t>(240, 8)).ok());
  ExpectInvalid(table->Register(Desc(241, {1}), std::vector<uint64_t>(241, 8)).status(), "at most 240");
  ExpectInvalid(table->Register(Desc(1, {(50LL << 30) + 1}, ge::DT_INT8), {8}).status(), "device");
  ExpectInvalid(table->Register(Desc(1, {(20LL << 30) + 1}, ge::DT_INT8, CachePlacement::kHost), {8}).status(), "host");
  ExpectInvalid(table->Register(Desc(2, {1LL << 60}, ge::DT_INT8), {8, 8}).status(), "device");
}

TEST(RegionTable, UnknownIdsAreNothingToUnregister) {
  const auto table = RegionTable::Create({});
  for (const int64_t id : {int64_t{0}, int64_t{-1}, int64_t{7}, INT64_MAX}) {
    table->Unregister(id);
    EXPECT_EQ(table->Pin(id).status().code(), LLM_KV_CACHE_NOT_EXIST);
  }
}

// ---- pins ----

TEST(CachePin, ResolvesOnlyWhatIsInside) {
  const auto table = RegionTable::Create({});
  const auto id = table->Register(Desc(2, {4, 16}), {0x10000, 0x20000});
  const auto pin = table->Pin(id.value());
  ASSERT_TRUE(pin.ok());
  EXPECT_EQ(pin.value().Resolve(1, 64, 192).value(), reinterpret_cast<std::byte *>(0x20040));
  EXPECT_TRUE(pin.value().Resolve(0, 0, 256).ok());
  EXPECT_TRUE(pin.value().Resolve(0, 256, 0).ok());
  constexpr uint64_t kMax = ~uint64_t{0};
  const uint64_t bad[][3] = {{2, 0, 1},      {kMax, 0, 1}, {0, 0, 257},     {0, 256, 1},      {0, 255, 2},
                             {0, kMax, 1},   {0, 1, kMax}, {0, kMax, kMax}, {0, kMax - 5, 6}, {0, 257, 0}};
  for (const auto &range : bad) {
    EXPECT_EQ(pin.value().Resolve(range[0], range[1], range[2]).status().code(), LLM_PARAM_INVALID);
  }
}

TEST(CachePin, UnregisterWaitsForEveryPinAndRefusesNewOnes) {
  const auto table = RegionTable::Create({});
  const int64_t id = table->Register(Desc(1, {4}), {0x10000}).value();
  CachePin first = std::move(table->Pin(id)).value();
  CachePin second = std::move(table->Pin(id)).value();
  const CacheStamp *stamp = first.cache().stamp();
  std::atomic<int> returned{0};
  std::thread one([&] { table->Unregister(id); ++returned; });
  while (stamp->generation.load() != 0) {
    std::this_thread::yield();
  }
  std::thread two([&] { table->Unregister(id); ++returned; });  // a second caller may not return earlier either
  EXPECT_EQ(table->Pin(id).status().code(), LLM_KV_CACHE_NOT_EXIST);
  first = CachePin();
  EXPECT_EQ(returned.load(), 0);
  CachePin moved = std::move(second);
  EXPECT_FALSE(second);
  EXPECT_EQ(returned.load(), 0);
  moved = CachePin();
  one.join();
  two.join();
  EXPECT_EQ(returned.load(), 2);
}

TEST(CachePin, KeepsTheTableAlive) {
  auto table = RegionTable::Create({});
  CachePin pin = std::move(table->Pin(table->Register(Desc(1, {4}), {0x10000}).value())).value();
  table.reset();
  EXPECT_TRUE(pin.Resolve(0, 0, 16).ok());
}

// ---- unregistering later ----

TEST(UnregisterLater, IsDoneAtOnceWithoutPins) {
  const auto table = RegionTable::Create({});
  const int64_t id = table->Register(Desc(1, {4}), {0x10000}).value();
  int gone = 0;
  table->UnregisterLater(id, [&] {
    ++gone;
    EXPECT_EQ(table->Pin(id).status().code(), LLM_KV_CACHE_NOT_EXIST) << "the callback may use the table";
  });
  EXPECT_EQ(gone, 1);
  table->UnregisterLater(id, [&] { ++gone; });
  EXPECT_EQ(gone, 1) << "an unknown id is nothing to unregister";
}

TEST(UnregisterLater, WaitsForTheLastPinWithoutBlocking) {
  RegionLimits limits;
  limits.max_registered_addrs = 1;
  const auto table = RegionTable::Create(limits);
  const int64_t id = table->Register(Desc(1, {4}), {0x10000}).value();
  CachePin first = std::move(table->Pin(id)).value();
  CachePin second = std::move(table->Pin(id)).value();
  const CacheStamp *stamp = first.cache().stamp();
  std::thread::id gone_on;
  table->UnregisterLater(id, [&] {
    gone_on = std::this_thread::get_id();
    EXPECT_TRUE(table->Register(Desc(1, {4}), {0x10000}).ok()) << "the table is not locked, the address given back";
  });
  table->UnregisterLater(id, [] { ADD_FAILURE() << "the second request is nobody's"; });
  EXPECT_EQ(stamp->generation.load(), 0U) << "other processes see it at once";
  EXPECT_EQ(table->Pin(id).status().code(), LLM_KV_CACHE_NOT_EXIST);
  ExpectInvalid(table->Register(Desc(1, {4}), {0x10000}).status(), "1 of 1 allowed addresses");
  first = CachePin();
  EXPECT_EQ(gone_on, std::thread::id());
  std::thread last([&second] { second = CachePin(); });
  const std::thread::id last_id = last.get_id();
  last.join();
  EXPECT_EQ(gone_on, last_id);
}

TEST(UnregisterLater, UnregisterWaitsForWhatWasBegun) {
  const auto table = RegionTable::Create({});
  const int64_t id = table->Register(Desc(1, {4}), {0x10000}).value();
  CachePin pin = std::move(table->Pin(id)).value();
  table->UnregisterLater(id, nullptr);
  std::atomic<bool> released{false};
  std::thread waiter([&] {
    table->Unregister(id);
    EXPECT_TRUE(released.load());
  });
  released = true;
  pin = CachePin();
  waiter.join();
}

// ---- location ----

TEST(Locate, FindsTensorAndOffset) {
  const auto table = RegionTable::Create({});
  const int64_t first = table->Register(Desc(2, {4}), {0x10000, 0x20000}).value();
  const int64_t second = table->Register(Desc(3, {8}), {0x30000, 0x10000, 0x20010}).value();
  const auto expect = [&table](uint64_t address, uint64_t length, int64_t id, uint32_t tensor, uint64_t offset) {
    const auto at = table->Locate(address, length);
    ASSERT_TRUE(at.ok()) << at.status().text();
    EXPECT_EQ(at.value().pin.cache().id(), id);
    EXPECT_EQ(at.value().tensor, tensor);
    EXPECT_EQ(at.value().offset, offset);
    EXPECT_EQ(at.value().pin.Resolve(tensor, offset, length).value(), reinterpret_cast<std::byte *>(address));
  };
  expect(0x10000, 16, first, 0, 0);
  expect(0x2000F, 1, first, 1, 15);
  expect(0x3001F, 1, second, 0, 31);
  expect(0x10000, 17, second, 1, 0);
  expect(0x20010, 32, second, 2, 0);
  table->Unregister(first);
  expect(0x10000, 16, second, 1, 0);
}

TEST(Locate, NowhereElse) {
  const auto table = RegionTable::Create({});
  ExpectInvalid(table->Locate(0x10000, 1).status(), "1 bytes at address 65536");
  const int64_t id = table->Register(Desc(2, {4}), {0x10000, 0x10010}).value();
  constexpr uint64_t kMax = ~uint64_t{0};
  const uint64_t bad[][2] = {{0xFFFF, 1},    {0xFFFF, 2}, {0x10020, 1}, {0x10000, 17}, {0x1000F, 2}, {0x10000, 0},
                             {0x10010, kMax}, {kMax, 1},  {0, 1},       {0, kMax},     {kMax, kMax}};
  for (const auto &range : bad) {
    EXPECT_EQ(table->Locate(range[0], range[1]).status().code(), LLM_PARAM_INVALID) << range[0] << " " << range[1];
  }
  const CachePin pin = std::move(table->Pin(id)).value();
  table->UnregisterLater(id, nullptr);
  EXPECT_EQ(table->Locate(0x10000, 1).status().code(), LLM_PARAM_INVALID) << "it is being unregistered";
}

TEST(Locate, KeepsTheCacheRegistered) {
  const auto table = RegionTable::Create({});
  const int64_t id = table->Register(Desc(1, {4}), {0x10000}).value();
  bool gone = false;
  {
    const auto at = table->Locate(0x10000, 1);
    ASSERT_TRUE(at.ok());
    table->UnregisterLater(id, [&gone] { gone = true; });
    EXPECT_FALSE(gone);
  }
  EXPECT_TRUE(gone);
}

// ---- stamps ----

TEST(CacheStamp, IsValidWhileRegisteredAndNeverRepeats) {
  const auto table = RegionTable::Create({});
  uint64_t last_generation = 0;
  const CacheStamp *first_stamp = nullptr;
  for (int i = 0; i < 200; ++i) {
    const int64_t id = table->Register(Desc(1, {4}), {0x10000}).value();
    const CacheStamp *stamp = nullptr;
    {
      const auto pin = table->Pin(id);
      stamp = pin.value().cache().stamp();
      EXPECT_GT(pin.value().cache().generation(), last_generation);
      last_generation = pin.value().cache().generation();
      EXPECT_EQ(stamp->generation.load(), last_generation);
    }
    first_stamp = i == 0 ? stamp : first_stamp;
    EXPECT_EQ(stamp, first_stamp) << "registrations that come and go must not use up memory";
    table->Unregister(id);
    EXPECT_EQ(stamp->generation.load(), 0U);
  }
}

TEST(RegionTable, UnregisterAllBesideOtherCalls) {
  const auto table = RegionTable::Create({});
  std::atomic<bool> stop{false};
  std::thread pinner([&] {
    for (int64_t id = 1; !stop.load(); ++id) {
      const auto pin = table->Pin(1 + id % 64);
      if (pin.ok()) {
        EXPECT_TRUE(pin.value().Resolve(0, 0, 16).ok());
      }
    }
  });
  for (int round = 0; round < 50; ++round) {
    for (int i = 0; i < 20; ++i) {
      ASSERT_TRUE(table->Register(Desc(1, {4}), {0x10000}).ok());
    }
    std::thread other([&] { table->UnregisterAll(); });
    table->UnregisterAll();
    other.join();
  }
  stop = true;
  pinner.join();
  for (int64_t id = 1; id <= 1000; ++id) {
    EXPECT_FALSE(table->Pin(id).ok());
  }
}

}  // namespace
}  // namespace datadist
