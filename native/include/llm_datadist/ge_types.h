// The few `ge` types that the LLM-DataDist API is spelled in: status word, data types, AscendString.
//
// Enumerator values are part of the API (programs store and exchange them) and must not change. C++14 is enough for the
// public headers.
#ifndef LLM_DATADIST_GE_TYPES_H_
#define LLM_DATADIST_GE_TYPES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace ge {

using Status = uint32_t;
constexpr Status SUCCESS = 0;
constexpr Status FAILED = 0xFFFFFFFF;

enum DataType {
  DT_FLOAT = 0,
  DT_FLOAT16 = 1,
  DT_INT8 = 2,
  DT_INT32 = 3,
  DT_UINT8 = 4,
  DT_INT16 = 6,
  DT_UINT16 = 7,
  DT_UINT32 = 8,
  DT_INT64 = 9,
  DT_UINT64 = 10,
  DT_DOUBLE = 11,
  DT_BOOL = 12,
  DT_STRING = 13,
  DT_DUAL_SUB_INT8 = 14,
  DT_DUAL_SUB_UINT8 = 15,
  DT_COMPLEX64 = 16,
  DT_COMPLEX128 = 17,
  DT_QINT8 = 18,
  DT_QINT16 = 19,
  DT_QINT32 = 20,
  DT_QUINT8 = 21,
  DT_QUINT16 = 22,
  DT_RESOURCE = 23,
  DT_STRING_REF = 24,
  DT_DUAL = 25,
  DT_VARIANT = 26,
  DT_BF16 = 27,
  DT_UNDEFINED = 28,
  DT_INT4 = 29,
  DT_UINT1 = 30,
  DT_INT2 = 31,
  DT_UINT2 = 32,
  DT_COMPLEX32 = 33,
  DT_HIFLOAT8 = 34,
  DT_FLOAT8_E5M2 = 35,
  DT_FLOAT8_E4M3FN = 36,
  DT_FLOAT8_E8M0 = 37,
  DT_FLOAT6_E3M2 = 38,
  DT_FLOAT6_E2M3 = 39,
  DT_FLOAT4_E2M1 = 40,
  DT_FLOAT4_E1M2 = 41,
};

// An immutable, cheaply copied string. One shared pointer wide (16 bytes): it stands inside structs whose layout
// programs rely on.
class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text) : text_(text == nullptr ? nullptr : std::make_shared<std::string>(text)) {}
  AscendString(const char *text, size_t length)
      : text_(text == nullptr ? nullptr : std::make_shared<std::string>(text, length)) {}

  const char *GetString() const { return text_ == nullptr ? "" : text_->c_str(); }
  size_t GetLength() const { return text_ == nullptr ? 0U : text_->size(); }

  bool operator==(const AscendString &other) const { return Compare(other) == 0; }
  bool operator!=(const AscendString &other) const { return !(*this == other); }
  bool operator<(const AscendString &other) const { return Compare(other) < 0; }
  bool operator>(const AscendString &other) const { return other < *this; }
  bool operator<=(const AscendString &other) const { return !(other < *this); }
  bool operator>=(const AscendString &other) const { return !(*this < other); }

 private:
  // A string without text equals an empty one.
  int Compare(const AscendString &other) const {
    if (text_ == nullptr || other.text_ == nullptr) {
      return static_cast<int>(GetLength() != 0) - static_cast<int>(other.GetLength() != 0);
    }
    return text_->compare(*other.text_);
  }

  std::shared_ptr<std::string> text_;
};

}  // namespace ge

#endif  // LLM_DATADIST_GE_TYPES_H_
