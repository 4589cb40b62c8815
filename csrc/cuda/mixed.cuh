// Updates one tile of a tensor whose arrays have several dtypes or are rounded at random, by one warp of a GPU.
#pragma once

#include "tiles.cuh"

namespace fastclip::cuda {
namespace {

// Elements of every array that a lane takes at a time: 16 bytes of float32, or 8 bytes of a narrower dtype. All lanes
// of a warp have the same dtype. A word is unpacked only after the lane has asked for all of its words.
constexpr int kElements = 4;

// Where a word is: in memory, from which it is read for the last time, or will be read again; or in shared memory,
// where no load with a cache hint finds anything.
enum class From { memory, memory_again, shared };

// Returns where an array's element is; of no array, an address that nobody reads.
__device__ __forceinline__ char* address_of(void* array, DType dtype, int64_t element) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(array) +
                                 static_cast<uintptr_t>(element * item_size(dtype)));
}

// Returns the bytes before an element of a tile.
__device__ __forceinline__ int bytes_before(int element, DType dtype) {
  return element << (dtype == DType::float32 ? 2 : 1);
}

// Reads a word of kSize elements: 4, or 1 where memory is not aligned. It begins with this element of a tile.
template <int kSize, From kFrom = From::memory>
__device__ __forceinline__ uint4 read(const void* tile, DType dtype, int element) {
  const auto read_at = [](const auto* at) {
    if constexpr (kFrom == From::shared) {
      return *at;
    } else if constexpr (kFrom == From::memory_again) {
      return __ldcg(at);
    } else {
      return __ldcs(at);
    }
  };
  const char* const at = static_cast<const char*>(tile) + bytes_before(element, dtype);
  uint4 word{};
  if (dtype == DType::float32) {
    if constexpr (kSize == 1) {
      word.x = bits_from_float(read_at(reinterpret_cast<const float*>(at)));
    } else {
      word = read_at(reinterpret_cast<const uint4*>(at));
    }
  } else {
    if constexpr (kSize == 1) {
      word.x = read_at(reinterpret_cast<const unsigned short*>(at));
    } else {
      const uint2 half = read_at(reinterpret_cast<const uint2*>(at));
      word.x = half.x;
      word.y = half.y;
    }
  }
  return word;
}

template <int kSize>
__device__ __forceinline__ void write(void* tile, DType dtype, int element, const uint4& word) {
  char* const at = static_cast<char*>(tile) + bytes_before(element, dtype);
  if (dtype == DType::float32) {
    if constexpr (kSize == 1) {
      __stcs(reinterpret_cast<float*>(at), float_from_bits(word.x));
    } else {
      __stcs(reinterpret_cast<uint4*>(at), word);
    }
  } else {
    if constexpr (kSize == 1) {
      __stcs(reinterpret_cast<unsigned short*>(at), static_cast<unsigned short>(word.x));
    } else {
      __stcs(reinterpret_cast<uint2*>(at), uint2{word.x, word.y});
    }
  }
}

__device__ __forceinline__ void unpack(const uint4& word, DType dtype, float (&values)[kElements]) {
  const uint32_t words[] = {word.x, word.y, word.z, word.w};
  const auto half = [&](int j) { return static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)); };
  if (dtype == DType::float32) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = float_from_bits(words[j]);
  } else if (dtype == DType::bfloat16) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = load(BFloat16{half(j)});
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = load(Float16{half(j)});
  }
}

// Packs values into a word. store_to(16-bit value, float32 value, j) rounds one of them.
template <class Store>
__device__ __forceinline__ uint4 pack(const float (&values)[kElements], DType dtype, const Store& store_to) {
  uint32_t words[kElements] = {};
  const auto pack_as = [&](auto narrow) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      store_to(narrow, values[j], j);
      words[j / 2] |= uint32_t{narrow.bits} << (j % 2 * 16);
    }
  };
  if (dtype == DType::float32) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) words[j] = bits_from_float(values[j]);
  } else if (dtype == DType::bfloat16) {
    pack_as(BFloat16{});
  } else {
    pack_as(Float16{});
  }
  return {words[0], words[1], words[2], words[3]};
}

// Measures this lane's share of a tile, as measure_tile does, with the same words, and so the same bits: one function
// for the dtypes that are computed in float32. A mixture calls few, and has registers for all of them.
template <Norm kNorm>
__device__ __noinline__ Measure measure_mixed_tile(const Header& header, const Hyper& hyper, const EntryHead& entry,
                                                   DType dtype, int64_t begin, int size, uint4* slot) {
  using Sum = std::conditional_t<kNorm == Norm::inf, float, double>;
  constexpr int kAtOnce = kInFlight<1>;
  const Clip<float> clip = clip_of<float>(hyper, header.asked, {});
  const bool see_nonfinite = header.skip_nonfinite;
  const int lane = threadIdx.x % kWarp;
  double small = 0, big = 0;
  Sum medium = 0;
  const auto add = [&](float x) { measure<kNorm, false>(small, medium, big, Sum{clip.measured(x, see_nonfinite)}); };
  const auto add_four = [&](const uint4& word) {
    float values[kElements];
    unpack(word, dtype, values);
#pragma unroll
    for (int j = 0; j < kElements; ++j) add(values[j]);
  };
  const int per_pack = dtype == DType::float32 ? 4 : 8;
  const char* const grads = address_of(entry.grad, dtype, begin);
  const auto* const words = reinterpret_cast<const uint4*>(grads);
  const int full = entry.aligned ? size / per_pack : 0;
#pragma unroll 1
  for (int first = lane; first < full; first += kAtOnce * kWarp) {
    uint4 g[kAtOnce];
    if (slot) {
      for_words<kAtOnce>(first, full, [&](int k, int i) { g[k] = __ldcs(words + i); });
      for_words<kAtOnce>(first, full, [&](int k, int i) { slot[i] = g[k]; });
    } else {
      for_words<kAtOnce>(first, full, [&](int k, int i) { g[k] = __ldcg(words + i); });
    }
    for_words<kAtOnce>(first, full, [&](int k, int) {
      add_four(g[k]);
      if (dtype != DType::float32) add_four({g[k].z, g[k].w, 0, 0});
    });
  }
  const int rest = size - full * per_pack;
#pragma unroll 1
  for (int first = lane; first < rest; first += kAtOnce * kWarp) {
    uint4 g[kAtOnce];
    for_words<kAtOnce>(first, rest,
                       [&](int k, int i) { g[k] = read<1, From::memory_again>(grads, dtype, full * per_pack + i); });
    for_words<kAtOnce>(first, rest, [&](int k, int) {
      float values[kElements];
      unpack(g[k], dtype, values);
      add(values[0]);
    });
  }
  return {small, static_cast<double>(medium), big};
}

// Measures the products of a tile's parameters and gradients, in double: those of float32 are exact.
template <class OneEntry>
__device__ __noinline__ Products measure_products(const Header& header, const Hyper& hyper, const OneEntry& entry,
                                                  int64_t begin, int size, const uint4* slot) {
  const int per_pack = kPackBytes / item_size(entry.grad_dtype);  // as in update_mixed_tile
  const int kept = slot && entry.aligned ? size / per_pack * per_pack : 0;
  const char* const params = address_of(entry.param, entry.dtype, begin);
  const char* const grads = address_of(entry.grad, entry.grad_dtype, begin);
  Products products{};
  const auto measure = [&](const auto& clip, const auto& load_from) {
    constexpr int kAtOnce = kInFlight<2>;
#pragma unroll 1
    for (int first = threadIdx.x % kWarp; first < size; first += kAtOnce * kWarp) {
      decltype(clip.low) p[kAtOnce], g[kAtOnce];
      for_words<kAtOnce>(first, size, [&](int k, int i) {
        p[k] = load_from(std::false_type{}, params, entry.dtype, i);
        g[k] = i < kept ? load_from(std::true_type{}, slot, entry.grad_dtype, i)
                        : load_from(std::false_type{}, grads, entry.grad_dtype, i);
      });
      for_words<kAtOnce>(first, size, [&](int k, int) {
        const double param = p[k], grad = clip(g[k]);
        products.with_grad = fma(param, grad, products.with_grad);
        products.squared = fma(param, param, products.squared);
      });
    }
  };
  if (entry.dtype == DType::float64) {
    measure(clip_of<double>(hyper, header.asked, {}), [](auto shared, const void* array, DType, int i) {
      const double* const from = static_cast<const double*>(array) + i;
      return decltype(shared)::value ? *from : __ldcs(from);
    });
  } else {
    measure(clip_of<float>(hyper, header.asked, {}), [](auto shared, const void* array, DType dtype, int i) {
      float values[kElements];
      unpack(read<1, decltype(shared)::value ? From::shared : From::memory>(array, dtype, i), dtype, values);
      return values[0];
    });
  }
  return products;
}

// Updates a tile.
template <class K, class OneEntry>
__device__ __noinline__ UpdatedBy<K, float> update_mixed_tile(const Header& header, const Hyper& hyper,
                                                              const OneEntry& entry, int64_t begin, int size,
                                                              FactorsOf<K> factors, const uint4* slot) {
  using R = typename K::Rule;
  constexpr int kStates = K::kStates, kRoom = K::kRoom;
  constexpr int kAtOnce = kInFlight<2 + kStates>;
  const Clip<float> clip = clip_of<float>(hyper, header.asked, factors);
  const auto constants = constants_of<K, float>(hyper, entry, factors);
  const Terms terms = possible_terms<K>(hyper, entry);
  const Reads<K> reads = reads_of<K>(terms, factors);
  const uint32_t writes = R::writes(terms);
  const int64_t place = begin + entry.head;  // the place of the tile's first element in its tensor
  uint32_t keys[1 + kRoom] = {};
  if (hyper.stochastic_rounding) {
    const auto count = static_cast<uint32_t>(static_cast<int64_t>(progress_of(entry).step));
    for (int a = 0; a <= kStates; ++a) keys[a] = noise_key(hyper.rounding_seed, count, entry.index, a, place);
  }
  const int per_pack = entry.grad_dtype == DType::float32 ? 4 : 8;  // elements in 16 bytes, as the measure keeps them
  const int kept = slot && entry.aligned ? size / per_pack * per_pack : 0;
  // In registers: if not, the compiler looks them up for each word.
  char* const params = address_of(entry.param, entry.dtype, begin);
  const char* const grads = address_of(entry.grad, entry.grad_dtype, begin);
  char* states_at[kRoom];
#pragma unroll
  for (int s = 0; s < kStates; ++s) states_at[s] = address_of(entry.states[s], entry.state_dtypes[s], begin);
  UpdatedBy<K, float> updated;
  const Norm norm = header.norm;

  const auto update = [&](auto size_of_word, int from, int count) {
    constexpr int kSize = decltype(size_of_word)::value;
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int first = lane; first < count; first += kAtOnce * kWarp) {
      uint4 p[kAtOnce], g[kAtOnce], state_in[kRoom][kAtOnce];
      const auto at = [&](int i) { return from + i * kSize; };  // in the tile
      if constexpr (K::kMeasuresDelta) {  // not all is read
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) p[k] = g[k] = uint4{};
      }
      if (!K::kMeasuresDelta || reads.param) {
        for_words<kAtOnce>(first, count, [&](int k, int i) { p[k] = read<kSize>(params, entry.dtype, at(i)); });
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (!has(reads.states, s)) continue;
        for_words<kAtOnce>(first, count, [&](int k, int i) {
          state_in[s][k] = read<kSize>(states_at[s], entry.state_dtypes[s], at(i));
        });
      }
      if (K::kMeasuresDelta && !entry.grad) {
        // Its parameters alone are measured.
      } else if (kept == 0) {  // without a look at each word, the loads wait for nothing
        for_words<kAtOnce>(first, count, [&](int k, int i) { g[k] = read<kSize>(grads, entry.grad_dtype, at(i)); });
      } else {
        for_words<kAtOnce>(first, count, [&](int k, int i) {
          g[k] = at(i) < kept ? read<kSize, From::shared>(slot, entry.grad_dtype, at(i))
                              : read<kSize>(grads, entry.grad_dtype, at(i));
        });
      }
      for_words<kAtOnce>(first, count, [&](int k, int i) {
        float param[kElements], grad[kElements], states[kRoom][kElements];
        unpack(p[k], entry.dtype, param);
        unpack(g[k], entry.grad_dtype, grad);
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          if (has(reads.states, s)) unpack(state_in[s][k], entry.state_dtypes[s], states[s]);
        }
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          updated.clamped += clip.clamps(grad[j]);
          float state[kMaxStates]{};
#pragma unroll
          for (int s = 0; s < kStates; ++s) {
            if (has(reads.states, s)) state[s] = states[s][j];
          }
          if constexpr (K::kMeasuresDelta) {
            if (factors.measures) {
              const float d = clip(grad[j]);
              measure_delta<R>(updated, factors.measures, terms, constants, param[j], d, state);
              continue;
            }
          }
          R::update(terms, constants, param[j], clip(grad[j]), state);
#pragma unroll
          for (int s = 0; s < kStates; ++s) states[s][j] = state[s];
        }
        if constexpr (K::kMeasuresDelta) {
          if (factors.measures) return;
        }
        const auto nearest = [](auto& to, float value, int) { store(to, value); };
        const auto write_array = [&](int array, DType dtype, void* to, const float (&values)[kElements]) {
          uint4 word;
          if (hyper.stochastic_rounding && dtype != DType::float32) {
            const auto at_random = [&](auto& narrow, float value, int j) {
              store(narrow, value, noise(keys[array], place + at(i) + j));
            };
            word = pack(values, dtype, at_random);
          } else {
            word = pack(values, dtype, nearest);
          }
          write<kSize>(to, dtype, at(i), word);
          return word;
        };
        const uint4 stored = write_array(0, entry.dtype, params, param);
        if constexpr (K::kLimitsChange) {
          float as_rounded[kElements];
          unpack(stored, entry.dtype, as_rounded);
#pragma unroll
          for (int j = 0; j < kSize; ++j) measure_param(norm, updated.params, as_rounded[j]);
        }
        if (entry.rounded) {
          write<kSize>(address_of(entry.rounded, entry.rounded_dtype, begin), entry.rounded_dtype, at(i),
                       pack(param, entry.rounded_dtype, nearest));
        }
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          if (has(writes, s)) write_array(1 + s, entry.state_dtypes[s], states_at[s], states[s]);
        }
      });
    }
  };
  const int full = entry.aligned ? size / kElements : 0;
  update(std::integral_constant<int, kElements>{}, 0, full);
  update(std::integral_constant<int, 1>{}, full * kElements, size - full * kElements);
  return updated;
}

}  // namespace
}  // namespace fastclip::cuda
