// The JSON of options: what is well-formed, and what the engine reads of it.
#include "engine/json_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace datadist {
namespace {

using llm_datadist::LLM_PARAM_INVALID;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

TEST(JsonObject, MembersAsTheyAreWritten) {
  EXPECT_THAT(ParseJsonObject("{}").value(), IsEmpty());
  const auto members = ParseJsonObject(R"( {"a": -1.5e+3 , "b" : {"c": [1, {"a": 2}]}, "d":"\u00e9\"}", "e" : null} )");
  ASSERT_TRUE(members.ok()) << members.status().text();
  EXPECT_THAT(members.value(), ElementsAre(Pair("a", "-1.5e+3"), Pair("b", R"({"c": [1, {"a": 2}]})"),
                                           Pair("d", R"("\u00e9\"}")"), Pair("e", "null")));
  EXPECT_THAT(ParseJsonObject(R"({"a": 1, "a": 2})").value(), ElementsAre(Pair("a", "2")));
}

TEST(JsonObject, Malformed) {
  for (const char *text :
       {"", " ", "[]", "1", "null", "{", "}", "{}}", "{} x", "{1: 2}", "{a: 1}", R"({"a"})", R"({"a": })", R"({"a" 1})",
        R"({"a": 1,})", R"({"a": 1 "b": 2})", R"({"a": 01})", R"({"a": 1.})", R"({"a": .5})", R"({"a": 1e})",
        R"({"a": +1})", R"({"a": -})", R"({"a": tru})", R"({"a": "x)", R"({"a": "\x"})", R"({"a": "\u12g4"})",
        "{\"a\": \"\n\"}", R"({"a": [1,]})", R"({"a": [1})"}) {
    const auto members = ParseJsonObject(text);
    EXPECT_EQ(members.status().code(), LLM_PARAM_INVALID) << text;
    EXPECT_THAT(members.status().text(), HasSubstr("not a well-formed JSON object (at byte "));
  }
}

TEST(JsonObject, DepthIsLimited) {
  const auto nested = [](size_t depth) { return "{\"a\": " + std::string(depth, '[') + std::string(depth, ']') + "}"; };
  EXPECT_TRUE(ParseJsonObject(nested(60)).ok());
  EXPECT_FALSE(ParseJsonObject(nested(100)).ok());
  EXPECT_FALSE(ParseJsonObject("{\"a\": " + std::string(1 << 20, '[')).ok());
}

TEST(LocalCommRes, KnownVersions) {
  const std::pair<const char *, const char *> accepted[] = {
      {"", ""}, {R"({"version": "1.0"})", "1.0"}, {R"({"version":"1.2","x":[]})", "1.2"},
      {R"({"version" : "1.3"})", "1.3"}};
  for (const auto &[text, version] : accepted) {
    const Result<std::string> parsed = ParseLocalCommRes(text);
    ASSERT_TRUE(parsed.ok()) << text;
    EXPECT_EQ(parsed.value(), version);
  }
  const std::pair<const char *, const char *> refused[] = {
      {"mock", "not a well-formed JSON object"},  {"{}", "no version"},
      {R"({"version": "1.1"})", R"("1.1")"},      {R"({"version": 1.3})", "version 1.3, allowed"},
      {R"({"x": {"version": "1.3"}})", "no version"}};
  for (const auto &[text, said] : refused) {
    const Status status = ParseLocalCommRes(text).status();
    EXPECT_EQ(status.code(), LLM_PARAM_INVALID) << text;
    EXPECT_THAT(status.text(), HasSubstr("llm.LocalCommRes"));
    EXPECT_THAT(status.text(), HasSubstr(said));
  }
}

TEST(PoolConfigJson, Accepted) {
  const auto plain = ParsePoolConfig("x", R"({"memory_size": 1073741824})");
  ASSERT_TRUE(plain.ok()) << plain.status().text();
  EXPECT_EQ(plain.value().memory_size, uint64_t{1} << 30);
  EXPECT_EQ(plain.value().page_shift, 16U);
  for (const uint32_t shift : {10U, 30U}) {
    const std::string text = R"({"page_shift": )" + std::to_string(shift) + R"(, "memory_size": 1, "other": {}})";
    const auto config = ParsePoolConfig("x", text);
    ASSERT_TRUE(config.ok()) << config.status().text();
    EXPECT_EQ(config.value().page_shift, shift);
    EXPECT_EQ(config.value().memory_size, 1U);
  }
}

TEST(PoolConfigJson, FewerThanTwoToThe32Minus1Pages) {
  const uint64_t too_many = ((uint64_t{1} << 32) - 1) << 10;
  const auto text = [](uint64_t size) {
    return R"({"page_shift": 10, "memory_size": )" + std::to_string(size) + "}";
  };
  EXPECT_EQ(ParsePoolConfig("x", text(too_many - 1)).value().memory_size, too_many - 1);
  const auto refused = ParsePoolConfig("x", text(too_many));
  EXPECT_EQ(refused.status().code(), LLM_PARAM_INVALID);
  EXPECT_THAT(refused.status().text(), HasSubstr("1.." + std::to_string(too_many - 1)));
}

TEST(PoolConfigJson, RefusalsNameOptionMemberAndValue) {
  struct Refused {
    const char *text;
    const char *said;
  };
  for (const Refused &refused : {
           Refused{"", "not a well-formed JSON object"},
           Refused{"1024", "not a well-formed JSON object"},
           Refused{"{}", "memory_size is missing"},
           Refused{R"({"page_shift": 16})", "memory_size is missing"},
           Refused{R"({"memory_size": 0})", "memory_size: 0, allowed: a number in 1.."},
           Refused{R"({"memory_size": -1})", "memory_size: -1"},
           Refused{R"({"memory_size": 1.5})", "memory_size: 1.5"},
           Refused{R"({"memory_size": 1e9})", "memory_size: 1e9"},
           Refused{R"({"memory_size": "1024"})", R"(memory_size: "1024")"},
           Refused{R"({"memory_size": null})", "memory_size: null"},
           Refused{R"({"memory_size": 18446744073709551616})", "memory_size: 18446744073709551616"},
           Refused{R"({"memory_size": 1, "page_shift": 9})", "page_shift: 9, allowed: a number in 10..30"},
           Refused{R"({"memory_size": 1, "page_shift": 31})", "page_shift: 31"},
           Refused{R"({"memory_size": 1, "page_shift": -16})", "page_shift: -16"},
           Refused{R"({"memory_size": 1, "page_shift": 16.0})", "page_shift: 16.0"},
           Refused{R"({"memory_size": 1, "page_shift": null})", "page_shift: null"}}) {
    const auto config = ParsePoolConfig("llm.MemPoolConfig", refused.text);
    EXPECT_EQ(config.status().code(), LLM_PARAM_INVALID) << refused.text;
    EXPECT_THAT(config.status().text(), HasSubstr("llm.MemPoolConfig: '" + std::string(refused.text) + "'"));
    EXPECT_THAT(config.status().text(), HasSubstr(refused.said));
  }
}

}  // namespace
}  // namespace datadist
