// What an update does to hundreds of tensors in main memory, without going through Python for each:
// see whether all is as it was, blend, copy. The arithmetic is torch's own kernel, so that every
// number is the same as without this file.

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/lerp_cpu_dispatch.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace {

// What can change while a tensor stays itself and would lead an update astray.
struct Kind {
  c10::DispatchKeySet keys;  // a subclass, negative or conjugate where it is read, and the like
  int64_t numel;
  at::ScalarType dtype;
  at::Device device;
  bool is_contiguous;
  bool requires_grad;

  explicit Kind(const at::Tensor& tensor)
      : keys(tensor.key_set()),
        numel(tensor.numel()),
        dtype(tensor.scalar_type()),
        device(tensor.device()),
        is_contiguous(tensor.is_contiguous()),
        requires_grad(tensor.requires_grad()) {}

  bool operator==(const Kind& other) const {
    return keys == other.keys && numel == other.numel && dtype == other.dtype &&
           device == other.device && is_contiguous == other.is_contiguous &&
           requires_grad == other.requires_grad;
  }
};

char* address(const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  auto* start = static_cast<char*>(const_cast<void*>(impl->storage().data()));
  return start + impl->storage_offset() * impl->itemsize();
}

// Python objects are kept as bare pointers, and whoever makes one of the classes below keeps them
// alive. A reference from C++ would be one that torch.utils.swap_tensors refuses, and taking and
// dropping the only one goes through Python's lock, for which the threads would queue.
std::vector<PyObject*> pointers(const py::list& objects) {
  std::vector<PyObject*> all;
  for (const auto& object : objects) all.push_back(object.ptr());
  return all;
}

// Training drives all these objects out of the nearer caches. A look that asks for those ahead
// takes half as long as one that waits for each. Inlined by force: a compiler would take a function
// that only asks for one that does nothing, and leave its calls out.
#define INLINED inline __attribute__((always_inline))

INLINED void ask_for(const void* start) {
  __builtin_prefetch(start);
  __builtin_prefetch(static_cast<const char*>(start) + 64);
}

// Tensors, and the kinds they had when they were listed.
class Tensors {
 public:
  explicit Tensors(const py::list& tensors) : objects_(pointers(tensors)) {
    for (size_t i = 0; i < size(); ++i) kinds_.emplace_back((*this)[i]);
  }

  size_t size() const { return objects_.size(); }
  const at::Tensor& operator[](size_t i) const { return THPVariable_Unpack(objects_[i]); }
  const Kind& kind(size_t i) const { return kinds_[i]; }
  bool is_same(size_t i) const { return Kind((*this)[i]) == kinds_[i]; }

  INLINED void ask_after(size_t i) const {
    if (i + 32 < size()) ask_for(objects_[i + 32]);
    if (i + 16 < size()) ask_for(impl(i + 16));
    if (i + 16 < size()) ask_for(reinterpret_cast<const char*>(impl(i + 16)) + 128);
    if (i + 8 < size()) ask_for(impl(i + 8)->unsafe_storage().unsafeGetStorageImpl());
  }

 private:
  const at::TensorImpl* impl(size_t i) const { return (*this)[i].unsafeGetTensorImpl(); }

  std::vector<PyObject*> objects_;
  std::vector<Kind> kinds_;
};

// Whether two module trees hold the objects, and their tensors the memory, that they held when the
// watch was made.
class Watch {
 public:
  Watch(const py::list& dicts, const py::list& averages, const py::list& sources)
      : dicts_(pointers(dicts)), averages_(averages), sources_(sources) {
    for (PyObject* dict : dicts_) {
      sizes_.push_back(PyDict_Size(dict));
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(dict, &position, &key, &value)) objects_.push_back(value);
    }
    for (size_t i = 0; i < averages_.size(); ++i) addresses_.push_back(address(averages_[i]));
  }

  bool holds() const { return same_objects() && same_tensors(); }

 private:
  bool same_objects() const {
    auto expected = objects_.begin();
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (i + 32 < dicts_.size()) ask_for(dicts_[i + 32]);
      if (i + 16 < dicts_.size()) ask_for(entries_of(dicts_[i + 16]));
      if (PyDict_Size(dicts_[i]) != sizes_[i]) return false;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(dicts_[i], &position, &key, &value)) {
        if (value != *expected++) return false;
      }
    }
    return true;
  }

  bool same_tensors() const {
    for (size_t i = 0; i < averages_.size(); ++i) {
      averages_.ask_after(i);
      sources_.ask_after(i);
      if (!averages_.is_same(i) || !sources_.is_same(i) || address(averages_[i]) != addresses_[i] ||
          averages_[i].sizes() != sources_[i].sizes()) {
        return false;
      }
    }
    return true;
  }

  static const void* entries_of(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_keys;
  }

  std::vector<PyObject*> dicts_, objects_;
  std::vector<Py_ssize_t> sizes_;
  Tensors averages_, sources_;
  std::vector<const char*> addresses_;
};

#ifdef _OPENMP  // without it torch's parallel_for, compiled here, would be one thread

// Numbers of an average that lie in a row, and those that they follow.
struct Row {
  char* average;
  char* source;
  int64_t numel;
};

// Calls torch's kernel: for a long row as it is, for short ones gathered, since a call takes as
// long as blending a thousand numbers.
class Blend {
 public:
  Blend(at::ScalarType dtype, double momentum)
      : dtype_(dtype), size_(at::elementSize(dtype)), momentum_(momentum) {}

  void take(const Row& row) {
    if (row.numel > kShort) return lerp(row.average, row.source, row.numel);
    const int64_t bytes = row.numel * size_;
    if (filled_ + bytes > kRoom) finish();
    std::memcpy(averages_ + filled_, row.average, bytes);
    std::memcpy(sources_ + filled_, row.source, bytes);
    filled_ += bytes;
    gathered_.push_back(row);
  }

  void finish() {
    if (filled_ > 0) lerp(averages_, sources_, filled_ / size_);
    const char* start = averages_;
    for (const Row& row : gathered_) {
      std::memcpy(row.average, start, row.numel * size_);
      start += row.numel * size_;
    }
    gathered_.clear();
    filled_ = 0;
  }

 private:
  static constexpr int64_t kShort = 512;     // numbers
  static constexpr int64_t kRoom = 1 << 13;  // bytes

  void lerp(char* average, char* source, int64_t numel) const {
    at::Tensor blended = at::from_blob(average, {numel}, dtype_);
    at::cpu::lerp_(blended, at::from_blob(source, {numel}, dtype_), momentum_);
  }

  const at::ScalarType dtype_;
  const int64_t size_;
  const double momentum_;
  alignas(64) char averages_[kRoom];
  alignas(64) char sources_[kRoom];
  std::vector<Row> gathered_;
  int64_t filled_ = 0;  // bytes
};

// Pairs of contiguous tensors in main memory, all of one dtype; valid while a watch over them
// holds.
class Rows {
 public:
  Rows(const py::list& averages, const py::list& sources)
      : averages_(averages), sources_(sources), dtype_(averages_.kind(0).dtype) {
    for (size_t i = 0; i < averages_.size(); ++i) {
      ends_.push_back(total() + averages_.kind(i).numel);
    }
  }

  void lerp(double momentum) const {
    each_share([this, momentum](const std::vector<Row>& rows) {
      Blend blend(dtype_, momentum);
      for (const Row& row : rows) blend.take(row);
      blend.finish();
    });
  }

  void copy() const {
    const int64_t size = at::elementSize(dtype_);
    each_share([size](const std::vector<Row>& rows) {
      for (const Row& row : rows) std::memcpy(row.average, row.source, row.numel * size);
    });
  }

 private:
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }

  // Every thread gets an equal share of the numbers: one fork for all tensors, none left waiting.
  template <typename Function>
  void each_share(const Function& function) const {
    const std::vector<Row> rows = rows_now();
    py::gil_scoped_release release;
    const int64_t threads = at::get_num_threads();
    const int64_t share = std::max<int64_t>(1 << 15, (total() + threads - 1) / threads);
    at::parallel_for(0, total(), share, [&](int64_t begin, int64_t end) {
      function(share_of(rows, begin, end));
    });
  }

  // The averages are about to change, and autograd is told.
  std::vector<Row> rows_now() const {
    std::vector<Row> rows;
    rows.reserve(averages_.size());
    for (size_t i = 0; i < averages_.size(); ++i) {
      if (!averages_.is_same(i) || !sources_.is_same(i)) {
        throw std::runtime_error(
            "a tensor was changed between the look at it and the update. Update the average while "
            "no other thread changes the model or the average.");
      }
      rows.push_back({address(averages_[i]), address(sources_[i]), averages_.kind(i).numel});
    }
    for (size_t i = 0; i < averages_.size(); ++i) {
      averages_[i].unsafeGetTensorImpl()->bump_version();
    }
    return rows;
  }

  std::vector<Row> share_of(const std::vector<Row>& rows, int64_t begin, int64_t end) const {
    const int64_t size = at::elementSize(dtype_);
    std::vector<Row> share;
    size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    for (; begin < end; ++i) {
      const int64_t skipped = begin - (ends_[i] - rows[i].numel);
      const int64_t stop = std::min(end, ends_[i]);
      share.push_back(
          {rows[i].average + skipped * size, rows[i].source + skipped * size, stop - begin});
      begin = stop;
    }
    return share;
  }

  const Tensors averages_, sources_;
  const at::ScalarType dtype_;
  std::vector<int64_t> ends_;  // how many numbers there are up to the end of each
};

#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::class_<Watch>(module, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::list&>())
      .def("holds", &Watch::holds);
#ifdef _OPENMP
  py::class_<Rows>(module, "Rows")
      .def(py::init<const py::list&, const py::list&>())
      .def("lerp", &Rows::lerp)
      .def("copy", &Rows::copy);
#endif
}
