// Large states lie in huge pages, where the system has them: memory is read faster.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastclip {

// Asks for huge pages for a new tensor that nobody has written to yet. FASTCLIP_HUGE_PAGES=0 leaves it out.
void ask_for_huge_pages(const at::Tensor& made);

}  // namespace fastclip
