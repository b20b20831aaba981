// typing.NamedTuple types that belong to this module.
#ifndef DATADIST_BINDINGS_NAMED_TUPLE_H_
#define DATADIST_BINDINGS_NAMED_TUPLE_H_

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>

namespace datadist::bindings {

inline pybind11::object DefineNamedTuple(pybind11::module_ &module, const char *name,
                                         std::initializer_list<std::pair<const char *, const char *>> fields) {
  const pybind11::module_ builtins = pybind11::module_::import("builtins");
  pybind11::list spec;
  for (const auto &[field, type] : fields) {
    spec.append(pybind11::make_tuple(field, builtins.attr(type)));
  }
  pybind11::object type = pybind11::module_::import("typing").attr("NamedTuple")(name, spec);
  type.attr("__module__") = module.attr("__name__");
  module.attr(name) = type;
  return type;
}

}  // namespace datadist::bindings

#endif  // DATADIST_BINDINGS_NAMED_TUPLE_H_
