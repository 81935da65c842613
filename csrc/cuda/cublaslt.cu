#include <cuda_runtime.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <type_traits>

#include "cuda/cublaslt.h"

namespace bmf::cuda {
namespace {

void* open_library() {
  for (const int how : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})  // before any other, the one that torch has loaded
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (void* library = dlopen(name, how)) return library;
  return nullptr;
}

const lt::Api* load() {
  void* library = open_library();
  if (library == nullptr) return nullptr;
  static lt::Api api;
  bool complete = true;
  const auto find = [&](const char* name, auto& function) {
    void* symbol = dlsym(library, (std::string("cublasLt") + name).c_str());
    complete = complete && symbol != nullptr;
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
#define BMF_FIND(name) find(#name, api.name)
  BMF_FIND(Create);
  BMF_FIND(MatmulDescCreate);
  BMF_FIND(MatmulDescDestroy);
  BMF_FIND(MatmulDescSetAttribute);
  BMF_FIND(MatrixLayoutCreate);
  BMF_FIND(MatrixLayoutDestroy);
  BMF_FIND(MatmulPreferenceCreate);
  BMF_FIND(MatmulPreferenceDestroy);
  BMF_FIND(MatmulPreferenceSetAttribute);
  BMF_FIND(MatmulAlgoGetHeuristic);
  BMF_FIND(Matmul);
#undef BMF_FIND
  return complete ? &api : nullptr;
}

}  // namespace

const lt::Api* lt_api() {
  static const lt::Api* const api = load();
  return api;
}

void* lt_handle() {
  static std::mutex mutex;
  static std::map<int, void*> handles;  // for as long as the process lives
  int device = 0;
  if (lt_api() == nullptr || cudaGetDevice(&device) != cudaSuccess) return nullptr;
  const std::lock_guard lock(mutex);
  void*& handle = handles[device];
  if (handle == nullptr && lt_api()->Create(&handle) != 0) handle = nullptr;
  return handle;
}

}  // namespace bmf::cuda
