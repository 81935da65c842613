// The one place where packing and the micro-kernels are compiled; every other file links against them.
#define BMF_DEFINE_MICROKERNEL
#include "core/microkernel.h"
