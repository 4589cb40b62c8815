// Compiles the loops for an instruction set.
#pragma once

#include <utility>

#include "measure_loops.h"

namespace fastclip::cpu {
namespace {

// The entry points of one instruction set. The loops of loops.h and measure_loops.h are inlined into them, and so
// compiled for its target.
#define FASTCLIP_INSTRUCTION_SET(NAME, NARROW, CODES, TARGET)                                                          \
  struct NAME {                                                                                                        \
    using Narrow = NARROW;                                                                                             \
    template <class Stored>                                                                                            \
    TARGET static void read(const Stored* from, int64_t size, float* to) {                                             \
      read_many(Narrow(), from, size, to);                                                                             \
    }                                                                                                                  \
    template <class Stored>                                                                                            \
    TARGET static void write(Stored* to, int64_t size, const float* from) {                                            \
      write_many(Narrow(), to, size, from);                                                                            \
    }                                                                                                                  \
    template <class Stored>                                                                                            \
    TARGET static void round(Stored* to, int64_t size, const float* from, uint32_t key, uint32_t at) {                 \
      round_many(Narrow(), to, size, from, key, at);                                                                   \
    }                                                                                                                  \
    template <bool kSigned>                                                                                            \
    TARGET static void read_codes(const uint8_t* codes, float scale, int64_t size, float* to) {                        \
      decode<CODES, kSigned>(codes, scale, size, to);                                                                  \
    }                                                                                                                  \
    template <bool kSigned>                                                                                            \
    TARGET static float write_codes(uint8_t* codes, int64_t size, const float* from) {                                 \
      return encode<CODES, kSigned>(codes, size, from);                                                                \
    }                                                                                                                  \
    template <Storage kStorage, class R, Terms kTerms>                                                                 \
    TARGET static Updated update(const TensorEntry& t, int64_t begin, int64_t size, const Constants& c) {              \
      if constexpr (kStorage == Storage::staged) return update_staged<NAME, R, kTerms>(t, begin, size, c);             \
      if constexpr (kStorage == Storage::float32) return update_uniform<float, R, kTerms>(t, begin, size, c);          \
      if constexpr (kStorage == Storage::float64) return update_uniform<double, R, kTerms>(t, begin, size, c);         \
      if constexpr (is_narrow(kStorage)) return update_narrow<NAME, kStorage, R, kTerms>(t, begin, size, c);           \
    }                                                                                                                  \
    template <class Stored, Norm kNorm, Seen kSeen>                                                                    \
    TARGET static void measure(const TensorEntry& t, int64_t begin, int64_t size, const Clip<double>& c, Measure* m) { \
      measure_loop<NAME, Stored, kNorm, kSeen>(t, begin, size, c, m);                                                  \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    TARGET static Measure measure_params_of(const TensorEntry& t, int64_t begin, int64_t size, Norm norm) {            \
      return measure_params<NAME, T>(t, begin, size, norm);                                                            \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    TARGET static Products measure_products_of(const TensorEntry& t, int64_t begin, int64_t size,                      \
                                               const Clip<double>& c) {                                                \
      return measure_products<NAME, T>(t, begin, size, c);                                                             \
    }                                                                                                                  \
    template <class T, class R, Terms kTerms>                                                                          \
    TARGET static void delta_block_of(const T* params, const T* grads, const T* const* states, T* added, T* relative,  \
                                      const Constants& c) {                                                            \
      delta_block<T, R, kTerms>(params, grads, states, added, relative, c);                                            \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    TARGET static DeltaSums measure_deltas_of(const TensorEntry& t, int64_t begin, int64_t size, const Constants& c,   \
                                              DeltaParts parts, const Delta& rule) {                                   \
      return measure_deltas<NAME, T>(t, begin, size, c, parts, rule);                                                  \
    }                                                                                                                  \
  };

template <class Set, Storage kStorage, class R, uint32_t... kTerms>
constexpr void fill_rule(UpdateLoop* loops, std::integer_sequence<uint32_t, kTerms...>) {
  ((loops[kTerms] = Set::template update<kStorage, R, R::canonical(kTerms)>), ...);
}

template <class Set, Storage kStorage>
constexpr void fill_updates(LoopTable& table) {
  Rules::each([&](auto tag) {
    using R = typename decltype(tag)::Rule;
    UpdateLoop* const loops = table.updates[static_cast<int>(kStorage)] + kFirstLoop[Rules::id_of<R>().index()];
    constexpr bool kStaged =
        (is_narrow(kStorage) && !Set::Narrow::kInRegisters) || (is_random(kStorage) && !R::kIsCommon);
    fill_rule<Set, kStaged ? Storage::staged : kStorage, R>(loops,
                                                            std::make_integer_sequence<uint32_t, 1 << R::kSwitches>{});
  });
}

template <class Set, class R, uint32_t... kTerms>
constexpr void fill_deltas_of(Delta* rows, std::integer_sequence<uint32_t, kTerms...>) {
  ((rows[kTerms] = {Set::template delta_block_of<float, R, R::canonical(kTerms)>,
                    Set::template delta_block_of<double, R, R::canonical(kTerms)>, R::reads(kTerms),
                    R::delta_reads_param(kTerms)}),
   ...);
}

template <class Set>
constexpr void fill_deltas(LoopTable& table) {
  Rules::each([&](auto tag) {
    using R = typename decltype(tag)::Rule;
    if constexpr (R::kMeasuresDelta) {
      Delta* const rows = table.delta + kFirstLoop[Rules::id_of<R>().index()];
      fill_deltas_of<Set, R>(rows, std::make_integer_sequence<uint32_t, 1 << R::kSwitches>{});
    }
  });
  table.deltas[0] = Set::template measure_deltas_of<float>;
  table.deltas[1] = Set::template measure_deltas_of<double>;
}

template <class Set, class Stored, Norm kNorm>
constexpr void fill_measures(MeasureLoop (&loops)[3]) {
  loops[0] = Set::template measure<Stored, kNorm, Seen::raw>;
  loops[1] = Set::template measure<Stored, kNorm, Seen::clipped>;
  loops[2] = Set::template measure<Stored, kNorm, Seen::clipped_or_nonfinite>;
}

template <class Set, class Stored>
constexpr void fill_dtype(LoopTable& table, DType dtype) {
  const int d = static_cast<int>(dtype);
  fill_measures<Set, Stored, Norm::two>(table.measures[d][0]);
  fill_measures<Set, Stored, Norm::inf>(table.measures[d][1]);
}

template <class Set>
constexpr LoopTable make_loops() {
  LoopTable table{};
  fill_updates<Set, Storage::float32>(table);
  fill_updates<Set, Storage::float64>(table);
  fill_updates<Set, Storage::bfloat16>(table);
  fill_updates<Set, Storage::float16>(table);
  fill_updates<Set, Storage::random_bfloat16>(table);
  fill_updates<Set, Storage::random_float16>(table);
  fill_updates<Set, Storage::staged>(table);
  fill_dtype<Set, float>(table, DType::float32);
  fill_dtype<Set, double>(table, DType::float64);
  fill_dtype<Set, BFloat16>(table, DType::bfloat16);
  fill_dtype<Set, Float16>(table, DType::float16);
  table.params[0] = Set::template measure_params_of<float>;
  table.params[1] = Set::template measure_params_of<double>;
  table.products[0] = Set::template measure_products_of<float>;
  table.products[1] = Set::template measure_products_of<double>;
  fill_deltas<Set>(table);
  return table;
}

}  // namespace
}  // namespace fastclip::cpu
