// One library for several processors; the one at hand is asked for when it is loaded, for it may be kept where others read it.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_SEVERAL_PROCESSORS
#endif
#define INLINE inline __attribute__((always_inline))
