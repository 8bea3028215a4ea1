// What an update does to hundreds of tensors, without going through Python for each: see whether all
// is as it was, blend, copy. The arithmetic is torch's own kernel, so every number is the same as
// without this file.

#include <ATen/DimVector.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/lerp_cpu_dispatch.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace {

struct Kind {
  at::DimVector sizes;
  bool is_contiguous;
  at::ScalarType dtype;
  at::Device device;
  bool requires_grad;

  explicit Kind(const at::Tensor& tensor)
      : sizes(tensor.sizes()),
        is_contiguous(tensor.is_contiguous()),
        dtype(tensor.scalar_type()),
        device(tensor.device()),
        requires_grad(tensor.requires_grad()) {}

  bool is_of(const at::Tensor& tensor) const {
    return tensor.sizes() == at::IntArrayRef(sizes) && tensor.is_contiguous() == is_contiguous &&
           tensor.scalar_type() == dtype && tensor.device() == device &&
           tensor.requires_grad() == requires_grad;
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
      average_kinds_.emplace_back(THPVariable_Unpack(average.ptr()));
    }
    for (const auto& source : sources) {
      sources_.push_back(source.ptr());
      source_kinds_.emplace_back(THPVariable_Unpack(source.ptr()));
    }
  }

  bool holds() const {
    return same_objects() && same_addresses() && same_kinds(averages_, average_kinds_) &&
           same_kinds(sources_, source_kinds_);
  }

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

  static bool same_kinds(const std::vector<PyObject*>& tensors, const std::vector<Kind>& kinds) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!kinds[i].is_of(THPVariable_Unpack(tensors[i]))) return false;
    }
    return true;
  }

  std::vector<PyObject*> dicts_, objects_, averages_, sources_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<const void*> addresses_;
  std::vector<Kind> average_kinds_, source_kinds_;
};

// Pairs in main memory, contiguous and of one dtype each; valid while a watch over them holds.
class Pairs {
 public:
  Pairs(const py::list& averages, const py::list& sources) {
    for (size_t i = 0; i < averages.size(); ++i) {
      averages_.push_back(py::handle(averages[i]).ptr());
      sources_.push_back(py::handle(sources[i]).ptr());
      ends_.push_back(total() + THPVariable_Unpack(averages_.back()).numel());
    }
  }

  void lerp(double momentum) {
    for_each_part([momentum](const at::Tensor& average, const at::Tensor& source, int64_t begin,
                             int64_t end) {
      if (end - begin == average.numel()) {
        at::Tensor whole = average;
        at::cpu::lerp_(whole, source, momentum);
      } else {
        at::Tensor part = flat(average, begin, end);
        at::cpu::lerp_(part, flat(source, begin, end), momentum);
      }
    });
  }

  void copy() {
    for_each_part([](const at::Tensor& average, const at::Tensor& source, int64_t begin,
                     int64_t end) {
      const auto size = average.element_size();
      std::memcpy(static_cast<char*>(average.data_ptr()) + begin * size,
                  static_cast<const char*>(source.data_ptr()) + begin * size, (end - begin) * size);
    });
  }

 private:
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }

  static at::Tensor flat(const at::Tensor& tensor, int64_t begin, int64_t end) {
    auto* start = static_cast<char*>(tensor.data_ptr()) + begin * tensor.element_size();
    return at::from_blob(start, {end - begin}, tensor.options().requires_grad(false));
  }

  // Every thread gets an equal share of all elements: one fork for all tensors, none left waiting.
  template <typename Function>
  void for_each_part(const Function& function) {
    std::vector<const at::Tensor*> averages, sources;
    for (size_t i = 0; i < ends_.size(); ++i) {
      averages.push_back(&THPVariable_Unpack(averages_[i]));
      sources.push_back(&THPVariable_Unpack(sources_[i]));
    }
    py::gil_scoped_release release;
    const int64_t threads = at::get_num_threads();
    const int64_t share = std::max<int64_t>(1 << 15, (total() + threads - 1) / threads);
    at::parallel_for(0, total(), share, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
      while (begin < end) {
        const int64_t start = i == 0 ? 0 : ends_[i - 1];
        const int64_t stop = std::min(end, ends_[i]);
        if (stop > begin) function(*averages[i], *sources[i], begin - start, stop - start);
        begin = stop;
        ++i;
      }
    });
    for (const auto* average : averages) average->unsafeGetTensorImpl()->bump_version();
  }

  std::vector<PyObject*> averages_, sources_;
  std::vector<int64_t> ends_;  // how many elements there are up to the end of each
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::class_<Watch>(module, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::list&>())
      .def("holds", &Watch::holds);
  py::class_<Pairs>(module, "Pairs")
      .def(py::init<const py::list&, const py::list&>())
      .def("lerp", &Pairs::lerp)
      .def("copy", &Pairs::copy);
}
