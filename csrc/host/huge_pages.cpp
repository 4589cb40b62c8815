#include "huge_pages.h"

#include <ATen/ops/empty_like.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastclip {
namespace {

// Nobody has written to the tensor yet.
void ask_for_huge_pages([[maybe_unused]] const at::Tensor& made) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLeast = 4 << 20;  // holds a huge page of 2 MiB, wherever it begins
  static const bool wanted = [] {
    const char* switched = std::getenv("FASTCLIP_HUGE_PAGES");
    return !switched || strcmp(switched, "0") != 0;
  }();
  if (!wanted || !made.is_cpu() || made.nbytes() < kLeast) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(made.mutable_data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + made.nbytes()) / page * page;
  // A wish: a system without huge pages says no, and nothing is lost.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

at::Tensor empty_in_huge_pages(const at::Tensor& like, at::ScalarType dtype) {
  const at::Tensor made = at::empty_like(like, like.options().dtype(dtype));
  ask_for_huge_pages(made);
  return made;
}

}  // namespace fastclip
