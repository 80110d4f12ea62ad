// All of the generic algorithms, in the order in which they stand on each other. To be included once by a file of
// avx2/ or avx512/, after its simd.h. Everything is in an unnamed namespace: the linker must never hand a function
// compiled for one instruction set to another.
#pragma once

#include <type_traits>

#include "backend.h"
#include "common/codebook.h"
#include "common/layout.h"
#include "cpu/blocking.h"
#include "cpu/parallel.h"
#include "qlora_native/runtime.h"

#include "cpu/generic/dropout-inl.h"
#include "cpu/generic/dot_f32-inl.h"
#include "cpu/generic/scales-inl.h"
#include "cpu/generic/rows-inl.h"
#include "cpu/generic/quantize-inl.h"
#include "cpu/generic/product_nt-inl.h"
#include "cpu/generic/product_nn-inl.h"
#include "cpu/generic/forward-inl.h"
#include "cpu/generic/backward-inl.h"
#include "cpu/generic/linear-inl.h"
