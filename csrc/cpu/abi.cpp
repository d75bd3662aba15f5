// Identity of the library.

#include "slipstream.h"

extern "C" int32_t slipstream_abi_version(void) { return SLIPSTREAM_ABI_VERSION; }
