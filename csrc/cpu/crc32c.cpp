// CRC-32C (Castagnoli): with the processor's instruction on three interleaved streams, else with tables.
//
// A CRC is a polynomial over GF(2) modulo kPolynomial, the highest power in bit 0. Appending n zero bytes multiplies it
// by x^(8n); so the CRC of a block is the sum of those of its parts, each multiplied by what follows it.

#include <array>
#include <cstddef>
#include <cstring>

#include "slipstream.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SLIPSTREAM_X86_CRC 1
#include <nmmintrin.h>
#endif

namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;
constexpr uint32_t kOne = 0x80000000u;
// Three streams hide the instruction's latency of three cycles; long streams make joining them cheap.
constexpr int64_t kLongBytes = 4096;
constexpr int64_t kShortBytes = 256;

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ ((a & 1u) ? kPolynomial : 0u); }

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
        if (a & bit) product ^= b;
        b = times_x(b);
    }
    return product;
}

// powers[k] = x^(8 * 2^k).
constexpr std::array<uint32_t, 63> make_powers() {
    std::array<uint32_t, 63> powers{};
    uint32_t power = kOne;
    for (int i = 0; i < 8; ++i) power = times_x(power);
    for (std::size_t k = 0; k < powers.size(); ++k) {
        powers[k] = power;
        power = multiply(power, power);
    }
    return powers;
}

constexpr std::array<uint32_t, 63> kPowers = make_powers();

// x^(8 * bytes).
constexpr uint32_t zeros(int64_t bytes) {
    uint32_t power = kOne;
    for (std::size_t k = 0; bytes != 0; ++k, bytes >>= 1) {
        if (bytes & 1) power = multiply(kPowers[k], power);
    }
    return power;
}

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][v]: the CRC register v, after 1 + k zero bytes.
Tables make_tables() {
    Tables tables{};
    for (uint32_t v = 0; v < 256; ++v) {
        uint32_t crc = v;
        for (int i = 0; i < 8; ++i) crc = times_x(crc);
        tables[0][v] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k) {
        for (std::size_t v = 0; v < 256; ++v) {
            tables[k][v] = (tables[k - 1][v] >> 8) ^ tables[0][tables[k - 1][v] & 0xff];
        }
    }
    return tables;
}

uint32_t extend_with_tables(uint32_t crc, const unsigned char* data, int64_t size) {
    static const Tables tables = make_tables();
    for (; size >= 8; data += 8, size -= 8) {
        crc ^= static_cast<uint32_t>(data[0]) | static_cast<uint32_t>(data[1]) << 8 |
               static_cast<uint32_t>(data[2]) << 16 | static_cast<uint32_t>(data[3]) << 24;
        crc = tables[7][crc & 0xff] ^ tables[6][crc >> 8 & 0xff] ^ tables[5][crc >> 16 & 0xff] ^ tables[4][crc >> 24] ^
              tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
    }
    for (; size > 0; ++data, --size) crc = (crc >> 8) ^ tables[0][(crc ^ *data) & 0xff];
    return crc;
}

#ifdef SLIPSTREAM_X86_CRC

// Appends a fixed number of zero bytes to a CRC: four table look-ups instead of a polynomial multiplication.
class Shift {
  public:
    explicit Shift(int64_t bytes) {
        const uint32_t power = zeros(bytes);
        for (std::size_t place = 0; place < 4; ++place) {
            for (uint32_t v = 0; v < 256; ++v) table_[place][v] = multiply(power, v << (8 * place));
        }
    }
    uint32_t operator()(uint32_t crc) const {
        return table_[0][crc & 0xff] ^ table_[1][crc >> 8 & 0xff] ^ table_[2][crc >> 16 & 0xff] ^ table_[3][crc >> 24];
    }

  private:
    std::array<std::array<uint32_t, 256>, 4> table_{};
};

inline uint64_t load_word(const unsigned char* data) {
    uint64_t word;
    std::memcpy(&word, data, sizeof word);
    return word;
}

// Takes blocks of 3 * stream bytes while there are any.
__attribute__((target("sse4.2"))) uint32_t extend_streams(uint32_t crc, const unsigned char** data, int64_t* size,
                                                          int64_t stream, const Shift& shift) {
    while (*size >= 3 * stream) {
        uint64_t a = crc, b = 0, c = 0;
        const unsigned char* at = *data;
        for (const unsigned char* end = at + stream; at != end; at += 8) {
            a = _mm_crc32_u64(a, load_word(at));
            b = _mm_crc32_u64(b, load_word(at + stream));
            c = _mm_crc32_u64(c, load_word(at + 2 * stream));
        }
        crc = shift(shift(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
        *data += 3 * stream;
        *size -= 3 * stream;
    }
    return crc;
}

__attribute__((target("sse4.2"))) uint32_t extend_with_instruction(uint32_t crc, const unsigned char* data,
                                                                   int64_t size) {
    static const Shift long_shift(kLongBytes), short_shift(kShortBytes);
    crc = extend_streams(crc, &data, &size, kLongBytes, long_shift);
    crc = extend_streams(crc, &data, &size, kShortBytes, short_shift);
    uint64_t wide = crc;
    for (; size >= 8; data += 8, size -= 8) wide = _mm_crc32_u64(wide, load_word(data));
    crc = static_cast<uint32_t>(wide);
    for (; size > 0; ++data, --size) crc = _mm_crc32_u8(crc, *data);
    return crc;
}

bool has_instruction() {
    static const bool known = __builtin_cpu_supports("sse4.2") != 0;
    return known;
}

#endif

}  // namespace

extern "C" uint32_t slipstream_crc32c(const void* data, int64_t size_bytes, uint32_t start, int32_t portable) {
    if (data == nullptr || size_bytes <= 0) return start;
    const auto* bytes = static_cast<const unsigned char*>(data);
#ifdef SLIPSTREAM_X86_CRC
    if (portable == 0 && has_instruction()) return ~extend_with_instruction(~start, bytes, size_bytes);
#endif
    (void)portable;
    return ~extend_with_tables(~start, bytes, size_bytes);
}

extern "C" uint32_t slipstream_crc32c_combine(uint32_t first, uint32_t second, int64_t second_bytes) {
    return second_bytes <= 0 ? first : multiply(zeros(second_bytes), first) ^ second;
}
