// For functions whose point is lost in a call: sums would leave their registers.
#pragma once

#if defined(__GNUC__)
#define MOESAIC_INLINE inline __attribute__((always_inline))
#else
#define MOESAIC_INLINE inline
#endif
