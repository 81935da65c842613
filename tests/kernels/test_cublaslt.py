"""What csrc/cuda/cublaslt.h declares, beside cublasLt.h and the library itself, as torch's CUDA packages bring them.

The library takes descriptors without a GPU; only its heuristic and its product need one, and stand aside here.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")  # knows where the headers are that the packages leave out
SOURCE = r"""
#include <cublasLt.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>

#include "cuda/cublaslt.h"

using namespace bmf::cuda;

constexpr bool same(auto ours, auto theirs) { return static_cast<int>(ours) == static_cast<int>(theirs); }
constexpr Epilogue biased(Epilogue e) { return with(e, true, Epilogue::bias); }

static_assert(sizeof(lt::Algo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(lt::Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(lt::Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(same(lt::kFloat32, CUDA_R_32F) && same(lt::kFloat16, CUDA_R_16F) && same(lt::kBFloat16, CUDA_R_16BF));
static_assert(same(lt::kSumsOfFloat32, CUBLAS_COMPUTE_32F));
static_assert(same(lt::kAsItIs, CUBLAS_OP_N) && same(lt::kTransposed, CUBLAS_OP_T));
static_assert(same(lt::kTransposeA, CUBLASLT_MATMUL_DESC_TRANSA));
static_assert(same(lt::kTransposeB, CUBLASLT_MATMUL_DESC_TRANSB));
static_assert(same(lt::kEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE));
static_assert(same(lt::kBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER));
static_assert(same(lt::kAuxPointer, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER));
static_assert(same(lt::kAuxStride, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD));
static_assert(same(lt::kMaxWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES));
static_assert(same(lt::kAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES));
static_assert(same(lt::kAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES));
static_assert(same(lt::kAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES));
static_assert(same(lt::kAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES));
static_assert(same(LtCall::kNoAlgorithm, CUBLAS_STATUS_NOT_SUPPORTED));
static_assert(same(Epilogue::none, CUBLASLT_EPILOGUE_DEFAULT));
static_assert(same(biased(Epilogue::none), CUBLASLT_EPILOGUE_BIAS));
static_assert(same(biased(Epilogue::relu), CUBLASLT_EPILOGUE_RELU_BIAS));
static_assert(same(biased(Epilogue::gelu), CUBLASLT_EPILOGUE_GELU_BIAS));
static_assert(same(biased(Epilogue::gelu | Epilogue::aux), CUBLASLT_EPILOGUE_GELU_AUX_BIAS));
static_assert(same(Epilogue::gelu_slope | Epilogue::aux, CUBLASLT_EPILOGUE_DGELU));
static_assert(same(Epilogue::gelu_slope | Epilogue::aux | Epilogue::bias_sums, CUBLASLT_EPILOGUE_DGELU_BGRAD));
static_assert(same(Epilogue::left_sums, CUBLASLT_EPILOGUE_BGRADB));

void* library = nullptr;

template <class Function>
void take(const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

int main(int, char** arguments) {
  library = dlopen(arguments[1], RTLD_LAZY);
  if (library == nullptr) return std::puts(dlerror()), 2;
  lt::Api api{};
#define TAKE(name) take("cublasLt" #name, api.name)
  TAKE(MatmulDescCreate);
  TAKE(MatmulDescDestroy);
  TAKE(MatmulDescSetAttribute);
  TAKE(MatrixLayoutCreate);
  TAKE(MatrixLayoutDestroy);
  TAKE(MatmulPreferenceCreate);
  TAKE(MatmulPreferenceDestroy);
  TAKE(MatmulPreferenceSetAttribute);
  api.MatmulAlgoGetHeuristic = [](void*, void* desc, void*, void*, void*, void* layout, void*, int, lt::Heuristic*,
                                  int* count) {
    cublasLtEpilogue_t epilogue;  // as the library has understood it
    int64_t aux_stride = 0, stride = 0;
    uint64_t rows = 0;
    size_t written;
    auto* d = static_cast<cublasLtMatmulDesc_t>(desc);
    auto* l = static_cast<cublasLtMatrixLayout_t>(layout);
    decltype(&cublasLtMatmulDescGetAttribute) get;
    decltype(&cublasLtMatrixLayoutGetAttribute) get_layout;
    take("cublasLtMatmulDescGetAttribute", get);
    take("cublasLtMatrixLayoutGetAttribute", get_layout);
    get(d, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue, &written);
    get(d, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_stride, sizeof aux_stride, &written);
    get_layout(l, CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, sizeof rows, &written);
    get_layout(l, CUBLASLT_MATRIX_LAYOUT_LD, &stride, sizeof stride, &written);
    std::printf("epilogue %d, aux %ld, rows %lu, stride %ld\n", static_cast<int>(epilogue), aux_stride, rows, stride);
    *count = 1;
    return 0;
  };
  api.Matmul = [](void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                  void*, void*, const lt::Algo*, void*, size_t, void*) { return 0; };
  alignas(256) static uint16_t numbers[1024];
  const Matrix x{numbers, lt::kBFloat16, 8, 16, 16}, w{numbers, lt::kBFloat16, 24, 16, 16},
      out{numbers, lt::kBFloat16, 8, 24, 32};
  const Product product{x, transposed(w), out, biased(Epilogue::gelu | Epilogue::aux), numbers, numbers, 40};
  return LtCall(api).run(nullptr, product, {numbers, sizeof numbers}, nullptr);
}
"""


def cublas() -> Path | None:
    """The folder of NVIDIA's packages that has the header and the library."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for header in Path(root).glob("*/include/cublasLt.h"):
            return header.parents[1]
    return None


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or not (ROOT / "csrc").is_dir(), reason="needs nvcc and the source tree")
def test_declarations_are_those_of_the_library(tmp_path: Path) -> None:
    folder = cublas()
    if folder is None:
        pytest.skip("needs cublasLt.h of torch's CUDA packages")
    source, program = tmp_path / "check.cpp", tmp_path / "check"
    source.write_text(SOURCE)
    options = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{folder / 'include'}", "-o", str(program), "-ldl"]
    subprocess.run([str(NVCC), str(source), *options], check=True)
    (library,) = (folder / "lib").glob("libcublasLt.so.*")
    run = subprocess.run([str(program), str(library)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "epilogue 164, aux 40, rows 24, stride 32\n"), run.stdout + run.stderr
