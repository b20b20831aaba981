#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/blake2b.h"
#include "base/bytes.h"
#include "channel/id_text.h"
#include "channel/prompt_hash.h"
#include "channel_ends.h"
#include "channel_values.h"
#include "register.h"

namespace py = pybind11;

namespace datadist::bindings {
namespace {

// Whether an element is an ordinary int of one digit and no sign, as ids are, and its value. The general way takes twice
// as long, and a long prompt has a hundred thousand of them.
bool ReadSmall(PyObject *item, uint32_t *value) {
#if PY_VERSION_HEX >= 0x030C0000
  auto *const number = reinterpret_cast<PyLongObject *>(item);
  if (!PyLong_CheckExact(item) || PyUnstable_Long_IsCompact(number) == 0 || PyUnstable_Long_CompactValue(number) < 0) {
    return false;
  }
  *value = static_cast<uint32_t>(PyUnstable_Long_CompactValue(number));
#else
  const auto *const number = reinterpret_cast<const PyLongObject *>(item);
  if (!PyLong_CheckExact(item) || Py_SIZE(item) < 0 || Py_SIZE(item) > 1) {
    return false;
  }
  *value = Py_SIZE(item) == 0 ? 0 : number->ob_digit[0];
#endif
  return true;
}
static_assert(PyLong_BASE <= kEscape, "an int of one digit is a word");

// The first `most` of a sequence of int. OverflowError for one that 64 bits cannot hold.
IdText ReadIds(py::handle sequence, size_t most = std::numeric_limits<size_t>::max()) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "not a sequence of int"));
  if (!items) {
    throw py::error_already_set();
  }
  IdText text(std::min(most, static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()))));
  const size_t size = text.size();
  size_t read = 0;
  for (PyObject **item = PySequence_Fast_ITEMS(items.ptr()); read < size && ReadSmall(*item, &text[read]);) {
    ++item;
    ++read;
  }
  text.resize(read);
  // The size is asked for each time: an element's __index__ can shorten the very list that is being read.
  for (; read < size && static_cast<Py_ssize_t>(read) < PySequence_Fast_GET_SIZE(items.ptr()); ++read) {
    const int64_t id = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(read)));
    if (id == -1 && PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    AppendId(text, id);
  }
  return text;
}

void HashLength(Blake2b &hash, size_t length) {
  Writer bytes;
  bytes.U64(length);
  hash.Update(bytes.data(), bytes.size());
}

// The size of the ids comes last: a client may choose the text of an image's hash, and without it one that reads like ids
// would make two prompts one.
std::string HexDigest(const Blake2b &self, const py::str &adapter, const std::vector<py::str> &mm_hashes) {
  Blake2b hash = self;
  const auto add = [&hash](const py::str &text) {
    const std::string bytes = ToBytes(text);
    HashLength(hash, bytes.size());
    hash.Update(bytes.data(), bytes.size());
  };
  add(adapter);
  std::for_each(mm_hashes.begin(), mm_hashes.end(), add);
  HashLength(hash, self.size());
  return ToHex(hash.Finish());
}

struct BlocksRead {
  std::string digest;
  size_t count = 0;  // without null blocks
};

BlocksRead ReadBlocks(const py::sequence &groups) {
  Blake2b hash;
  BlocksRead read;
  for (const py::handle group : groups) {
    const IdText blocks = ReadIds(group);
    HashLength(hash, blocks.size());
    HashIds(hash, blocks);
    read.count += CountBlocks(blocks);
  }
  read.digest = ToHex(hash.Finish());
  return read;
}

struct Pending {
  std::shared_ptr<const PendingHash> hash;
};

}  // namespace

void RegisterDigests(py::module_ &module) {
  py::class_<Blake2b>(module, "PromptHash")
      .def(py::init())
      .def(
          "update", [](Blake2b &self, py::handle token_ids) { HashIds(self, ReadIds(token_ids)); },
          py::arg("token_ids"))
      .def("copy", [](const Blake2b &self) { return self; })
      .def("hexdigest", &HexDigest, py::arg("adapter") = "", py::arg("mm_hashes") = std::vector<py::str>());
  py::class_<Pending>(module, "PendingHash")
      .def_property_readonly("done", [](const Pending &self) { return self.hash->done(); })
      .def("take", [](const Pending &self) {
        return self.hash->done() ? py::cast(Blake2b(self.hash->hash())) : py::object(py::none());
      });
  py::class_<PromptHasher, std::shared_ptr<PromptHasher>>(module, "PromptHasher",
                                                          py::release_gil_before_calling_cpp_dtor())
      .def(py::init([] { return Made(Result<std::unique_ptr<PromptHasher>>(std::make_unique<PromptHasher>())); }))
      .def(
          "begin",
          [](PromptHasher &self, py::handle token_ids, size_t num_tokens) {
            return Pending{self.Begin(ReadIds(token_ids, num_tokens))};
          },
          py::arg("token_ids"), py::arg("num_tokens"))
      .def("close", &Close<PromptHasher>);
  module.def(
      "blocks_digest", [](const py::sequence &blocks) { return ReadBlocks(blocks).digest; }, py::arg("blocks"));
  module.def(
      "digest_and_count",
      [](const py::sequence &blocks) {
        const BlocksRead read = ReadBlocks(blocks);
        return py::make_tuple(read.digest, read.count);
      },
      py::arg("blocks"));
}

}  // namespace datadist::bindings
