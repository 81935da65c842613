// Products by cuBLASLt, with what follows them in its epilogues: a fused bias, GELU, its derivative, gradients of
// biases.
//
// The library is the one that torch has loaded, looked up when it is first needed (cublaslt.cu): nothing is linked, and
// the build needs no header of it. What is used of cublasLt.h is declared here, as versions 12 and 13 have it;
// tests/kernels/test_cublaslt.py compares it with the header.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/half.h"

namespace bmf::cuda {

namespace lt {

struct Algo {
  uint64_t data[8];
};
struct Heuristic {
  Algo algo;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14 };
enum Compute : int { kSumsOfFloat32 = 68 };
enum Transpose : int { kAsItIs = 0, kTransposed = 1 };
enum DescAttribute : int {
  kTransposeA = 3,
  kTransposeB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxStride = 12
};
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8
};

// Entry points, by the names of cublasLt.h less its prefix. Statuses are 0 for success.
struct Api {
  int (*Create)(void** handle);
  int (*MatmulDescCreate)(void** desc, int compute, int scale_type);
  int (*MatmulDescDestroy)(void* desc);
  int (*MatmulDescSetAttribute)(void* desc, int attribute, const void* value, size_t bytes);
  int (*MatrixLayoutCreate)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*MatrixLayoutDestroy)(void* layout);
  int (*MatmulPreferenceCreate)(void** preference);
  int (*MatmulPreferenceDestroy)(void* preference);
  int (*MatmulPreferenceSetAttribute)(void* preference, int attribute, const void* value, size_t bytes);
  int (*MatmulAlgoGetHeuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                                int wanted, Heuristic* found, int* count);
  int (*Matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b,
                void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                const Algo* algo, void* workspace, size_t workspace_bytes, void* stream);
};

}  // namespace lt

// What is done to a product before it is stored, as cublasLt.h puts its epilogues together. gelu is that of tanh, the
// only one that cuBLASLt has.
enum class Epilogue : int {
  none = 1,
  relu = 2,
  bias = 4,
  bias_sums = 16,  // bias receives the sums over rows of the result
  gelu = 32,
  gelu_slope = 64,  // times gelu'(aux)
  aux = 128,        // what gelu is applied to: received, or given
  left_sums = 512   // bias receives the sums of each row of the left operand
};
constexpr Epilogue operator|(Epilogue a, Epilogue b) {
  return static_cast<Epilogue>(static_cast<int>(a) | static_cast<int>(b));
}
constexpr Epilogue with(Epilogue e, bool also, Epilogue b) { return !also ? e : e == Epilogue::none ? b : e | b; }

// [rows, columns] in memory, `stride` elements from row to row; seen as its transpose where `transposed`.
struct Matrix {
  void* data;
  lt::DataType type;
  int64_t rows, columns, stride;
  bool transposed = false;
};
inline Matrix transposed(Matrix m) {
  m.transposed = !m.transposed;
  return m;
}

// out = epilogue(left right), + out where `adds`, summed in float32. bias [columns of out], or for left_sums [rows of
// out], is of out's type; aux has out's shape and type.
struct Product {
  Matrix left, right, out;
  Epilogue epilogue = Epilogue::none;
  void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_stride = 0;
  bool adds = false;
};

struct Workspace {
  void* data;
  size_t bytes;
};
constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLASLt asks for on Hopper

// What torch has loaded, or null; and a handle for the current device, or null.
const lt::Api* lt_api();
void* lt_handle();

// Descriptors of one call, ended with it.
class LtCall {
 public:
  explicit LtCall(const lt::Api& api) : api_(api) {}
  ~LtCall() {
    for (void* layout : layouts_)
      if (layout != nullptr) api_.MatrixLayoutDestroy(layout);
    if (preference_ != nullptr) api_.MatmulPreferenceDestroy(preference_);
    if (desc_ != nullptr) api_.MatmulDescDestroy(desc_);
  }
  LtCall(const LtCall&) = delete;
  LtCall& operator=(const LtCall&) = delete;

  // 0, or the status of what failed. cuBLASLt's matrices go by columns: it makes the transpose of out, of that of right
  // times that of left, and what is a row here is a column there.
  int run(void* handle, const Product& p, const Workspace& workspace, void* stream) {
    const Matrix operands[4] = {p.right, p.left, p.out, p.out};
    const float one = 1.0f, beta = p.adds ? 1.0f : 0.0f;
    check(api_.MatmulDescCreate(&desc_, lt::kSumsOfFloat32, lt::kFloat32));
    set(lt::kTransposeA, int32_t{p.right.transposed ? lt::kTransposed : lt::kAsItIs});
    set(lt::kTransposeB, int32_t{p.left.transposed ? lt::kTransposed : lt::kAsItIs});
    set(lt::kEpilogue, static_cast<uint32_t>(p.epilogue));
    if (p.bias != nullptr) set(lt::kBiasPointer, p.bias);
    if (p.aux != nullptr) {
      set(lt::kAuxPointer, p.aux);
      set(lt::kAuxStride, p.aux_stride);
    }
    check(status_ == 0 ? api_.MatmulPreferenceCreate(&preference_) : status_);
    prefer(lt::kMaxWorkspaceBytes, static_cast<uint64_t>(workspace.bytes));
    for (int i = 0; i < 4; ++i) {
      const Matrix& m = operands[i];
      if (status_ == 0)
        check(api_.MatrixLayoutCreate(&layouts_[i], m.type, static_cast<uint64_t>(m.columns),
                                      static_cast<uint64_t>(m.rows), m.stride));
      prefer(static_cast<lt::PreferenceAttribute>(lt::kAlignmentA + i), alignment(m));
    }
    lt::Heuristic found{};
    int count = 0;
    if (status_ == 0)
      check(api_.MatmulAlgoGetHeuristic(handle, desc_, layouts_[0], layouts_[1], layouts_[2], layouts_[3], preference_,
                                        1, &found, &count));
    if (status_ == 0 && (count < 1 || found.state != 0)) status_ = kNoAlgorithm;
    if (status_ == 0)
      check(api_.Matmul(handle, desc_, &one, p.right.data, layouts_[0], p.left.data, layouts_[1], &beta, p.out.data,
                        layouts_[2], p.out.data, layouts_[3], &found.algo, workspace.data, workspace.bytes, stream));
    return status_;
  }

  static constexpr int kNoAlgorithm = 15;  // CUBLAS_STATUS_NOT_SUPPORTED

 private:
  // The largest power of two, up to 256, at which all rows begin.
  static uint32_t alignment(const Matrix& m) {
    const auto bytes = static_cast<uint64_t>(m.type == lt::kFloat32 ? 4 : 2);
    const uint64_t all = reinterpret_cast<uint64_t>(m.data) | static_cast<uint64_t>(m.stride) * bytes | 256;
    return static_cast<uint32_t>(all & (~all + 1));
  }
  void check(int status) {
    if (status_ == 0) status_ = status;
  }
  template <class T>
  void set(lt::DescAttribute attribute, const T& value) {
    if (status_ == 0) check(api_.MatmulDescSetAttribute(desc_, attribute, &value, sizeof value));
  }
  template <class T>
  void prefer(lt::PreferenceAttribute attribute, const T& value) {
    if (status_ == 0) check(api_.MatmulPreferenceSetAttribute(preference_, attribute, &value, sizeof value));
  }

  const lt::Api& api_;
  int status_ = 0;
  void *desc_ = nullptr, *preference_ = nullptr, *layouts_[4] = {};
};

}  // namespace bmf::cuda
