// Choosing an instruction set by name, and the measured peak under each.
#include <stdexcept>

#include "cpu/peak.h"
#include "testing.h"

using namespace testing;

namespace {

bool refused(const char* name) {
  try {
    bmf::set_isa(name);
  } catch (const std::invalid_argument& error) {
    return std::strstr(error.what(), "generic") != nullptr;  // it says which ones there are
  }
  return false;
}

}  // namespace

int main() {
  CHECK(bmf::isa_supported(bmf::Isa::generic));
  CHECK(bmf::isa_supported(bmf::active_isa()));
  for (int i = 0; i < bmf::kIsaCount; ++i) {
    const auto isa = static_cast<bmf::Isa>(i);
    if (!bmf::isa_supported(isa)) {
      CHECK(refused(bmf::isa_name(isa)));
      continue;
    }
    bmf::set_isa(bmf::isa_name(isa));
    CHECK(bmf::active_isa() == isa);
    CHECK(refused("sse9") && bmf::active_isa() == isa);
  }
  for_each_isa([](const Threads& threads) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
      double one = 0, ten = 0;
      bmf::peak({dtype, 1, &one}, threads);
      bmf::peak({dtype, 10, &ten}, threads);
      CHECK(one > 0 && ten == 10 * one);
    }
  });
  return result();
}
