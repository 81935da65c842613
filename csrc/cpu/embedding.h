// embedding: out[i] = weight[token[i]], and its gradient dweight[v] = sum over i with token[i] = v of dout[i].
//
// weight [classes, width], out and dout [tokens, width], rows contiguous. Each byte is moved once; of dweight too,
// which is written row by row, zeros included, and never added to. Sums are float, in the order of the tokens, so they
// are the same bits for any number of threads.
#pragma once
#include "core/isa.h"
#include "core/threads.h"
#include "core/types.h"

namespace bmf {

struct EmbeddingArgs {
  Dtype dtype;  // of weight and out, or of dweight
  int64_t tokens, classes, width;
  const int64_t* token;  // [tokens], each in [0, classes)
  Rows weight;
  void* out;
};

struct EmbeddingGradArgs {
  Dtype dtype;
  int64_t tokens, classes, width;
  const int64_t* token;
  Rows grad_out;
  void* grad_weight;
};

}  // namespace bmf

BMF_DECLARE_KERNEL(embedding_forward, EmbeddingArgs)
BMF_DECLARE_KERNEL(embedding_backward, EmbeddingGradArgs)
