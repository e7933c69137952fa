// The Python modules, the only C++ file that knows Python: fastattn._native over the CPU kernels and, compiled a second time
// with FASTATTN_CUDA_MODULE, fastattn._cuda over the CUDA kernels. It knows no tensor library either: a tensor comes as (data
// pointer, strides, dtype code), and fastattn/backends/native.py makes these from torch tensors, allocates every output and
// the workspace, and has checked what the kernels rely on.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

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

constexpr int64_t kSmallWorkspace = 256 * 1024;  // bytes that a thread keeps
constexpr int64_t kSmallHeadDim = 256;

// A tensor of 4 dimensions without an empty one, whose last lies in steps of 1.
bool read_sizes(const TensorRef& tensor, const py::tuple& shape, int64_t (&sizes)[4]) {
  if (shape.size() != 4) return false;
  for (int n = 0; n < 4; ++n) {
    sizes[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), n));
    if (sizes[n] < 1) return false;
  }
  return sizes[3] <= kSmallHeadDim && (sizes[3] == 1 || tensor.stride[3] == 1);
}

// The forward of a small problem without mask, bias and dropout in a single call: what happens between Python and the kernel
// takes longer than such a kernel. out [B, Hq, L, Dv] lies over memory [B, L, Hq, Dv], lse [B, Hq, L] is contiguous. False, and
// nothing was computed, when the sizes do not make a problem or are not small.
bool attention_forward_small(const TensorRef& query, const py::tuple& query_shape, const TensorRef& key,
                             const py::tuple& key_shape, const TensorRef& value, const py::tuple& value_shape, double scale,
                             uintptr_t out, uintptr_t lse, uint64_t executor) {
  int64_t q[4], k[4], v[4];
  if (!read_sizes(query, query_shape, q) || !read_sizes(key, key_shape, k) || !read_sizes(value, value_shape, v)) return false;
  if (q[0] != k[0] || q[0] != v[0] || k[1] != v[1] || q[1] % k[1] || k[2] != v[2] || q[3] != k[3]) return false;
  AttentionForwardParams params;
  params.batch = q[0];
  params.heads_q = q[1];
  params.heads_kv = k[1];
  params.len_q = q[2];
  params.len_k = k[2];
  params.dim_qk = q[3];
  params.dim_v = v[3];
  params.scale = scale;
  params.query = query;
  params.key = key;
  params.value = value;
  params.lse = {reinterpret_cast<void*>(lse), {q[1] * q[2], q[2], 1, 0}, query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32};
  params.out = {reinterpret_cast<void*>(out), {q[2] * q[1] * v[3], v[3], q[1] * v[3], 1}, query.dtype};
  set_executor(params, executor);
  thread_local std::unique_ptr<char[]> workspace;
  params.workspace_bytes = kernels::attention_forward_workspace(params);
  if (params.workspace_bytes > kSmallWorkspace) return false;
  if (!workspace) workspace = std::make_unique<char[]>(kSmallWorkspace);
  params.workspace = workspace.get();
  const py::gil_scoped_release release;
  kernels::attention_forward(params);
  return true;
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
  module.def("attention_forward_small", attention_forward_small);
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
