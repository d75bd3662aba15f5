// Segments of a packed axis, as every function that reads cu_seqlens checks them.

#ifndef SLIPSTREAM_SEGMENTS_H
#define SLIPSTREAM_SEGMENTS_H

#include <cstdint>

// Whether bounds begin with 0, never fall and end with `tokens`.
inline bool segments_are_valid(const int64_t* cu_seqlens, int64_t segments, int64_t tokens) {
    if (cu_seqlens[0] != 0 || cu_seqlens[segments] != tokens) return false;
    for (int64_t s = 0; s < segments; ++s) {
        if (cu_seqlens[s + 1] < cu_seqlens[s]) return false;
    }
    return true;
}

#endif
