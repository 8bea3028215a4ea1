// Sees whether two module trees hold the objects, and their tensors the memory, that they held when
// the watch was made. It looks and never writes: no number of an average depends on this file.

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace py = pybind11;

namespace {

struct Kind {
  int64_t numel;
  at::ScalarType dtype;
  at::Device device;
  bool requires_grad;

  explicit Kind(const at::Tensor& tensor)
      : numel(tensor.numel()),
        dtype(tensor.scalar_type()),
        device(tensor.device()),
        requires_grad(tensor.requires_grad()) {}

  bool operator==(const Kind& other) const {
    return numel == other.numel && dtype == other.dtype && device == other.device &&
           requires_grad == other.requires_grad;
  }
};

const void* address(const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  const auto* start = static_cast<const char*>(impl->storage().data());
  return start + impl->storage_offset() * impl->itemsize();
}

// Whoever makes a watch keeps all of its objects alive; Python's collector could not see them here.
class Watch {
 public:
  Watch(const py::list& dicts, const py::list& averages, const py::list& sources) {
    for (const auto& dict : dicts) {
      dicts_.push_back(dict.ptr());
      sizes_.push_back(PyDict_Size(dict.ptr()));
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(dict.ptr(), &position, &key, &value)) objects_.push_back(value);
    }
    for (const auto& average : averages) {
      averages_.push_back(average.ptr());
      addresses_.push_back(address(THPVariable_Unpack(average.ptr())));
    }
    for (const auto& source : sources) {
      sources_.push_back(source.ptr());
      kinds_.emplace_back(THPVariable_Unpack(source.ptr()));
    }
  }

  bool holds() const { return same_objects() && same_addresses() && same_kinds(); }

 private:
  bool same_objects() const {
    auto expected = objects_.begin();
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (PyDict_Size(dicts_[i]) != sizes_[i]) return false;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(dicts_[i], &position, &key, &value)) {
        if (value != *expected++) return false;
      }
    }
    return true;
  }

  bool same_addresses() const {
    for (size_t i = 0; i < averages_.size(); ++i) {
      if (address(THPVariable_Unpack(averages_[i])) != addresses_[i]) return false;
    }
    return true;
  }

  bool same_kinds() const {
    for (size_t i = 0; i < sources_.size(); ++i) {
      if (!(Kind(THPVariable_Unpack(sources_[i])) == kinds_[i])) return false;
    }
    return true;
  }

  std::vector<PyObject*> dicts_, objects_, averages_, sources_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<const void*> addresses_;
  std::vector<Kind> kinds_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::class_<Watch>(module, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::list&>())
      .def("holds", &Watch::holds);
}
