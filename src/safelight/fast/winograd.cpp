// Winograd convolutions of maps in bfloat16, with everything in between in float32.

#include "kernel.h"
#include "winograd.h"

KERNEL safelight_winograd(const Winograd<bf16>* p) { return winograd(*p); }
