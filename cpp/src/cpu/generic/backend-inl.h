// All of the generic algorithms. To be included once by a file of avx2/ or avx512/, after its simd.h, over whose
// primitives they are written. Everything is in an unnamed namespace: the linker must never hand a function compiled
// for one instruction set to another.
#pragma once

#include "backend.h"
#include "cpu/generic/cross_entropy-inl.h"
#include "cpu/generic/elementwise-inl.h"
#include "cpu/generic/linear-inl.h"
#include "cpu/generic/optimizer-inl.h"
#include "cpu/generic/quantize-inl.h"
