// Matrices as e4m3 with a scale for each tile; the formula is stated in slipstream.h.

#include <algorithm>

#include "e4m3.h"
#include "slipstream.h"

// The compiler emits one copy per instruction set and the loader picks the best the processor has.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define SLIPSTREAM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SLIPSTREAM_CLONES
#endif

namespace {

using namespace slipstream;

inline uint32_t float_bits(const uint16_t* row, int64_t i) { return static_cast<uint32_t>(row[i]) << 16; }
inline uint32_t float_bits(const float* row, int64_t i) { return bits_of(row[i]); }

// Largest magnitude as bits: their order is that of the numbers, with infinity and NaN on top.
template <typename T>
inline uint32_t largest_bits(const T* row, int64_t columns, uint32_t largest) {
    for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, float_bits(row, i) & 0x7fffffffu);
    return largest;
}

template <typename T>
inline void quantize_row(const T* row, int64_t columns, float scale, uint8_t* values) {
    for (int64_t i = 0; i < columns; ++i) values[i] = to_e4m3(float_of(float_bits(row, i)) / scale);
}

SLIPSTREAM_CLONES uint32_t largest_float(const float* row, int64_t columns, uint32_t largest) {
    return largest_bits(row, columns, largest);
}
SLIPSTREAM_CLONES uint32_t largest_bfloat16(const uint16_t* row, int64_t columns, uint32_t largest) {
    return largest_bits(row, columns, largest);
}
SLIPSTREAM_CLONES void quantize_float(const float* row, int64_t columns, float scale, uint8_t* values) {
    quantize_row(row, columns, scale, values);
}
SLIPSTREAM_CLONES void quantize_bfloat16(const uint16_t* row, int64_t columns, float scale, uint8_t* values) {
    quantize_row(row, columns, scale, values);
}

inline uint32_t largest_of(const float* row, int64_t columns, uint32_t largest) {
    return largest_float(row, columns, largest);
}
inline uint32_t largest_of(const uint16_t* row, int64_t columns, uint32_t largest) {
    return largest_bfloat16(row, columns, largest);
}
inline void quantize(const float* row, int64_t columns, float scale, uint8_t* values) {
    quantize_float(row, columns, scale, values);
}
inline void quantize(const uint16_t* row, int64_t columns, float scale, uint8_t* values) {
    quantize_bfloat16(row, columns, scale, values);
}

struct Shape {
    int64_t rows, columns, tile_rows, tile_columns;
};

// Returns whether all weights are finite.
template <typename T>
bool quantize_tiles(const T* weight, const Shape& shape, int workers, uint8_t* values, float* scales) {
    const int64_t down = (shape.rows - 1) / shape.tile_rows + 1, across = (shape.columns - 1) / shape.tile_columns + 1;
    int infinite = 0;
    (void)workers;
#pragma omp parallel for collapse(2) reduction(+ : infinite) num_threads(workers) if (workers > 1)
    for (int64_t i = 0; i < down; ++i) {
        for (int64_t j = 0; j < across; ++j) {
            const int64_t first = i * shape.tile_rows, left = j * shape.tile_columns;
            const int64_t last = first + std::min(shape.tile_rows, shape.rows - first);
            const int64_t columns = std::min(shape.tile_columns, shape.columns - left);
            uint32_t largest = 0;
            for (int64_t row = first; row < last; ++row) {
                largest = largest_of(weight + row * shape.columns + left, columns, largest);
            }
            infinite += largest >= kInfinityBits;
            const float scale = e4m3_scale(largest);
            scales[i * across + j] = scale;
            for (int64_t row = first; row < last; ++row) {
                const int64_t at = row * shape.columns + left;
                quantize(weight + at, columns, scale, values + at);
            }
        }
    }
    return infinite == 0;
}

}  // namespace

extern "C" int32_t slipstream_fp8_quantize(const void* weight, int32_t is_bfloat16, int64_t rows, int64_t columns,
                                           int64_t tile_rows, int64_t tile_columns, int32_t threads, uint8_t* values,
                                           float* scales) {
    if (rows < 0 || columns < 0 || tile_rows < 1 || tile_columns < 1) return SLIPSTREAM_NEGATIVE_SIZE;
    if (rows == 0 || columns == 0) return SLIPSTREAM_OK;
    if (weight == nullptr || values == nullptr || scales == nullptr) return SLIPSTREAM_NULL_POINTER;
    const Shape shape{rows, columns, tile_rows, tile_columns};
    const int workers = threads < 1 ? 1 : threads;
    const bool finite = is_bfloat16 != 0
                            ? quantize_tiles(static_cast<const uint16_t*>(weight), shape, workers, values, scales)
                            : quantize_tiles(static_cast<const float*>(weight), shape, workers, values, scales);
    return finite ? SLIPSTREAM_OK : SLIPSTREAM_NOT_FINITE;
}
