#include "block_ids.h"

#include <cstring>
#include <string>
#include <string_view>
#include <utility>

namespace py = pybind11;

namespace datadist::bindings {
namespace {

constexpr char kAllowed[] = "a sequence of int or a contiguous one-dimensional buffer of int64 or uint64";

class BufferView {
 public:
  explicit BufferView(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
      throw py::error_already_set();
    }
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView &) = delete;
  BufferView &operator=(const BufferView &) = delete;
  const Py_buffer &operator*() const { return view_; }
  const Py_buffer *operator->() const { return &view_; }

 private:
  Py_buffer view_{};
};

Status OutOfRange(const char *field, size_t index, const std::string &value) {
  return Status(llm_datadist::LLM_PARAM_INVALID, std::string(field) + "[" + std::to_string(index) + "] is " + value +
                                                     "; allowed: a block index, 0 or more");
}

// 'l', 'q' (signed) or 'L', 'Q' in native or little-endian order, which are the same on the machines this runs on.
char ElementCode(const Py_buffer &view) {
  std::string_view format = view.format == nullptr ? "B" : view.format;
  if (!format.empty() && (format.front() == '@' || format.front() == '=' || format.front() == '<')) {
    format.remove_prefix(1);
  }
  const bool known = format.size() == 1 && std::string_view("lqLQ").find(format.front()) != std::string_view::npos;
  return known && view.itemsize == sizeof(uint64_t) ? format.front() : '\0';
}

Result<std::vector<uint64_t>> FromBuffer(py::handle object, const char *field) {
  const BufferView view(object);
  const char code = ElementCode(*view);
  if (code == '\0' || view->ndim != 1 || PyBuffer_IsContiguous(&*view, 'C') == 0) {
    throw py::type_error(std::string(field) + " is a buffer of " + std::to_string(view->ndim) +
                         " dimensions and format '" + (view->format == nullptr ? "B" : view->format) +
                         "'; allowed: " + kAllowed);
  }
  std::vector<uint64_t> ids(static_cast<size_t>(view->len) / sizeof(uint64_t));
  if (!ids.empty()) {
    std::memcpy(ids.data(), view->buf, ids.size() * sizeof(uint64_t));
  }
  if (code == 'l' || code == 'q') {
    for (size_t i = 0; i < ids.size(); ++i) {
      if (static_cast<int64_t>(ids[i]) < 0) {
        return OutOfRange(field, i, std::to_string(static_cast<int64_t>(ids[i])));
      }
    }
  }
  return ids;
}

Result<std::vector<uint64_t>> FromSequence(py::handle object, const char *field) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), kAllowed));
  if (!items) {
    throw py::error_already_set();
  }
  std::vector<uint64_t> ids;
  ids.reserve(static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr())));
  // The size is asked for each time: an element's __index__ can shorten the very list that is being read.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i));
    int overflow = 0;
    const int64_t id = PyLong_AsLongLongAndOverflow(item.ptr(), &overflow);
    if (id == -1 && PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    if (id < 0) {  // -1 too when it did not fit
      return OutOfRange(field, static_cast<size_t>(i), py::str(item).cast<std::string>());
    }
    ids.push_back(static_cast<uint64_t>(id));
  }
  return ids;
}

}  // namespace

Result<std::vector<uint64_t>> ReadBlockIds(py::handle ids, const char *field) {
  if (PyObject_CheckBuffer(ids.ptr()) != 0) {
    return FromBuffer(ids, field);
  }
  if (PySequence_Check(ids.ptr()) == 0 || PyUnicode_Check(ids.ptr()) != 0) {
    throw py::type_error(std::string(field) + " is a " + Py_TYPE(ids.ptr())->tp_name + "; allowed: " + kAllowed);
  }
  return FromSequence(ids, field);
}

Result<BlockLists> ReadBlockLists(py::handle src_blocks, py::handle dst_blocks) {
  Result<std::vector<uint64_t>> src = ReadBlockIds(src_blocks, "src_blocks");
  Result<std::vector<uint64_t>> dst = ReadBlockIds(dst_blocks, "dst_blocks");
  if (!src.ok() || !dst.ok()) {
    return src.ok() ? dst.status() : src.status();
  }
  return BlockLists{std::move(src).value(), std::move(dst).value()};
}

}  // namespace datadist::bindings
