// What the CPU's loops tell the compiler.
#pragma once

// Makes it an error if the compiler ignores a target or a pragma: the loops would be correct, but slow.
#pragma GCC diagnostic error "-Wattributes"
#pragma GCC diagnostic error "-Wunknown-pragmas"

// The arrays of a tensor do not overlap.
#if defined(__clang__)
#define FASTCLIP_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTCLIP_IVDEP _Pragma("GCC ivdep")
#endif
