// The Python modules, the only C++ file that knows Python: fastattn._native over the CPU kernels and, compiled a second time
// with FASTATTN_CUDA_MODULE, fastattn._cuda over the CUDA kernels. It knows no tensor library either: a tensor comes as (data
// pointer, strides, dtype code), and fastattn/backends/native.py makes these from torch tensors, allocates every output and
// the workspace, and has checked what the kernels rely on.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "core/mask.h"
#include "core/params.h"
#include "core/philox.h"
#if defined(FASTATTN_CUDA_MODULE)
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
namespace kernels = fastattn::cuda;
#else
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
namespace kernels = fastattn::cpu;
#endif

namespace py = pybind11;
using namespace fastattn;

namespace pybind11::detail {

// None, or (pointer, strides, dtype code). Read through the C API: a call hands over a dozen of them.
template <>
struct type_caster<TensorRef> {
  PYBIND11_TYPE_CASTER(TensorRef, const_name("tuple[int, tuple[int, ...], int] | None"));

  bool load(handle source, bool) {
    value = TensorRef{};
    if (source.is_none()) return true;
    PyObject* const tuple = source.ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) return false;
    PyObject* const strides = PyTuple_GET_ITEM(tuple, 1);
    if (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) > 4) return false;
    value.ptr = reinterpret_cast<void*>(PyLong_AsSize_t(PyTuple_GET_ITEM(tuple, 0)));
    for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(strides); ++n)
      value.stride[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, n));
    value.dtype = static_cast<DType>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 2)));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

template <typename T>
T* pointer(const TensorRef& tensor) {
  return static_cast<T*>(tensor.ptr);
}

// (band_low, band_high, prefix_lengths, key_lengths, key_keep, query_segments, key_segments, bits, live, full, live_t, full_t,
// block_m, block_n), or None.
MaskParams mask_params(const py::object& source) {
  MaskParams mask;
  if (source.is_none()) return mask;
  const auto parts = py::cast<py::tuple>(source);
  const auto tensor = [&](int index) { return py::cast<TensorRef>(parts[index]); };
  mask.band_low = py::cast<int64_t>(parts[0]);
  mask.band_high = py::cast<int64_t>(parts[1]);
  const TensorRef prefix = tensor(2), lengths = tensor(3), keep = tensor(4), query_ids = tensor(5), key_ids = tensor(6);
  mask.prefix_lengths = pointer<int64_t>(prefix);
  mask.stride_prefix_b = prefix.stride[0];
  mask.key_lengths = pointer<int64_t>(lengths);
  mask.stride_key_lengths_b = lengths.stride[0];
  mask.key_keep = pointer<uint8_t>(keep);
  mask.stride_keep_b = keep.stride[0];
  mask.stride_keep_j = keep.stride[1];
  mask.query_segments = pointer<int64_t>(query_ids);
  mask.stride_qseg_b = query_ids.stride[0];
  mask.stride_qseg_i = query_ids.stride[1];
  mask.key_segments = pointer<int64_t>(key_ids);
  mask.stride_kseg_b = key_ids.stride[0];
  mask.stride_kseg_j = key_ids.stride[1];
  const TensorRef bits = tensor(7), live = tensor(8), live_t = tensor(10);
  mask.bits = pointer<uint64_t>(bits);
  mask.stride_bits_b = bits.stride[0];
  mask.stride_bits_h = bits.stride[1];
  mask.words_per_row = bits.stride[2];
  mask.live = pointer<uint64_t>(live);
  mask.full = pointer<uint64_t>(tensor(9));
  mask.stride_map_b = live.stride[0];
  mask.stride_map_h = live.stride[1];
  mask.map_words_per_row = live.stride[2];
  mask.live_t = pointer<uint64_t>(live_t);
  mask.full_t = pointer<uint64_t>(tensor(11));
  mask.stride_map_t_b = live_t.stride[0];
  mask.stride_map_t_h = live_t.stride[1];
  mask.map_t_words_per_row = live_t.stride[2];
  mask.block_m = py::cast<int64_t>(parts[12]);
  mask.block_n = py::cast<int64_t>(parts[13]);
  return mask;
}

// What the kernels run on: on the CPU the number of threads, for CUDA the stream.
template <typename Params>
void set_executor(Params& params, uint64_t executor) {
#if defined(FASTATTN_CUDA_MODULE)
  params.stream = reinterpret_cast<void*>(executor);
#else
  params.num_threads = cpu::effective_threads(static_cast<int>(executor));
#endif
}

// The seed itself, for CUDA its address: it is read where it lies.
DropoutParams dropout_params(double p, uint64_t seed) {
#if defined(FASTATTN_CUDA_MODULE)
  return {p, 0, reinterpret_cast<const uint64_t*>(seed)};
#else
  return {p, seed, nullptr};
#endif
}

// The part of the arguments that every attention operation takes.
// sizes: (batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v).
template <typename Params>
Params attention_params(const py::tuple& sizes, double scale, const TensorRef& query, const TensorRef& key,
                        const TensorRef& value, const TensorRef& bias, const py::object& mask, double dropout_p,
                        uint64_t dropout_seed, const TensorRef& lse, uint64_t executor) {
  Params params;
  int64_t* const fields[] = {&params.batch, &params.heads_q, &params.heads_kv, &params.len_q,
                             &params.len_k, &params.dim_qk,  &params.dim_v};
  int n = 0;
  for (int64_t* field : fields) *field = py::cast<int64_t>(sizes[n++]);
#if defined(FASTATTN_CUDA_MODULE)
  if (params.dim_qk > cuda::kMaxHeadDim || params.dim_v > cuda::kMaxHeadDim)
    throw py::value_error("the CUDA kernels take head dims up to " + std::to_string(cuda::kMaxHeadDim));
#endif
  params.scale = scale;
  params.query = query;
  params.key = key;
  params.value = value;
  params.bias = bias;
  params.mask = mask_params(mask);
  params.dropout = dropout_params(dropout_p, dropout_seed);
  params.lse = lse;
  set_executor(params, executor);
  return params;
}

// A launch in two steps, so that Python allocates the workspace in between: the constructor fills the parameters,
// `workspace_bytes` tells how much they need, `run` runs without the GIL. The class is local to the module: the other module
// has one over the same parameters.
template <typename Params>
py::class_<Params> launch(py::module_& module, const char* name, int64_t (*workspace)(const Params&),
                          void (*kernel)(const Params&)) {
  return py::class_<Params>(module, name, py::module_local())
      .def_property_readonly("workspace_bytes", workspace)
      .def(
          "run",
          [kernel](Params& params, uintptr_t workspace_ptr, int64_t workspace_bytes) {
            params.workspace = reinterpret_cast<void*>(workspace_ptr);
            params.workspace_bytes = workspace_bytes;
            const py::gil_scoped_release release;
            kernel(params);
          },
          py::arg("workspace") = 0, py::arg("workspace_bytes") = 0);
}

#define FASTATTN_SHARED                                                                                        \
  const py::tuple &sizes, double scale, const TensorRef &query, const TensorRef &key, const TensorRef &value,  \
      const TensorRef &bias, const py::object &mask, double dropout_p, uint64_t dropout_seed,                  \
      const TensorRef &lse, uint64_t executor
#define FASTATTN_SHARED_PARAMS(Params) \
  attention_params<Params>(sizes, scale, query, key, value, bias, mask, dropout_p, dropout_seed, lse, executor)

void bind_attention(py::module_& module) {
  launch<AttentionForwardParams>(module, "AttentionForward", kernels::attention_forward_workspace, kernels::attention_forward)
      .def(py::init([](FASTATTN_SHARED, const TensorRef& out) {
        auto params = FASTATTN_SHARED_PARAMS(AttentionForwardParams);
        params.out = out;
        return params;
      }));
  launch<AttentionBackwardParams>(module, "AttentionBackward", kernels::attention_backward_workspace,
                                  kernels::attention_backward)
      .def(py::init([](FASTATTN_SHARED, const TensorRef& out, const TensorRef& grad_out, const TensorRef& grad_lse,
                       const TensorRef& grad_query, const TensorRef& grad_key, const TensorRef& grad_value,
                       const TensorRef& grad_bias) {
        auto params = FASTATTN_SHARED_PARAMS(AttentionBackwardParams);
        params.out = out;
        params.grad_out = grad_out;
        params.grad_lse = grad_lse;
        params.grad_query = grad_query;
        params.grad_key = grad_key;
        params.grad_value = grad_value;
        params.grad_bias = grad_bias;
        return params;
      }));
  launch<AttentionWeightsParams>(module, "AttentionWeights", kernels::attention_weights_workspace, kernels::attention_weights)
      .def(py::init([](FASTATTN_SHARED, const TensorRef& weights, bool average_heads) {
        auto params = FASTATTN_SHARED_PARAMS(AttentionWeightsParams);
        params.weights = weights;
        params.average_heads = average_heads;
        return params;
      }));
  launch<AttentionWeightsBackwardParams>(module, "AttentionWeightsBackward", kernels::attention_weights_backward_workspace,
                                         kernels::attention_weights_backward)
      .def(py::init([](FASTATTN_SHARED, const TensorRef& grad_weights, bool average_heads, const TensorRef& grad_query,
                       const TensorRef& grad_key, const TensorRef& grad_lse, const TensorRef& grad_bias) {
        auto params = FASTATTN_SHARED_PARAMS(AttentionWeightsBackwardParams);
        params.grad_weights = grad_weights;
        params.average_heads = average_heads;
        params.grad_query = grad_query;
        params.grad_key = grad_key;
        params.grad_lse = grad_lse;
        params.grad_bias = grad_bias;
        return params;
      }));
}

#undef FASTATTN_SHARED
#undef FASTATTN_SHARED_PARAMS

void bind_mask_tiles(py::module_& module) {
  module.def("mask_tiles", [](const py::list& masks, const py::tuple& sizes, int64_t block_m, int64_t block_n,
                              const py::tuple& outputs, uint64_t executor) {
    MaskTilesParams params;
    if (masks.size() > MaskTilesParams::kMaxMasks) throw py::value_error("too many masks");
    for (const py::handle& item : masks) {
      const auto mask = py::cast<TensorRef>(item);
      params.mask[params.num_masks] = pointer<uint8_t>(mask);
      for (int n = 0; n < 4; ++n) params.mask_stride[params.num_masks][n] = mask.stride[n];
      ++params.num_masks;
    }
    int64_t* const fields[] = {&params.batch, &params.heads, &params.len_q, &params.len_k};
    int n = 0;
    for (int64_t* field : fields) *field = py::cast<int64_t>(sizes[n++]);
    params.block_m = block_m;
    params.block_n = block_n;
    uint64_t** const pointers[] = {&params.bits, &params.live, &params.full, &params.live_t, &params.full_t};
    n = 0;
    for (uint64_t** output : pointers) *output = pointer<uint64_t>(py::cast<TensorRef>(outputs[n++]));
    set_executor(params, executor);
    const py::gil_scoped_release release;
    kernels::mask_tiles(params);
  });
}

void bind_masked_loss(py::module_& module) {
  launch<MaskedLossParams>(module, "MaskedLoss", kernels::masked_loss_workspace, kernels::masked_loss)
      .def(py::init([](int kind, int reduction, double beta, const py::tuple& size, int64_t patch_size,
                       const TensorRef& input, const TensorRef& target, const TensorRef& mask, bool normalize_target,
                       double normalize_eps, const TensorRef& loss, const TensorRef& grad_input,
                       const TensorRef& grad_loss, uint64_t executor) {
        MaskedLossParams params;
        params.kind = static_cast<LossKind>(kind);
        params.reduction = static_cast<Reduction>(reduction);
        params.beta = beta;
        for (int n = 0; n < 4; ++n) {
          params.size[n] = py::cast<int64_t>(size[n]);
          params.mask_stride[n] = mask.stride[n];
        }
        params.patch_size = patch_size;
        params.input = input;
        params.target = target;
        params.mask = pointer<uint8_t>(mask);
        params.normalize_target = normalize_target;
        params.normalize_eps = normalize_eps;
        params.loss = loss;
        params.grad_input = grad_input;
        params.grad_loss = grad_loss;
        set_executor(params, executor);
        return params;
      }));
}

#if !defined(FASTATTN_CUDA_MODULE)

// sizes: (batch, len_q, len_k, features, dim_v).
#define FASTATTN_ADDITIVE                                                                                        \
  const py::tuple &sizes, const TensorRef &query, const TensorRef &key, const TensorRef &value,                  \
      const TensorRef &score_weight, const py::object &mask, const TensorRef &lse, uint64_t executor
#define FASTATTN_ADDITIVE_PARAMS(Params) \
  additive_attention_params<Params>(sizes, query, key, value, score_weight, mask, lse, executor)

template <typename Params>
Params additive_attention_params(FASTATTN_ADDITIVE) {
  Params params;
  int64_t* const fields[] = {&params.batch, &params.len_q, &params.len_k, &params.features, &params.dim_v};
  int n = 0;
  for (int64_t* field : fields) *field = py::cast<int64_t>(sizes[n++]);
  params.query = query;
  params.key = key;
  params.value = value;
  params.score_weight = score_weight;
  params.mask = mask_params(mask);
  params.lse = lse;
  set_executor(params, executor);
  return params;
}

void bind_additive_attention(py::module_& module) {
  launch<AdditiveAttentionForwardParams>(module, "AdditiveAttentionForward", kernels::additive_attention_forward_workspace,
                                         kernels::additive_attention_forward)
      .def(py::init([](FASTATTN_ADDITIVE, const TensorRef& out) {
        auto params = FASTATTN_ADDITIVE_PARAMS(AdditiveAttentionForwardParams);
        params.out = out;
        return params;
      }));
  launch<AdditiveAttentionBackwardParams>(module, "AdditiveAttentionBackward", kernels::additive_attention_backward_workspace,
                                          kernels::additive_attention_backward)
      .def(py::init([](FASTATTN_ADDITIVE, const TensorRef& out, const TensorRef& grad_out, const TensorRef& grad_lse,
                       const TensorRef& grad_query, const TensorRef& grad_key, const TensorRef& grad_value,
                       const TensorRef& grad_score_weight) {
        auto params = FASTATTN_ADDITIVE_PARAMS(AdditiveAttentionBackwardParams);
        params.out = out;
        params.grad_out = grad_out;
        params.grad_lse = grad_lse;
        params.grad_query = grad_query;
        params.grad_key = grad_key;
        params.grad_value = grad_value;
        params.grad_score_weight = grad_score_weight;
        return params;
      }));
}

#undef FASTATTN_ADDITIVE
#undef FASTATTN_ADDITIVE_PARAMS

void bind_linear_masked_loss(py::module_& module) {
  launch<LinearMaskedLossParams>(module, "LinearMaskedLoss", kernels::linear_masked_loss_workspace,
                                 kernels::linear_masked_loss)
      .def(py::init([](int kind, int reduction, double beta, const py::tuple& size, int64_t patch_size,
                       const TensorRef& hidden, const TensorRef& weight, const TensorRef& bias, const TensorRef& target,
                       const TensorRef& mask, bool normalize_target, double normalize_eps, const TensorRef& loss,
                       const TensorRef& grad_hidden, const TensorRef& grad_weight, const TensorRef& grad_bias,
                       const TensorRef& grad_target, uint64_t executor) {
        LinearMaskedLossParams params;
        params.kind = static_cast<LossKind>(kind);
        params.reduction = static_cast<Reduction>(reduction);
        params.beta = beta;
        int64_t* const fields[] = {&params.batch, &params.grid_height, &params.grid_width, &params.dim_in, &params.dim_out};
        int n = 0;
        for (int64_t* field : fields) *field = py::cast<int64_t>(size[n++]);
        params.patch_size = patch_size;
        params.hidden = hidden;
        params.weight = weight;
        params.bias = bias;
        params.target = target;
        params.mask = pointer<uint8_t>(mask);
        for (int d = 0; d < 3; ++d) params.mask_stride[d] = mask.stride[d];
        params.normalize_target = normalize_target;
        params.normalize_eps = normalize_eps;
        params.loss = loss;
        params.grad_hidden = grad_hidden;
        params.grad_weight = grad_weight;
        params.grad_bias = grad_bias;
        params.grad_target = grad_target;
        set_executor(params, executor);
        return params;
      }));
}

// Direct calls: attention and its gradient in a single call from Python, since what lies between Python and a small problem's
// kernel takes longer than the kernel. They are handed the tensors themselves, read them through their Python attributes and
// look at everything that the kernels rely on. Whatever does not fit is left alone: false, and nothing was computed; the way of
// every problem then takes it, or finds the words for what is wrong.

constexpr int64_t kMaxHeadDim = 512;  // MAX_HEAD_DIM_CPU of fastattn/dispatch.py
constexpr int kInt64 = 4, kBool = 5;  // behind the numbers of DType

PyObject* tensor_types[2];  // torch.Tensor, torch.nn.Parameter; a subclass may be more than its memory
PyObject* tensor_dtypes[6];  // as DType, then int64 and bool

void set_torch(const py::tuple& types, const py::tuple& dtypes) {
  for (int n = 0; n < 2; ++n) tensor_types[n] = py::object(types[n]).release().ptr();
  for (int n = 0; n < 6; ++n) tensor_dtypes[n] = py::object(dtypes[n]).release().ptr();
}

// What does not fit, on the way out of a direct call.
struct Unfit {};

void require(bool condition) {
  if (!condition) throw Unfit();
}

struct Names {
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const stride = PyUnicode_InternFromString("stride");
  PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* const tiles[5] = {PyUnicode_InternFromString("bits"), PyUnicode_InternFromString("live"),
                              PyUnicode_InternFromString("full"), PyUnicode_InternFromString("live_t"),
                              PyUnicode_InternFromString("full_t")};
  PyObject* const block_m = PyUnicode_InternFromString("block_m");
  PyObject* const block_n = PyUnicode_InternFromString("block_n");
};

const Names& names() {
  static const Names* const held = new Names;
  return *held;
}

// A result of the C API; an error in Python, such as that of a tensor without memory, does not fit.
py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object attribute(py::handle source, PyObject* name) { return checked(PyObject_GetAttr(source.ptr(), name)); }

int64_t integer(PyObject* source) {
  const int64_t value = PyLong_AsLongLong(source);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A tensor of at most 4 dimensions, with its sizes.
struct Operand {
  TensorRef ref;
  int64_t size[4] = {1, 1, 1, 1};
  int dims = 0, dtype = 0;

  explicit Operand(py::handle tensor) {
    require(Py_IS_TYPE(tensor.ptr(), reinterpret_cast<PyTypeObject*>(tensor_types[0])) ||
            Py_IS_TYPE(tensor.ptr(), reinterpret_cast<PyTypeObject*>(tensor_types[1])));
    require(attribute(tensor, names().is_cpu).ptr() == Py_True);
    const py::object type = attribute(tensor, names().dtype), shape = attribute(tensor, names().shape);
    const py::object strides = checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().stride));
    const py::object address = checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().data_ptr));
    while (dtype < 6 && tensor_dtypes[dtype] != type.ptr()) ++dtype;
    require(dtype < 6 && PyTuple_Check(shape.ptr()) && PyTuple_Check(strides.ptr()));
    dims = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    require(dims <= 4 && PyTuple_GET_SIZE(strides.ptr()) == dims);
    for (int n = 0; n < dims; ++n) {
      size[n] = integer(PyTuple_GET_ITEM(shape.ptr(), n));
      ref.stride[n] = integer(PyTuple_GET_ITEM(strides.ptr(), n));
    }
    // The imaginary part of a conjugate is the negative of what lies there. Half of a complex number has no neighbour of its kind.
    if (dims == 0 || size[dims - 1] == 1 || ref.stride[dims - 1] != 1)
      require(checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().is_neg)).ptr() == Py_False);
    ref.ptr = PyLong_AsVoidPtr(address.ptr());
    ref.dtype = static_cast<DType>(dtype < kInt64 ? dtype : 0);
  }

  // With ones in front, as broadcasting has it.
  void widen() {
    for (; dims < 4; ++dims)
      for (int n = 3; n >= 0; --n) {
        size[n] = n == 0 ? 1 : size[n - 1];
        ref.stride[n] = n == 0 ? 0 : ref.stride[n - 1];
      }
  }

  // Each dimension of the wanted size, or 1 and then repeated.
  void broadcast_to(const int64_t (&wanted)[4]) {
    for (int n = 0; n < 4; ++n) {
      require(size[n] == 1 || size[n] == wanted[n]);
      if (size[n] == 1) ref.stride[n] = 0;
    }
  }

  bool is(int64_t s0, int64_t s1, int64_t s2, int64_t s3) const {
    return dims == 4 && size[0] == s0 && size[1] == s1 && size[2] == s2 && size[3] == s3;
  }

  bool has_unit_stride() const { return size[3] == 1 || ref.stride[3] == 1; }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int n = dims - 1; n >= 0; --n) {
      if (size[n] != 1 && ref.stride[n] != step) return false;
      step *= size[n];
    }
    return true;
  }
};

// Memory for the time of one call. A thread keeps as much as small problems need.
class CallMemory {
 public:
  char* take(int64_t bytes) {
    thread_local const std::unique_ptr<char[]> kept(new char[kKept]);
    bytes = (bytes + 63) / 64 * 64;
    if (bytes <= kKept - used_) {
      used_ += bytes;
      return kept.get() + used_ - bytes;
    }
    own_.emplace_back(new char[bytes]);
    return own_.back().get();
  }

 private:
  static constexpr int64_t kKept = 256 * 1024;
  int64_t used_ = 0;
  std::vector<std::unique_ptr<char[]>> own_;
};

template <typename Params>
void direct_problem(Params& params, py::handle query, py::handle key, py::handle value, py::handle bias, double scale,
                    double dropout_p, uint64_t seed, uint64_t executor) {
  const Operand q(query), k(key), v(value);
  const int type = q.dtype;
  require(type < kInt64 && k.dtype == type && v.dtype == type && q.dims == 4 && k.dims == 4 && v.dims == 4);
  for (const Operand* operand : {&q, &k, &v}) {
    for (const int64_t size : operand->size) require(size > 0);
    require(operand->size[3] <= kMaxHeadDim && operand->has_unit_stride());
  }
  require(q.size[1] % k.size[1] == 0 && k.is(q.size[0], k.size[1], k.size[2], q.size[3]) &&
          v.is(q.size[0], k.size[1], k.size[2], v.size[3]));
  params.batch = q.size[0];
  params.heads_q = q.size[1];
  params.heads_kv = k.size[1];
  params.len_q = q.size[2];
  params.len_k = k.size[2];
  params.dim_qk = q.size[3];
  params.dim_v = v.size[3];
  params.scale = scale;
  params.query = q.ref;
  params.key = k.ref;
  params.value = v.ref;
  if (!bias.is_none()) {
    Operand b(bias);
    require(b.dtype == type || b.dtype == static_cast<int>(DType::kFloat32));
    b.widen();
    b.broadcast_to({params.batch, params.heads_q, params.len_q, params.len_k});
    params.bias = b.ref;
  }
  params.dropout = dropout_params(dropout_p, seed);
  set_executor(params, executor);
}

// [B|1] or [B|1, length], as a mask has them; null stays null.
TensorRef mask_part(py::handle source, int dtype, int64_t batch, int64_t length) {
  if (source.is_none()) return {};
  Operand part(source);
  require(part.dtype == dtype && part.dims == (length ? 2 : 1) && (part.size[0] == 1 || part.size[0] == batch));
  require(!length || part.size[1] == length);
  if (part.size[0] == 1) part.ref.stride[0] = 0;
  return part.ref;
}

// The five arrays of a tile map, in this order: bits, live, full, live_t, full_t.
struct TileShapes {
  int64_t rows[5], words[5];

  TileShapes(int64_t len_q, int64_t len_k, int64_t block_m, int64_t block_n) {
    const auto tiles = [](int64_t length, int64_t block) { return (length + block - 1) / block; };
    const int64_t tiles_q = tiles(len_q, block_m), tiles_k = tiles(len_k, block_n);
    rows[0] = len_q, words[0] = tiles(len_k, 64);
    for (const int n : {1, 2}) rows[n] = tiles_q, words[n] = tiles(tiles_k, 64);
    for (const int n : {3, 4}) rows[n] = tiles_k, words[n] = tiles(tiles_q, 64);
  }
};

void set_tiles(MaskParams& mask, uint64_t* const (&array)[5], const TileShapes& shapes, int64_t batch, int64_t heads,
               int64_t block_m, int64_t block_n) {
  const auto stride_h = [&](int n) { return heads > 1 ? shapes.rows[n] * shapes.words[n] : 0; };
  const auto stride_b = [&](int n) { return batch > 1 ? heads * shapes.rows[n] * shapes.words[n] : 0; };
  mask.bits = array[0], mask.live = array[1], mask.full = array[2], mask.live_t = array[3], mask.full_t = array[4];
  mask.stride_bits_b = stride_b(0), mask.stride_bits_h = stride_h(0), mask.words_per_row = shapes.words[0];
  mask.stride_map_b = stride_b(1), mask.stride_map_h = stride_h(1), mask.map_words_per_row = shapes.words[1];
  mask.stride_map_t_b = stride_b(3), mask.stride_map_t_h = stride_h(3), mask.map_t_words_per_row = shapes.words[3];
  mask.block_m = block_m;
  mask.block_n = block_n;
}

// A KernelMask of fastattn/masks.py.
template <typename Params>
void direct_kernel_mask(Params& params, py::handle source) {
  require(PyTuple_Check(source.ptr()) && PyTuple_GET_SIZE(source.ptr()) == 7);
  const auto part = [&](int n) { return py::handle(PyTuple_GET_ITEM(source.ptr(), n)); };
  MaskParams& mask = params.mask;
  if (!part(0).is_none()) {
    require(PyTuple_Check(part(0).ptr()) && PyTuple_GET_SIZE(part(0).ptr()) == 4);
    int64_t side[4];  // left and right of the first query at the first key, then of the last at the last
    for (int n = 0; n < 4; ++n) side[n] = integer(PyTuple_GET_ITEM(part(0).ptr(), n));
    const int64_t offset = params.len_k - params.len_q;
    mask.band_low = -side[0];
    mask.band_high = side[1];
    if (side[2] < kUnlimited && offset - side[2] > mask.band_low) mask.band_low = offset - side[2];
    if (side[3] < kUnlimited && offset + side[3] < mask.band_high) mask.band_high = offset + side[3];
  }
  const TensorRef prefix = mask_part(part(1), kInt64, params.batch, 0), lengths = mask_part(part(2), kInt64, params.batch, 0);
  const TensorRef keep = mask_part(part(3), kBool, params.batch, params.len_k);
  const TensorRef query_ids = mask_part(part(4), kInt64, params.batch, params.len_q);
  const TensorRef key_ids = mask_part(part(5), kInt64, params.batch, params.len_k);
  require(query_ids.ptr == nullptr ? key_ids.ptr == nullptr : key_ids.ptr != nullptr);
  mask.prefix_lengths = pointer<int64_t>(prefix);
  mask.stride_prefix_b = prefix.stride[0];
  mask.key_lengths = pointer<int64_t>(lengths);
  mask.stride_key_lengths_b = lengths.stride[0];
  mask.key_keep = pointer<uint8_t>(keep);
  mask.stride_keep_b = keep.stride[0];
  mask.stride_keep_j = keep.stride[1];
  mask.query_segments = pointer<int64_t>(query_ids);
  mask.stride_qseg_b = query_ids.stride[0];
  mask.stride_qseg_i = query_ids.stride[1];
  mask.key_segments = pointer<int64_t>(key_ids);
  mask.stride_kseg_b = key_ids.stride[0];
  mask.stride_kseg_j = key_ids.stride[1];
  if (part(6).is_none()) return;
  const int64_t block_m = integer(attribute(part(6), names().block_m).ptr());
  const int64_t block_n = integer(attribute(part(6), names().block_n).ptr());
  require(block_m >= 1 && block_n >= 1 && block_n % 64 == 0);
  const TileShapes shapes(params.len_q, params.len_k, block_m, block_n);
  uint64_t* array[5];
  int64_t batch = 1, heads = 1;
  for (int n = 0; n < 5; ++n) {
    const Operand tiles(attribute(part(6), names().tiles[n]));
    if (n == 0) batch = tiles.size[0], heads = tiles.size[1];
    require((batch == 1 || batch == params.batch) && (heads == 1 || heads == params.heads_q) && tiles.dtype == kInt64 &&
            tiles.is(batch, heads, shapes.rows[n], shapes.words[n]) && tiles.is_contiguous());
    array[n] = pointer<uint64_t>(tiles.ref);
  }
  set_tiles(mask, array, shapes, batch, heads, block_m, block_n);
}

// A bool tensor broadcastable to [B, Hq, L, S]: what Mask makes of it (fastattn/masks.py, _fold), in the memory of the call.
template <typename Params>
void direct_dense_mask(Params& params, py::handle source, CallMemory& memory) {
  Operand keep(source);
  require(keep.dtype == kBool);
  keep.widen();
  keep.broadcast_to({params.batch, params.heads_q, params.len_q, params.len_k});
  for (int n = 0; n < 4; ++n)
    if (keep.ref.stride[n] == 0) keep.size[n] = 1;
  if (keep.size[1] == 1 && keep.size[2] == 1) {  // a padding mask written as a dense one
    params.mask.key_keep = pointer<uint8_t>(keep.ref);
    params.mask.stride_keep_b = keep.ref.stride[0];
    params.mask.stride_keep_j = keep.ref.stride[3];
    return;
  }
  MaskTilesParams tiles;
  tiles.num_masks = 1;
  tiles.mask[0] = pointer<uint8_t>(keep.ref);
  for (int n = 0; n < 4; ++n) tiles.mask_stride[0][n] = keep.ref.stride[n];
  tiles.batch = keep.size[0];
  tiles.heads = keep.size[1];
  tiles.len_q = params.len_q;
  tiles.len_k = params.len_k;
  tiles.block_m = kernels::kTileM;
  tiles.block_n = kernels::kTileN;
  tiles.num_threads = params.num_threads;
  const TileShapes shapes(tiles.len_q, tiles.len_k, tiles.block_m, tiles.block_n);
  uint64_t* array[5];
  for (int n = 0; n < 5; ++n) {
    const int64_t words = tiles.batch * tiles.heads * shapes.rows[n] * shapes.words[n];
    array[n] = reinterpret_cast<uint64_t*>(memory.take(words * sizeof(uint64_t)));
  }
  tiles.bits = array[0], tiles.live = array[1], tiles.full = array[2], tiles.live_t = array[3], tiles.full_t = array[4];
  set_tiles(params.mask, array, shapes, tiles.batch, tiles.heads, tiles.block_m, tiles.block_n);
  const py::gil_scoped_release release;
  kernels::mask_tiles(tiles);
}

template <typename Params>
void direct_mask(Params& params, py::handle source, CallMemory& memory) {
  if (PyTuple_Check(source.ptr())) direct_kernel_mask(params, source);
  else if (!source.is_none()) direct_dense_mask(params, source, memory);
}

template <typename Params>
void run_direct(Params& params, int64_t (*workspace)(const Params&), void (*kernel)(const Params&), CallMemory& memory) {
  params.workspace_bytes = workspace(params);
  params.workspace = memory.take(params.workspace_bytes);
  const py::gil_scoped_release release;
  kernel(params);
}

// Whether `call` found that everything fits, and computed.
template <typename Call>
bool fits(const Call& call) {
  try {
    call();
    return true;
  } catch (const Unfit&) {
    return false;
  } catch (const py::error_already_set&) {
    return false;
  }
}

// attention_forward of fastattn/backends/native.py. mask: None, a KernelMask or a bool tensor. out [B, Hq, L, Dv] lies over
// memory [B, L, Hq, Dv], lse [B, Hq, L] is contiguous, both new; lse may be 0, where nobody asks for it.
bool attention_direct(py::handle query, py::handle key, py::handle value, py::handle bias, py::handle mask, double scale,
                      double dropout_p, uint64_t seed, uintptr_t out, uintptr_t lse, uint64_t executor) {
  return fits([&] {
    AttentionForwardParams params;
    CallMemory memory;
    direct_problem(params, query, key, value, bias, scale, dropout_p, seed, executor);
    direct_mask(params, mask, memory);
    const int64_t rows = params.batch * params.heads_q * params.len_q, row = params.heads_q * params.dim_v;
    params.lse.dtype = params.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    params.lse.ptr = lse ? reinterpret_cast<void*>(lse) : memory.take(rows * sizeof(double));
    params.out = {reinterpret_cast<void*>(out), {params.len_q * row, params.dim_v, row, 1}, params.query.dtype};
    run_direct(params, kernels::attention_forward_workspace, kernels::attention_forward, memory);
  });
}

// attention_backward of fastattn/backends/native.py. mask: as in attention_direct. grad_bias, when not None, is contiguous, of
// the bias's shape and of lse's dtype.
bool attention_backward_direct(py::handle grad_out, py::handle grad_lse, py::handle query, py::handle key, py::handle value,
                               py::handle out, py::handle lse, py::handle bias, py::handle mask, double scale, double dropout_p,
                               uint64_t seed, py::handle grad_query, py::handle grad_key, py::handle grad_value,
                               py::handle grad_bias, uint64_t executor) {
  return fits([&] {
    AttentionBackwardParams params;
    CallMemory memory;
    direct_problem(params, query, key, value, bias, scale, dropout_p, seed, executor);
    direct_mask(params, mask, memory);
    const int64_t B = params.batch, Hq = params.heads_q, Hkv = params.heads_kv, L = params.len_q, S = params.len_k;
    const auto like = [&](py::handle tensor, int64_t heads, int64_t length, int64_t dim) {
      const Operand operand(tensor);
      require(operand.dtype == static_cast<int>(params.query.dtype) && operand.is(B, heads, length, dim) &&
              operand.has_unit_stride());
      return operand.ref;
    };
    params.out = like(out, Hq, L, params.dim_v);
    params.grad_out = like(grad_out, Hq, L, params.dim_v);
    params.grad_query = like(grad_query, Hq, L, params.dim_qk);
    params.grad_key = like(grad_key, Hkv, S, params.dim_qk);
    params.grad_value = like(grad_value, Hkv, S, params.dim_v);
    const DType accumulated = params.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const auto of_rows = [&](py::handle tensor) {
      const Operand operand(tensor);
      require(operand.dtype == static_cast<int>(accumulated) && operand.dims == 3 && operand.size[0] == B &&
              operand.size[1] == Hq && operand.size[2] == L);
      return operand;
    };
    const Operand row_lse = of_rows(lse);
    require(row_lse.is_contiguous());
    params.lse = row_lse.ref;
    if (!grad_lse.is_none()) params.grad_lse = of_rows(grad_lse).ref;
    if (!grad_bias.is_none()) {
      Operand operand(grad_bias);
      const Operand of_bias(bias);
      require(operand.dtype == static_cast<int>(accumulated) && operand.is_contiguous() && operand.dims == of_bias.dims);
      for (int n = 0; n < 4; ++n) require(operand.size[n] == of_bias.size[n]);
      operand.widen();
      operand.broadcast_to({B, Hq, L, S});
      params.grad_bias = operand.ref;
    }
    run_direct(params, kernels::attention_backward_workspace, kernels::attention_backward, memory);
  });
}

// The rules of csrc/core, element by element and tile by tile, for the tests that compare every implementation of them.
void bind_rules(py::module_& module) {
  // out: uint8 [B, H, L, S] contiguous, whether the pair may attend
  module.def("mask_elements", [](const py::object& mask_source, int64_t B, int64_t H, int64_t L, int64_t S,
                                 const TensorRef& out) {
    const MaskParams mask = mask_params(mask_source);
    uint8_t* element = pointer<uint8_t>(out);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < L; ++i)
          for (int64_t j = 0; j < S; ++j) *element++ = may_attend(mask, b, h, i, j);
  });
  // out: uint8 [B, H, ceil(L / block_m), ceil(S / block_n)] contiguous, 0 empty, 1 partial, 2 full
  module.def("mask_tile_classes", [](const py::object& mask_source, int64_t B, int64_t H, int64_t L, int64_t S,
                                     int64_t block_m, int64_t block_n, const TensorRef& out) {
    if (block_m < 1 || block_n < 1 || block_n > 64) throw py::value_error("block_m >= 1 and 1 <= block_n <= 64");
    const MaskParams mask = mask_params(mask_source);
    uint8_t* tile = pointer<uint8_t>(out);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < L; i += block_m)
          for (int64_t j = 0; j < S; j += block_n)
            *tile++ = static_cast<uint8_t>(
                tile_class(mask, b, h, i, min64(i + block_m, L), j, min64(j + block_n, S)));
  });
  module.def("philox", [](uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const PhiloxBlock block = philox4x32(seed, c0, c1, c2, c3);
    return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
  });
  // out: uint8 [B, H, L, S] contiguous, whether dropout keeps the element
  module.def("dropout_elements", [](double p, uint64_t seed, int64_t B, int64_t H, int64_t L, int64_t S,
                                    const TensorRef& out) {
    uint8_t* element = pointer<uint8_t>(out);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < L; ++i)
          for (int64_t j = 0; j < S; ++j) *element++ = dropout_keeps({p, seed}, b, h, i, j);
  });
}

py::tuple supported_levels() {
  const char* names[cpu::kMaxLevels];
  const int count = cpu::supported_levels(names);
  py::tuple levels(count);
  for (int n = 0; n < count; ++n) levels[n] = names[n];
  return levels;
}

// The level in use; ValueError when FASTATTN_CPU_LEVEL asks for one that is not to be had.
std::string level() {
  if (const char* const name = cpu::level_name()) return name;
  std::string accepted;
  for (const py::handle& name : supported_levels()) accepted += (accepted.empty() ? "" : ", ") + py::cast<std::string>(name);
  throw py::value_error("FASTATTN_CPU_LEVEL must be one of " + accepted + " on this CPU, got '" +
                        std::string(std::getenv("FASTATTN_CPU_LEVEL")) + "'");
}

#endif

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
#if defined(FASTATTN_CUDA_MODULE)
  py::list architectures;
  for (const int architecture : cuda::kArchitectures) architectures.append(architecture);
  info["architectures"] = py::tuple(architectures);
  info["cuda"] = cuda::toolkit();
#else
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["levels"] = supported_levels();
  info["level"] = level();
#endif
  return info;
}

}  // namespace

#if defined(FASTATTN_CUDA_MODULE)
PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of fastattn; called by fastattn/backends/native.py only.";
  module.attr("EMULATED") = cuda::kEmulated;
#else
PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of fastattn; called by fastattn/backends/native.py only.";
  module.def("level", level);
  module.def("supported_levels", supported_levels);
  module.def("advise_huge_pages",
             [](uintptr_t address, int64_t bytes) { cpu::advise_huge_pages(reinterpret_cast<void*>(address), bytes); });
  module.def("set_torch", set_torch);
  module.def("attention_direct", attention_direct);
  module.def("attention_backward_direct", attention_backward_direct);
  bind_rules(module);
  bind_additive_attention(module);
  bind_linear_masked_loss(module);
#endif
  module.def("build_info", build_info);
  module.attr("TILE_M") = kernels::kTileM;
  module.attr("TILE_N") = kernels::kTileN;
  bind_attention(module);
  bind_mask_tiles(module);
  bind_masked_loss(module);
}
