// Staleness check, blend and copy of hundreds of tensors in main memory, without going through
// Python for each. The arithmetic is torch's own kernel, so that every number is the same as without
// this file.

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/lerp_cpu_dispatch.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace {

// The properties of a tensor that can change while it stays the same object.
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

// Python objects are kept as bare pointers; the follower that makes the classes below keeps the
// tensors, and in its snapshot the dicts and all objects in them. A reference from C++ would be one
// that torch.utils.swap_tensors refuses, and taking and dropping the only one goes through Python's
// lock, for which the threads would queue.
std::vector<PyObject*> pointers(const py::list& objects) {
  std::vector<PyObject*> all;
  for (const auto& object : objects) all.push_back(object.ptr());
  return all;
}

// Training evicts all these objects from the nearer caches. A check that prefetches those ahead
// takes half as long as one that waits for each. Inlined by force: a compiler would take a function
// that only prefetches for one that does nothing, and leave its calls out.
#define INLINED inline __attribute__((always_inline))

INLINED void prefetch(const void* start) {
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

  INLINED void prefetch_after(size_t i) const {
    if (i + 32 < size()) prefetch(objects_[i + 32]);
    if (i + 16 < size()) prefetch(impl(i + 16));
    if (i + 16 < size()) prefetch(reinterpret_cast<const char*>(impl(i + 16)) + 128);
    if (i + 8 < size()) prefetch(impl(i + 8)->unsafe_storage().unsafeGetStorageImpl());
  }

 private:
  const at::TensorImpl* impl(size_t i) const { return (*this)[i].unsafeGetTensorImpl(); }

  std::vector<PyObject*> objects_;
  std::vector<Kind> kinds_;
};

// Whether two module trees hold the same objects, and their tensors the same memory, as when the
// check was made.
class StalenessCheck {
 public:
  StalenessCheck(const py::list& dicts, const py::list& averages, const py::list& sources)
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
      if (i + 32 < dicts_.size()) prefetch(dicts_[i + 32]);
      if (i + 16 < dicts_.size()) prefetch(entries_of(dicts_[i + 16]));
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
      averages_.prefetch_after(i);
      sources_.prefetch_after(i);
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

// Consecutive numbers of an average, and those of the source that they follow.
struct Range {
  char* average;
  char* source;
  int64_t numel;
};

// Calls torch's kernel: for a long range as it is, for short ones gathered, since a call takes as
// long as blending a thousand numbers.
class Blend {
 public:
  Blend(at::ScalarType dtype, double momentum)
      : dtype_(dtype), size_(at::elementSize(dtype)), momentum_(momentum) {}

  void take(const Range& range) {
    if (range.numel > kShort) return lerp(range.average, range.source, range.numel);
    const int64_t bytes = range.numel * size_;
    if (filled_ + bytes > kRoom) finish();
    std::memcpy(averages_ + filled_, range.average, bytes);
    std::memcpy(sources_ + filled_, range.source, bytes);
    filled_ += bytes;
    gathered_.push_back(range);
  }

  void finish() {
    if (filled_ > 0) lerp(averages_, sources_, filled_ / size_);
    const char* start = averages_;
    for (const Range& range : gathered_) {
      std::memcpy(range.average, start, range.numel * size_);
      start += range.numel * size_;
    }
    gathered_.clear();
    filled_ = 0;
  }

  int64_t calls() const { return calls_; }

 private:
  static constexpr int64_t kShort = 512;     // numbers
  static constexpr int64_t kRoom = 1 << 13;  // bytes

  void lerp(char* average, char* source, int64_t numel) {
    ++calls_;
    at::Tensor blended = at::from_blob(average, {numel}, dtype_);
    at::cpu::lerp_(blended, at::from_blob(source, {numel}, dtype_), momentum_);
  }

  const at::ScalarType dtype_;
  const int64_t size_;
  const double momentum_;
  alignas(64) char averages_[kRoom];
  alignas(64) char sources_[kRoom];
  std::vector<Range> gathered_;
  int64_t filled_ = 0;  // bytes
  int64_t calls_ = 0;
};

// Pairs of contiguous tensors in main memory, all of one dtype; valid while a staleness check of
// them holds.
class ContiguousPairs {
 public:
  ContiguousPairs(const py::list& averages, const py::list& sources)
      : averages_(averages), sources_(sources), dtype_(averages_.kind(0).dtype) {
    for (size_t i = 0; i < averages_.size(); ++i) {
      ends_.push_back(total() + averages_.kind(i).numel);
    }
  }

  // Returns how often torch's kernel was called: no dispatcher, and so no profiler, sees it.
  int64_t lerp(double momentum) const {
    std::atomic<int64_t> calls{0};
    each_share([this, momentum, &calls](const std::vector<Range>& ranges) {
      Blend blend(dtype_, momentum);
      for (const Range& range : ranges) blend.take(range);
      blend.finish();
      calls += blend.calls();
    });
    return calls;
  }

  void copy() const {
    const int64_t size = at::elementSize(dtype_);
    each_share([size](const std::vector<Range>& ranges) {
      for (const Range& range : ranges) std::memcpy(range.average, range.source, range.numel * size);
    });
  }

 private:
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }

  // Every thread gets an equal share of the numbers: one fork for all tensors, none left waiting.
  template <typename Function>
  void each_share(const Function& function) const {
    const std::vector<Range> ranges = ranges_now();
    py::gil_scoped_release release;
    const int64_t threads = at::get_num_threads();
    const int64_t share = std::max<int64_t>(1 << 15, (total() + threads - 1) / threads);
    at::parallel_for(0, total(), share, [&](int64_t begin, int64_t end) {
      function(share_of(ranges, begin, end));
    });
  }

  // The averages are about to change, and autograd is told.
  std::vector<Range> ranges_now() const {
    std::vector<Range> ranges;
    ranges.reserve(averages_.size());
    for (size_t i = 0; i < averages_.size(); ++i) {
      if (!averages_.is_same(i) || !sources_.is_same(i)) {
        throw std::runtime_error(
            "a tensor was changed between its staleness check and the update. Update the average "
            "while no other thread changes the model or the average.");
      }
      ranges.push_back({address(averages_[i]), address(sources_[i]), averages_.kind(i).numel});
    }
    for (size_t i = 0; i < averages_.size(); ++i) {
      averages_[i].unsafeGetTensorImpl()->bump_version();
    }
    return ranges;
  }

  std::vector<Range> share_of(const std::vector<Range>& ranges, int64_t begin, int64_t end) const {
    const int64_t size = at::elementSize(dtype_);
    std::vector<Range> share;
    size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    for (; begin < end; ++i) {
      const int64_t skipped = begin - (ends_[i] - ranges[i].numel);
      const int64_t stop = std::min(end, ends_[i]);
      share.push_back(
          {ranges[i].average + skipped * size, ranges[i].source + skipped * size, stop - begin});
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
  py::class_<StalenessCheck>(module, "StalenessCheck")
      .def(py::init<const py::list&, const py::list&, const py::list&>())
      .def("holds", &StalenessCheck::holds);
#ifdef _OPENMP
  py::class_<ContiguousPairs>(module, "ContiguousPairs")
      .def(py::init<const py::list&, const py::list&>())
      .def("lerp", &ContiguousPairs::lerp)
      .def("copy", &ContiguousPairs::copy);
#endif
}
