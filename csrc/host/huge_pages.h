// Large states lie in huge pages, where the system has them: memory is read faster.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastclip {

// Returns new memory laid out like `like`. Huge pages are asked for if it is large; FASTCLIP_HUGE_PAGES=0 leaves that
// out.
at::Tensor empty_in_huge_pages(const at::Tensor& like, at::ScalarType dtype);

}  // namespace fastclip
