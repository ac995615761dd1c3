// What was read in Python to decide something, to see in one go that it would be read the same again (emoe/decision_guard.py).
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

#include <array>
#include <cstring>
#include <tuple>
#include <vector>

namespace facts {

using at::Tensor;

// Another after each change of a dictionary, or of a class or one that it is made of, where Python counts them in a way that can be relied upon: 3.11 does.
constexpr bool kHasVersions = PY_VERSION_HEX < 0x030C0000;
inline uint64_t version(PyTypeObject* type) { return type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG ? type->tp_version_tag : 0; }
inline uint64_t version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

// Objects are those that the caller keeps: it owns none, or no garbage collector could see through it.
class Facts {
 public:
  using Items = std::vector<std::tuple<py::object, py::object, py::object>>;
  using Sizes = std::vector<std::tuple<py::object, Py_ssize_t>>;
  using Tensors = std::vector<py::object>;
  using Numbers = std::vector<std::tuple<py::object, int64_t, Tensor, Tensor>>;

  // Dictionaries with a key of each and what was found there, None where nothing was; dictionaries and their sizes; objects with the name of an attribute and
  // what was found; tensors; weights with their versions, a few of their numbers as a view, and what these were.
  Facts(const Items& items, const Sizes& sizes, const Items& attributes, const Tensors& tensors, const Numbers& numbers) {
    for (const auto& [owner, key, value] : items) items_.push_back({owner.ptr(), key.ptr(), value.ptr()});
    for (const auto& [dict, size] : sizes) sizes_.push_back({dict.ptr(), size});
    for (const auto& [owner, name, value] : attributes) add_attribute({owner.ptr(), name.ptr(), value.ptr()});
    for (const auto& tensor : tensors) places_.emplace_back(tensor.ptr());
    for (const auto& [weight, version, sample, values] : numbers) samples_.emplace_back(weight.ptr(), version, sample, values);
    for (const Item& item : items_) add(dicts_, item.owner);
    for (const Size& size : sizes_) add(dicts_, size.dict);
  }

  bool hold() {
    // between two tokens all of it has left the caches, so it is asked for at once and not one by one
    for (const auto& known : dicts_) __builtin_prefetch(&known.object->ob_type + 1);
    for (const Attribute& attribute : attributes_) __builtin_prefetch(attribute.owner);
    for (const Place& place : places_) __builtin_prefetch(place.tensor);
    for (const Sample& sample : samples_) sample.ask_for();
    for (const Place& place : places_) {
      if (!place.holds()) return false;
    }
    for (const Sample& sample : samples_) {
      if (!sample.holds()) return false;
    }
    for (const Attribute& attribute : attributes_) {
      if (!attribute.holds()) return false;
    }
    return types_hold() && dicts_hold();
  }

 private:
  struct Item {
    PyObject *owner, *key, *value;
  };
  struct Size {
    PyObject* dict;
    Py_ssize_t size;
  };
  template <typename object_t>
  struct Counted {
    object_t* object;
    uint64_t version;
  };

  struct Attribute {
    PyObject *owner, *name, *value;

    bool holds() const {
      PyObject* found = PyObject_GetAttr(owner, name);
      if (found == nullptr) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
        PyErr_Clear();
        return value == Py_None;
      }
      Py_DECREF(found);  // it lives on with the owner, or it is not what was found before
      return found == value;
    }
  };

  // Where a tensor's numbers lie, and how.
  struct Place {
    PyObject* tensor;
    PyTypeObject* type;
    const void* data;
    bool is_negated;
    at::ScalarType dtype;
    at::DimVector sizes, strides;

    explicit Place(PyObject* of) : tensor(of), type(Py_TYPE(of)) {
      const Tensor& found = THPVariable_Unpack(of);
      data = found.const_data_ptr(), is_negated = found.is_neg(), dtype = found.scalar_type();
      sizes = at::DimVector(found.sizes()), strides = at::DimVector(found.strides());
    }

    bool holds() const {
      if (Py_TYPE(tensor) != type) return false;
      const Tensor& found = THPVariable_Unpack(tensor);
      return found.has_storage() && !found.is_inference() && found.scalar_type() == dtype && found.sizes() == sizes && found.strides() == strides &&
             found.const_data_ptr() == data && found.is_neg() == is_negated;
    }
  };

  // A few of a tensor's numbers, and how often PyTorch saw them change.
  struct Sample {
    PyObject* tensor;
    int64_t version, count, step, width;
    const char* first;
    std::array<char, 16 * sizeof(double)> values;

    Sample(PyObject* of, int64_t version, const Tensor& sample, const Tensor& found)
        : tensor(of), version(version), count(sample.numel()), step(sample.stride(0) * sample.element_size()), width(sample.element_size()),
          first(static_cast<const char*>(sample.const_data_ptr())) {
      TORCH_CHECK(count * width <= static_cast<int64_t>(values.size()) && found.is_contiguous(), "a sample of so many numbers is not compared");
      std::memcpy(values.data(), found.const_data_ptr(), count * width);
    }

    void ask_for() const {
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(first + i * step);
    }

    bool holds() const {
      bool same = THPVariable_Unpack(tensor)._version() == version;
      for (int64_t i = 0; i < count; ++i) same = same & (std::memcmp(values.data() + i * width, first + i * step, width) == 0);
      return same;
    }
  };

  // What was read several times, and gave the same, is looked at once.
  void add_attribute(const Attribute& read) {
    std::vector<Attribute>& known = PyType_Check(read.owner) ? of_types_ : attributes_;
    for (const Attribute& other : known) {
      if (other.owner == read.owner && other.value == read.value && PyObject_RichCompareBool(other.name, read.name, Py_EQ) == 1) return;
    }
    known.push_back(read);
    if (PyType_Check(read.owner)) add(types_, reinterpret_cast<PyTypeObject*>(read.owner));
  }

  template <typename object_t>
  static void add(std::vector<Counted<object_t>>& to, object_t* object) {
    for (const auto& known : to) {
      if (known.object == object) return;
    }
    to.push_back({object, version(object)});
  }

  template <typename object_t>
  static bool are_unchanged(const std::vector<Counted<object_t>>& objects) {
    bool same = kHasVersions;
    for (const auto& known : objects) same = same & (known.version != 0 && version(known.object) == known.version);
    return same;
  }

  bool types_hold() {
    if (are_unchanged(types_)) return true;
    for (const Attribute& attribute : of_types_) {
      if (!attribute.holds()) return false;
    }
    for (auto& known : types_) known.version = version(known.object);
    return true;
  }

  bool dicts_hold() {
    if (are_unchanged(dicts_)) return true;
    for (const Item& item : items_) {
      PyObject* found = PyDict_GetItemWithError(item.owner, item.key);
      if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if ((found == nullptr ? Py_None : found) != item.value) return false;
    }
    for (const Size& known : sizes_) {
      if (PyDict_Size(known.dict) != known.size) return false;
    }
    for (auto& known : dicts_) known.version = version(known.object);
    return true;
  }

  std::vector<Counted<PyObject>> dicts_;
  std::vector<Counted<PyTypeObject>> types_;
  std::vector<Item> items_;
  std::vector<Size> sizes_;
  std::vector<Attribute> attributes_, of_types_;
  std::vector<Place> places_;
  std::vector<Sample> samples_;
};

}  // namespace facts
